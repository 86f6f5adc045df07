"""Measure how plans and merges grow: with tensors, threads and models; and how long the commands take to start.

    python -m benchmarks.scaling [--models DIRECTORY] [--parts start planning rehearsal threads ...] [--runs 3]

Every figure is the time of a process from start to end, with OUT on tmpfs: median, minimum and maximum. Three parts
make checkpoints of their own: `planning` true headers in shards of 4 GiB with sparse data, `rehearsal` twins of them
with a thousandth of the bytes, and `tensors` half a gigabyte in ever more tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import CASES, DOCUMENT, RESULTS, size
from benchmarks.process import machine, run, shards, touch_memory, wait_for_quiet, warm
from benchmarks.tables import put_between_markers

PLANNED = ((4, 80), (26, 125), (60, 553), (92, 896))
"""Layers and experts of the mixtures of experts that are planned: about 1,000, 10,000, 100,000 and 250,000 tensors."""
WIDTHS = (7168, 1536, 151_936)
"""Width of the residual stream and of an expert, and vocabulary. The last mixture has 2.7T parameters."""
SMALL_WIDTHS = (224, 48, 4_748)
SHARD_BYTES = 4 << 30
SPLIT = (32, 256, 2_048, 16_384)
SPLIT_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure.

    Args:
        part: name of the series that the point belongs to.
        label: label of the series.
        x: position in the series.
        arguments: mergeloom's arguments, without the output directory.
        inputs: files to read once before the run.
        merges: whether the command writes a model.
    """

    part: str
    label: str
    x: float
    arguments: Sequence[str]
    inputs: Sequence[Path] = ()
    merges: bool = True


def linear(*models: Path) -> str:
    """The recipe of a mean."""
    lines = [f"  - {{model: {model}, parameters: {{weight: 1}}}}" for model in models]
    return "\n".join(["merge_method: linear", "dtype: bfloat16", "models:", *lines]) + "\n"


def start(models: Path, work: Path) -> Iterator[Point]:
    """Commands that have next to nothing to do."""
    recipe = work / "small.yml"
    recipe.write_text(linear(models / "a", models / "b"))
    for x, arguments in enumerate((["--help"], ["methods"], ["plan", str(recipe)])):
        yield Point("start", f"mergeloom {arguments[0]}", x, arguments, merges=False)


def planning(models: Path, work: Path) -> Iterator[Point]:
    """Plans of ever more output tensors, each of two inputs."""
    for count, recipe in _mixtures(work, WIDTHS, SHARD_BYTES):
        yield Point("planning", "linear of two models", count, ["plan", str(recipe), "--json"], merges=False)


def rehearsal(models: Path, work: Path) -> Iterator[Point]:
    """Merges without output of as many tensors as are planned, with a thousandth of the bytes."""
    for count, recipe in _mixtures(work, SMALL_WIDTHS, SHARD_BYTES // 1000):
        arguments = ["merge", str(recipe), "--no-output", "--quiet", "--max-ram", "2GiB"]
        yield Point("rehearsal", "merge --no-output", count, arguments, merges=False)


def _mixtures(work: Path, widths: tuple[int, int, int], shard_bytes: int) -> Iterator[tuple[int, Path]]:
    """Pairs of mixtures of experts with sparse data: the number of tensors of each, and the recipe of their mean."""
    from tests.support.models import qwen3_moe, write_checkpoint

    hidden, intermediate, vocabulary = widths
    for layers, experts in PLANNED:
        model = qwen3_moe(
            layers=layers, experts=experts, hidden=hidden, intermediate=intermediate, vocabulary=vocabulary
        )
        count = len(model.tensors)
        pair = [write_checkpoint(work / f"{name}{count}", model, fill=None, shard_bytes=shard_bytes) for name in "ab"]
        recipe = work / f"mixture{count}.yml"
        recipe.write_text(linear(*pair))
        yield count, recipe
        for directory in pair:
            shutil.rmtree(directory)


def threads(models: Path, work: Path) -> Iterator[Point]:
    """Merges with ever more compute threads."""
    for method in ("linear", "dare_ties"):
        case, recipe = CASES[method], work / f"{method}.yml"
        recipe.write_text(case.text(method, models))
        inputs = [shard for name in case.inputs.split() for shard in shards(models / name)]
        for count in range(1, min(len(os.sched_getaffinity(0)), 64) + 1):
            if count & (count - 1) == 0:
                yield Point("threads", method, count, ["merge", str(recipe), "--threads", str(count)], inputs)


def models(directory: Path, work: Path) -> Iterator[Point]:
    """Merges of ever more models."""
    names = ("a", "b", "c", "base")
    for count in range(2, len(names) + 1):
        recipe, chosen = work / f"of{count}.yml", [directory / name for name in names[:count]]
        recipe.write_text(linear(*chosen))
        inputs = [shard for model in chosen for shard in shards(model)]
        yield Point("models", "linear", count, ["merge", str(recipe)], inputs)


def tensors(directory: Path, work: Path) -> Iterator[Point]:
    """Merges of the same bytes in ever more tensors."""
    from tests.support.models import write_checkpoint

    for count in SPLIT:
        shape = (SPLIT_BYTES // 2 // count // 64, 64)
        shapes = {f"model.layers.{number}.mlp.down_proj.weight": shape for number in range(count)}
        pair = [write_checkpoint(work / f"{name}{count}", shapes, fill=seed) for seed, name in enumerate("ab")]
        recipe = work / f"split{count}.yml"
        recipe.write_text(linear(*pair))
        inputs = [shard for model in pair for shard in shards(model)]
        yield Point("tensors", "linear", count, ["merge", str(recipe)], inputs)
        for model in pair:
            shutil.rmtree(model)


PARTS: dict[str, tuple[Callable[[Path, Path], Iterator[Point]], str]] = {
    "start": (start, "command"),
    "planning": (planning, "tensors planned"),
    "rehearsal": (rehearsal, "tensors, a thousandth of the bytes"),
    "threads": (threads, "compute threads, 1B shapes"),
    "models": (models, "models merged, 1B shapes"),
    "tensors": (tensors, "tensors, 512 MiB for each of two models"),
}


def measure(point: Point, runs: int, memory: int, quiet: float, out: Path) -> dict[str, Any]:
    """The runs of one point."""
    command = [str(Path(sys.executable).with_name("mergeloom")), *point.arguments]
    seconds, cpu_seconds, peak = [], [], 0
    for _ in range(runs):
        wait_for_quiet(quiet)
        warm(point.inputs)
        if point.merges:
            touch_memory(memory)
        try:
            found = run([*command, str(out), "--quiet", "--max-ram", "2GiB"] if point.merges else command)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        seconds.append(round(found.seconds, 3))
        cpu_seconds.append(round(found.cpu_seconds, 3))
        peak = max(peak, found.peak_rss)
    row = {"part": point.part, "label": point.label, "x": point.x, "seconds": seconds, "peak_rss": peak}
    row["cpu_seconds"] = cpu_seconds
    print(json.dumps(row), flush=True)
    return row


def text(results: dict[str, Any]) -> str:
    """The results as tables."""
    blocks = []
    for part, (_, axis) in PARTS.items():
        rows = [row for row in results["rows"] if row["part"] == part]
        if rows:
            lines = [f"| {axis} | what | seconds | peak RSS, MiB |", "|---|---|---|---|"]
            for row in rows:
                place = "" if part == "start" else f"{row['x']:,}"
                spread = (
                    f"{statistics.median(row['seconds']):.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})"
                )
                lines.append(f"| {place} | `{row['label']}` | {spread} | {row['peak_rss'] / 2**20:.0f} |")
            blocks.append("\n".join(lines))
    about = results["machine"]
    count = max(len(row["seconds"]) for row in results["rows"])
    blocks.append(
        f"Complete processes, OUT on tmpfs, warm inputs; medians of {count} (smallest to largest). {about['cpu']}, "
        f"{about['cores']} cores; {about['date']}."
    )
    return "\n\n".join(blocks)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("~/.cache/mergeloom-bench/1b").expanduser())
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", type=size, default=size("8GB"), help="memory to touch before each merge")
    parser.add_argument("--quiet", type=float, default=60, help="seconds to wait for other processes to be quiet")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles all modules, as no user's does
    out = Path(f"/dev/shm/mergeloom-bench-out-{os.getpid()}")
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="mergeloom-bench-") as work:
            for point in PARTS[part][0](arguments.models.absolute(), Path(work)):
                row = measure(point, arguments.runs, arguments.memory, arguments.quiet, out)
                results["rows"].append(row)
    (RESULTS / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    put_between_markers(arguments.document, "scaling", text(results))
    print(text(results))


if __name__ == "__main__":
    main()
