"""Measure how work grows with its size: each task alternately at one size and at twice that size.

    python -m benchmarks.growth [--tasks header layers ...] [--runs 5] [--scale 8]

A ratio of 2 means that the time is proportional to the size. Both sizes are measured in turn, in one process, so other
load on the machine slows both down. tests/test_growth.py counts the executed lines of the same tasks instead.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.model.layers import find_layers
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.io.safetensors.header import build_header, parse_header
from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.report.html.page import make_page

Task = Callable[[], object]
Prepare = Callable[[int, Path], Task]
"""Takes a size and an empty directory, and returns the task to measure."""


def expert_names(count: int) -> list[str]:
    """Names of tensors in layers of 64 experts."""
    return [f"model.layers.{n // 64}.mlp.experts.{n % 64}.up_proj.weight" for n in range(count)]


def sparse_model(directory: Path, count: int) -> Path:
    """Write a checkpoint of so many tensors: true headers, holes for data."""
    from tests.support.models import write_checkpoint

    return write_checkpoint(directory, dict.fromkeys(expert_names(count), (64, 64)), fill=None, shard_bytes=1 << 22)


def header(size: int, directory: Path) -> Task:
    """Parse a safetensors header of `size` tensors."""
    head = build_header([(name, DTYPES["BF16"], (64, 64)) for name in expert_names(size)], {})
    return lambda: parse_header(head, len(head) + size * 2 * 64 * 64, file=Path("model.safetensors"))


def layers(size: int, directory: Path) -> Task:
    """Find the layers among `size` names, and split the names at them."""
    names = expert_names(size)

    def run() -> None:
        found = find_layers(names, {"num_hidden_layers": -(-size // 64)})
        for name in names:
            found.split(name)

    return run


def linear(size: int, directory: Path) -> Task:
    """Plan a linear merge of two models of `size` tensors."""
    models = [{"model": str(sparse_model(directory / name, size)), "parameters": {"weight": 1}} for name in "ab"]
    return lambda: plan({"merge_method": "linear", "models": models}, Options(device="cpu", threads=2, max_ram=1 << 33))


def ties_on_gpu(size: int, directory: Path) -> Task:
    """Plan a ties merge of a base and two models of `size` tensors for a GPU."""
    base, *models = [str(sparse_model(directory / name, size)) for name in ("base", "a", "b")]
    listed = [{"model": model, "parameters": {"weight": 1, "density": 0.5}} for model in models]
    recipe = {"merge_method": "ties", "base_model": base, "models": listed}
    return lambda: plan(recipe, Options(machine=Machine(ram=64 << 30, vram=24 << 30, cores=16)))


def stack(size: int, directory: Path) -> Task:
    """Plan a stack of `size` slices of one layer each."""
    model = str(sparse_model(directory / "model", 64 * 64))
    slices = [{"sources": [{"model": model, "layer_range": [n % 64, n % 64 + 1]}]} for n in range(size)]
    return lambda: plan({"merge_method": "passthrough", "slices": slices}, Options(device="cpu"))


def page(size: int, directory: Path) -> Task:
    """Write the page about a plan of `size` tensors."""
    recipe = {"merge_method": "passthrough", "models": [{"model": str(sparse_model(directory / "model", size))}]}
    planned = plan(recipe, Options(device="cpu"))
    return lambda: make_page(planned)


TASKS: dict[str, tuple[Prepare, int]] = {
    "header": (header, 2048),
    "layers": (layers, 2048),
    "linear": (linear, 512),
    "ties_on_gpu": (ties_on_gpu, 512),
    "stack": (stack, 16),
    "page": (page, 512),
}
"""Every task, and the smaller of the two sizes at --scale 1."""


def measure(prepare: Prepare, size: int, runs: int, directory: Path) -> tuple[float, float]:
    """Seconds at `size` and at twice that size: medians of alternating runs."""
    tasks = []
    for n in (size, 2 * size):
        (directory / str(n)).mkdir()
        tasks.append(prepare(n, directory / str(n)))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for task, taken in zip(tasks, seconds, strict=True):
            start = time.perf_counter()
            task()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    """Measure the chosen tasks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scale", type=int, default=8, help="factor for all sizes")
    arguments = parser.parse_args()
    print(f"{'task':12} {'size':>7} {'seconds':>8} {'twice':>8} {'ratio':>6}")
    for name in arguments.tasks:
        prepare, size = TASKS[name]
        size *= arguments.scale
        with tempfile.TemporaryDirectory() as directory:
            once, twice = measure(prepare, size, arguments.runs, Path(directory))
        print(f"{name:12} {size:7} {once:8.3f} {twice:8.3f} {twice / once:6.2f}")


if __name__ == "__main__":
    main()
