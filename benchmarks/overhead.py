"""What journal and digests cost: merges of true 1B shapes with them and without, by turns, until the data is durable.

    python -m benchmarks.overhead [--models DIR] [--out DIR] [--method linear] [--pairs 9]

With them, as the program does it: every tensor is digested on its way, and data is synced in groups that the journal
then names. Without them, the same bytes are written; nothing is digested. Both are synced at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from benchmarks.compare import DOCUMENT, RESULTS
from benchmarks.make_models import CACHE, make_models
from benchmarks.process import machine, sync, touch_memory
from benchmarks.tables import put_between_markers
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.shard_writer import ShardWriter
from mergeloom.io.output.digests import BLOCK_BYTES
from mergeloom.io.output.journal import Journal

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"models": ["a", "b"], "parameters": {"weight": 0.5}},
    "ties": {"models": ["a", "b", "c"], "base": True, "parameters": {"weight": 0.5, "density": 0.5}},
}


class Bare(ShardWriter):
    """Writes tensors to their places and nothing else; what is written is synced at the end."""

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Put a piece in all its places."""
        for output in self._destinations[node]:
            self._out.write(self._layout.shard_of[output], self._layout.offset_of[output] + offset, data)

    def finished(self, node: int) -> None:
        """A digest that is none, since the manifest must have one."""
        self.digests[node] = [bytes(16)] * -(-self._graph.nbytes(node) // BLOCK_BYTES)


@contextmanager
def bare() -> Iterator[None]:
    """The program without journal and digests."""

    def append(self: Journal, records: Collection[Mapping[str, Any]]) -> None:
        self.records += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergeloom.engine.run.session.ShardWriter", Bare)
        patch.setattr(Journal, "append", append)
        yield


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, processor


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=CACHE / "1b", help="made where they aren't there: 10 GB")
    parser.add_argument("--out", type=Path, help="a directory on the disk to write to; default: next to the models")
    parser.add_argument("--method", choices=RECIPES, default="linear")
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    make_models(arguments.models, "1b")
    recipe = RECIPES[arguments.method]
    named = [{"model": str(arguments.models / name), "parameters": recipe["parameters"]} for name in recipe["models"]]
    made: dict[str, Any] = {"merge_method": arguments.method, "models": named, "dtype": "bfloat16"}
    if recipe.get("base"):
        made["base_model"] = str(arguments.models / "base")
    planned = plan(made, Options(device="cpu", max_ram=4 << 30))
    out = (arguments.out or arguments.models.parent) / "overhead"
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}

    def run() -> None:
        merge(planned, out)
        sync(out)

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # keeps this run's pending writes out of the next run's time
        for file in {ref.file for ref in planned.built.graph.reads}:
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass
        touch_memory(8 << 30)

    for number in range(arguments.pairs + 1):
        for which in ("with", "without") if number % 2 else ("without", "with"):
            clear()
            with bare() if which == "without" else nullcontext():
                measured = timed(run)
            if number:  # the first pair warms up
                found[which].append(measured)
                seconds, processors = measured
                print(f"{which:8} {seconds:.2f} s, {processors:.2f} s of the processor, load {os.getloadavg()[0]:.1f}")
    clear()
    medians = {which: statistics.median(seconds for seconds, _ in runs) for which, runs in found.items()}
    processor = {which: statistics.median(seconds for _, seconds in runs) for which, runs in found.items()}
    ratios = [a[0] / b[0] - 1 for a, b in zip(found["with"], found["without"], strict=True)]
    result = {
        "machine": machine(),
        "method": arguments.method,
        "bytes_written": planned.schedule.bytes_written,
        "seconds": medians,
        "processor_seconds": processor,
        "overhead": medians["with"] / medians["without"] - 1,
        "overhead_of_pairs": statistics.median(ratios),
        "overhead_of_processor": processor["with"] / processor["without"] - 1,
    }
    text = json.dumps(result, indent=1)
    print(text)
    (RESULTS / "overhead.json").write_text(f"{text}\n")
    put_between_markers(DOCUMENT, "overhead", in_words(result))
    return 0


def in_words(result: dict[str, Any]) -> str:
    """The result as a sentence."""
    seconds, about = result["seconds"], result["machine"]
    return (
        f"A {result['method']} merge that writes {result['bytes_written'] / 1e9:.2f} GB, excluding start-up "
        f"and including the sync, takes {seconds['with']:.2f} s with digests and journal, and "
        f"{seconds['without']:.2f} s without: {result['overhead']:.1%} more. {about['cpu']}, "
        f"{about['cores']} cores; {about['date']}."
    )


if __name__ == "__main__":
    sys.exit(main())
