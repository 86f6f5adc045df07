"""Measure the compute lane: nanoseconds of a thread per output element, in both editions, alternately, in one run.

    python -m benchmarks.compute.lane --models DIRECTORY --first ENVIRONMENT [--methods linear ...] [--runs 3]

The figure is what `--report` says the compute lane's threads worked, summed over the threads, divided by the elements
of the output. Both editions run with one thread; mergeloom also with two, compared with the smaller of twice one thread
and two threads that copy the same bytes in memory: a copy of N bytes reads N and writes N, so half of what the method
reads and writes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import CASES
from benchmarks.process import machine, run, shards, tensor_bytes, touch_memory, warm

FASTER = {
    **dict.fromkeys(("linear", "task_arithmetic"), 6.0),
    **dict.fromkeys(("slerp", "model_stock"), 4.0),
    **dict.fromkeys(("ties", "dare_ties", "breadcrumbs", "sce"), 3.0),
}
"""How many times less time per element than the first edition, with one thread each."""
SCALING = 0.85
"""The share of the ideal throughput that two threads reach."""
PIECE = 4 << 20
COPIED = 2 << 30


def lane_seconds(program: Path, recipe: Path, out: Path, threads: int) -> float:
    """One merge; the seconds that the threads of its compute lane worked."""
    report = out.with_suffix(".json")
    for left in (out, report):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    flags = ["--quiet", "--max-ram", "1GiB", "--threads", str(threads), "--report", str(report)]
    run([str(program), "merge", str(recipe), str(out), *flags])
    lanes = json.loads(report.read_text())["measured"]["lanes"]
    shutil.rmtree(out)
    report.unlink()
    return float(lanes["compute"]["worked"])


def copy_seconds_per_byte() -> float:
    """Seconds for each copied byte with two threads that copy 4 MiB pieces of memory that no cache holds."""
    source, target = bytearray(64 * PIECE), bytearray(64 * PIECE)
    barrier = threading.Barrier(3)

    def copy(first: int) -> None:
        size = len(source)
        from_, to = ((ctypes.c_char * size).from_buffer(memory) for memory in (source, target))
        barrier.wait()
        for _ in range(COPIED // size):
            for offset in range(first * PIECE, size, 2 * PIECE):
                ctypes.memmove(ctypes.byref(to, offset), ctypes.byref(from_, offset), PIECE)
        barrier.wait()

    threads = [threading.Thread(target=copy, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.monotonic()
    barrier.wait()
    seconds = time.monotonic() - began
    for thread in threads:
        thread.join()
    return seconds / COPIED


def passes(method: str) -> int:
    """How often a method reads its inputs, by the plan: the scaling bar counts every pass."""
    return {"slerp": 2, "model_stock": 2}.get(method, 1)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, each of them a method, a side and its ns per output element."""
    ours, first = Path(sys.executable).with_name("mergeloom"), arguments.first.absolute() / "bin/mergeloom"
    sides = {"mergeloom": (ours, 1), "first": (first, 1), "mergeloom, 2 threads": (ours, 2)}
    elements = tensor_bytes(arguments.models / "a") // 2
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mergeloom-bench-", dir="/dev/shm") as work:
        for method in arguments.methods:
            recipe = Path(work) / f"{method}.yml"
            recipe.write_text(CASES[method].text(method, arguments.models.absolute()))
            models = [arguments.models / name for name in CASES[method].inputs.split()]
            inputs = [shard for model in models for shard in shards(model)]
            for _ in range(arguments.runs):
                for side, (program, threads) in sides.items():
                    warm(inputs)
                    touch_memory(4 << 30)
                    seconds = lane_seconds(program, recipe, Path(work) / "out", threads)
                    runs.append({"method": method, "side": side, "ns": seconds / elements * 1e9})
                copied = copy_seconds_per_byte() * (len(models) * passes(method) + 1)
                runs.append({"method": method, "side": "copy, 2 threads", "ns": copied * 2 * 1e9})
                print(method, *(f"{found['side']}: {found['ns']:.2f}" for found in runs[-4:]), sep="  ", flush=True)
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    """The medians, and the bars that they met or missed."""
    lines = [
        "| method | mergeloom, ns | first edition, ns | times faster | bar | 2 threads, ns | share of the ideal |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(found["method"] for found in runs):
        ns = {
            side: statistics.median(found["ns"] for found in runs if (found["method"], found["side"]) == (method, side))
            for side in ("mergeloom", "first", "mergeloom, 2 threads", "copy, 2 threads")
        }
        one, first, two, copied = ns.values()
        wall, ideal = two / 2, max(one / 2, copied / 2)
        lines.append(
            f"| `{method}` | {one:.2f} | {first:.2f} | {first / one:.1f} | {FASTER.get(method, 0):g} | {two:.2f} "
            f"| {ideal / wall:.2f} |"
        )
    about = machine()
    caption = f"Medians; {about['cpu']}, {about['cores']} cores; {about['date']}. Bar for the share: {SCALING}."
    return "\n".join([*lines, "", caption])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("~/.cache/mergeloom-bench/1b").expanduser())
    parser.add_argument("--first", type=Path, default=Path(".venv-first"), help="environment with commit d163d86")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(FASTER))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every run to this file")
    arguments = parser.parse_args()
    runs = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1))
    print(table(runs))


if __name__ == "__main__":
    main()
