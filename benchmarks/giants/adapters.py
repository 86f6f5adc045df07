"""Measure the merge of an adapter into a model with the shapes of Llama-3.1-405B.

    python -m benchmarks.giants.adapters [--work DIRECTORY] [--parts planning layers random] [--runs 1]

The adapter has rank 32 on all linear layers. `planning` plans the complete model, of files without data. `layers`
merges 20 of the 126 layers of files without data, without writing the result, and compares the bytes that are read with
the plan and with the headers; it exits with 1 if they differ. `random` merges 2 layers with random data, 12.8 GB. All
merges have 4 GiB. DIRECTORY needs 30 GiB on a disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.giants.merges import fastest_plan, merge, plan_of
from benchmarks.process import cool, machine, shards, tensor_bytes, wait_for_quiet

RANK = 32
SHARD_BYTES = 4_500_000_000
_PIECE = 1 << 24


def pair(work: Path, layers: int, *, embeddings: bool) -> Path:
    """Write a base without data and an adapter, in a process of their own; return the recipe that merges the adapter.

    An adapter of this size is 2.5 GB, which would count in the peak RSS of the processes that this one starts.

    Args:
        work: directory to write to.
        layers: number of layers.
        embeddings: whether the vocabulary is complete; otherwise it has 1,024 tokens.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_write_pair, work, layers, 128_256 if embeddings else 1024).result()


def _write_pair(work: Path, layers: int, vocabulary: int) -> Path:
    import torch

    from tests.support.adapters.files import write_lora
    from tests.support.models import llama, write_checkpoint

    model = llama(layers=layers, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=vocabulary)
    write_checkpoint(work / "base", model, fill=None, shard_bytes=SHARD_BYTES)
    write_lora(work / "adapter", model.tensors, rank=RANK, dtype=torch.bfloat16)
    recipe = work / "recipe.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {work / 'base'}+{work / 'adapter'}\n")
    return recipe


def fill(files: Iterable[Path]) -> None:
    """Give the tensors of a model in bfloat16 random values of about 0.01."""
    random = np.random.default_rng(0)
    values = (random.standard_normal(_PIECE, np.float32) / 100).view(np.uint32) >> np.uint32(16)
    data = memoryview(values.astype(np.uint16)).cast("B")
    for path in files:
        with path.open("r+b") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            left = path.stat().st_size - begin
            file.seek(begin)
            while left > 0:
                left -= file.write(data[: min(left, len(data))])


def planning(work: Path, runs: int) -> list[str]:
    """Plan the complete model."""
    recipe = pair(work, 126, embeddings=True)
    return [f"- `plan` of all 126 layers with an adapter of rank {RANK}: {fastest_plan(recipe, runs)}"]


def layers(work: Path, runs: int) -> list[str]:
    """Merge 20 layers of files without data, and compare what is read with the plan."""
    recipe = pair(work, 20, embeddings=True)
    planned, report = plan_of(recipe, "--max-ram", "4GiB"), merge(recipe, work / "out", "--no-output")
    stored = tensor_bytes(work / "base") + tensor_bytes(work / "adapter")
    executed = report["measured"]["bytes_read"]
    if not planned["bytes_read"] == executed == stored:
        raise SystemExit(f"planned {planned['bytes_read']}, executed {executed}, stored {stored} bytes")
    return [_line("20 of the 126 layers, files without data, nothing written", report)]


def random(work: Path, runs: int) -> list[str]:
    """Merge 2 layers with random data."""
    recipe, lines = pair(work, 2, embeddings=False), []
    fill(shards(work / "base"))
    for _ in range(runs):
        cool(shards(work / "base"))
        wait_for_quiet(10)
        lines.append(_line("2 of the 126 layers, random data", merge(recipe, work / "out")))
        shutil.rmtree(work / "out")
    return lines


def _line(what: str, report: dict[str, Any]) -> str:
    """A line about a merge."""
    measured = report["measured"]
    seconds, read = measured["seconds"], measured["bytes_read"]
    lanes = ", ".join(f"{name} {each['worked']:.1f}" for name, each in measured["lanes"].items())
    return (
        f"- {what}: {read:,} bytes read (base and adapter), {seconds:.1f} s, {read / seconds / 1e9:.2f} GB/s, peak RSS "
        f"(VmHWM) {measured['peak_rss'] / 1e6:.0f} MB; seconds of work in each lane: {lanes}"
    )


PARTS: dict[str, Callable[[Path, int], list[str]]] = {"planning": planning, "layers": layers, "random": random}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="mergeloom-giant-", dir=arguments.work) as work:
            print("\n".join(PARTS[name](Path(work), arguments.runs)), flush=True)
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
