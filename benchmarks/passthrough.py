"""Compare a passthrough merge with ``cp`` of as many bytes, or measure merges of up to a trillion parameters.

    python -m benchmarks.passthrough [--models DIRECTORY] [--disk DIRECTORY] [--runs 5]
    python -m benchmarks.passthrough --sparse DIRECTORY

The first stacks 24 of Llama-3.2-1B's layers (3.4 GB) on DIRECTORY's file system, alternating with cp of the files that
this gives; both count from the start of the process to the end of an fsync of every file. The second needs a directory
on XFS or Btrfs: there it makes sparse checkpoints of Llama-3-70B's and Llama-3.1-405B's shapes, sharded as published,
and the published stacks of these: Llama-3-120B (its dtype kept), BigLlama's 681B, its 1T from that, and in one go.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare
from benchmarks.compare import DOCUMENT, RESULTS
from benchmarks.process import machine, run, shards, warm
from benchmarks.tables import put_between_markers

SIDES = ("mergeloom", "cp")
Slices = Sequence[tuple[int, int]]
STACK: Slices = [(0, 12), (4, 16)]
WINDOWS: dict[str, tuple[str, Slices]] = {
    "120B": ("70B", [(first, first + 20) for first in range(0, 70, 10)]),
    "681B": ("405B", [(first, first + 42) for first in range(0, 105, 21)]),
    "1T": ("681B", [(0, 105), (52, 157), (104, 209)]),
}
"""Of each published stack, the model that it is made from and the layers."""


def stage(model: Path | str, slices: Slices, name: str = "") -> str:
    """One stage of a recipe that passes layers through."""
    lines = [f"name: {name}"] if name else []
    lines += ["merge_method: passthrough", "dtype: bfloat16", "slices:"]
    lines += [f"  - sources: [{{model: {model}, layer_range: [{first}, {end}]}}]" for first, end in slices]
    return "\n".join(lines) + "\n"


def mergeloom(recipe: Path, out: Path) -> list[str]:
    """The command of a merge."""
    return [str(Path(sys.executable).with_name("mergeloom")), "merge", str(recipe), str(out), "--quiet"]


# ------------------------------------------------------------------------------------------ compared with cp


def compare_with_cp(model: Path, disk: Path, work: Path, runs: int, quiet: float) -> dict[str, Any]:
    """Alternating runs of the merge and of cp; seconds by side."""
    recipe = work / "stack.yml"
    recipe.write_text(stage(model, STACK))
    same = disk / f"mergeloom-bench-same-{os.getpid()}"  # what cp copies: as many bytes in as many files
    out = disk / f"mergeloom-bench-out-{os.getpid()}"
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        run(mergeloom(recipe, same))
        commands = {"mergeloom": mergeloom(recipe, out), "cp": [shutil.which("cp") or "cp", "-r", str(same), str(out)]}
        nbytes = sum(file.stat().st_size for file in shards(same))
        for _ in range(runs):
            for side in SIDES:
                os.sync()  # what others wrote before is not this run's
                warm(shards(same if side == "cp" else model))
                compare.wait_for_quiet(quiet)
                measured = run(commands[side], durable=out)
                assert sum(file.stat().st_size for file in shards(out)) == nbytes
                shutil.rmtree(out)
                found[side].append(round(measured.seconds, 3))
                others = measured.others_cpu_seconds
                print(f"{side:10} {measured.seconds:6.2f} s, others took {others:.2f} s CPU", flush=True)
    finally:
        shutil.rmtree(same, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    return {"machine": machine(), "bytes": nbytes, "seconds": found}


def cp_text(results: dict[str, Any]) -> str:
    """The result in words."""
    seconds = {side: statistics.median(found) for side, found in results["seconds"].items()}
    spread = {side: f"{min(found):.2f} to {max(found):.2f}" for side, found in results["seconds"].items()}
    about = results["machine"]
    return (
        f"Passing through {results['bytes'] / 1e9:.2f} GB of layers of a 2.5 GB model, on a file system without shared "
        f"blocks, including the sync: {seconds['mergeloom']:.2f} s ({spread['mergeloom']}), including start-up; `cp` "
        f"of as many bytes {seconds['cp']:.2f} s ({spread['cp']}): {seconds['mergeloom'] / seconds['cp']:.2f} times. "
        f"Medians of {len(results['seconds']['cp'])}, alternating, inputs in the page cache. {about['cpu']}, "
        f"{about['cores']} cores; {about['date']}."
    )


# ---------------------------------------------------------------------------------------------- sparse


def make_sparse(directory: Path) -> None:
    """Checkpoints of true shapes without data, in shards as public checkpoints have them."""
    from tests.support import models

    for name, model in (("70B", models.llama_3_70b()), ("405B", models.llama_3_1_405b())):
        if not (directory / name / "config.json").exists():
            models.write_checkpoint(directory / name, model, fill=None, shard_bytes=4_600_000_000)


def sparse(directory: Path, work: Path) -> list[dict[str, Any]]:
    """The published stacks: seconds, bytes that the files say, and bytes that the disk has lost."""
    recipes = {name: stage(directory / source, slices) for name, (source, slices) in WINDOWS.items()}
    first, second = (stage(directory / "405B", WINDOWS["681B"][1], "681B"), stage("681B", WINDOWS["1T"][1]))
    recipes["1T in one go"] = f"{first}---\n{second}"
    rows = []
    for name, text in recipes.items():
        recipe, out = work / "recipe.yml", directory / name.replace(" ", "-")
        recipe.write_text(text)
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        before = shutil.disk_usage(directory).free
        measured = run(mergeloom(recipe, out))
        os.sync()
        rows.append(
            {
                "merge": name,
                "seconds": round(measured.seconds, 2),
                "peak_rss": measured.peak_rss,
                "bytes": sum(file.stat().st_size for file in shards(out)),
                "disk": before - shutil.disk_usage(directory).free,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def sparse_text(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a table."""
    lines = ["| merge | size | seconds, including start-up | disk taken | peak RSS |", "|---|---|---|---|---|"]
    for row in rows:
        size, disk, peak = row["bytes"] / 1e9, row["disk"] / 1e6, row["peak_rss"] / 2**20
        lines.append(f"| {row['merge']} | {size:,.0f} GB | {row['seconds']:.1f} | {disk:.0f} MB | {peak:.0f} MiB |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("~/.cache/mergeloom-bench/1b").expanduser())
    parser.add_argument("--disk", type=Path, help="directory for OUT; default: next to the models")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quiet", type=float, default=120, help="seconds to wait for other processes to be quiet")
    parser.add_argument("--sparse", type=Path, help="a directory on XFS or Btrfs")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mergeloom-bench-") as work:
        if arguments.sparse is not None:
            make_sparse(arguments.sparse)
            name, results = "sparse", sparse(arguments.sparse.absolute(), Path(work))
            text = sparse_text(results)
        else:
            model = (arguments.models / "base").absolute()
            disk = (arguments.disk or arguments.models).absolute()
            name, found = "passthrough", compare_with_cp(model, disk, Path(work), arguments.runs, arguments.quiet)
            text, results = cp_text(found), [found]
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    put_between_markers(arguments.document, name, text)
    print(text)


if __name__ == "__main__":
    main()
