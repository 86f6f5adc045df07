"""Measure whether merges stay within their budget and their plan: compares --max-ram with the kernel's peak RSS.

    python -m benchmarks.budgets [--models DIRECTORY] [--out DIRECTORY] [--budgets 1GiB 8GiB] [--methods linear ...]

Each method is planned and then merged, in separate processes, once per budget. The bytes read, written and shared must
equal the plan's, the kernel's VmHWM at the end of the process must not exceed the planned peak, the planned peak must
not exceed the budget, and every budget must give the same output files. Exits with 1 if one of these checks fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import CASES, DOCUMENT, RESULTS
from benchmarks.process import machine, run, shards
from benchmarks.tables import put_between_markers

METHODS = ("linear", "slerp", "ties", "dare_ties", "breadcrumbs", "passthrough")
BUDGETS = ("1GiB", "2GiB", "8GiB")
COUNTED = ("bytes_read", "bytes_written", "bytes_shared")


def digest(directory: Path) -> str:
    """One digest of all shards of a model."""
    combined = hashlib.sha256()
    for path in shards(directory):
        with path.open("rb") as file:
            combined.update(hashlib.file_digest(file, "sha256").digest())
    return combined.hexdigest()


def measure(method: str, budget: str, models: Path, out: Path, work: Path) -> dict[str, Any]:
    """One method at one budget: planned, merged, and the output read once more."""
    mergeloom, options = str(Path(sys.executable).with_name("mergeloom")), ["--max-ram", budget, "--device", "cpu"]
    recipe, report = work / f"{method}.yml", work / "report.json"
    recipe.write_text(CASES[method].text(method, models))
    shutil.rmtree(out, ignore_errors=True)
    try:
        command = [mergeloom, "plan", str(recipe), str(out), "--json", *options]
        planned = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        timed = run([mergeloom, "merge", str(recipe), str(out), "--quiet", "--report", str(report), *options])
        said = json.loads(report.read_text())
        return {
            "method": method,
            "budget": budget,
            "max_ram": said["max_ram"],
            "peak_ram": said["peak_ram"],
            "peak_rss": said["measured"]["peak_rss"],
            "foretold": {key: planned[key] for key in COUNTED},
            "measured": {key: said["measured"][key] for key in COUNTED},
            "bytes_reread": said["bytes_reread"],
            "seconds": round(timed.seconds, 2),
            "digest": digest(out),
        }
    finally:
        shutil.rmtree(out, ignore_errors=True)


def broken(rows: Sequence[dict[str, Any]]) -> list[str]:
    """List the checks that failed."""
    found = []
    for row in rows:
        name = f"{row['method']} at {row['budget']}"
        if row["measured"] != row["foretold"]:
            found.append(f"{name}: {row['measured']}, planned {row['foretold']}")
        if not row["peak_rss"] <= row["peak_ram"] <= row["max_ram"]:
            found.append(f"{name}: {row['peak_rss']:,} of {row['peak_ram']:,} of {row['max_ram']:,} bytes")
    for method in dict.fromkeys(row["method"] for row in rows):
        if len({row["digest"] for row in rows if row["method"] == method}) > 1:
            found.append(f"{method}: other budgets give other bytes")
    return found


def text(results: dict[str, Any]) -> str:
    """The results as a table, and what it shows in words."""
    rows, about = results["rows"], results["machine"]
    lines = [
        "| method | `--max-ram` | planned peak, MiB | VmHWM, MiB | VmHWM / planned | re-reads, GB | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak, held = row["peak_ram"] / 2**20, row["peak_rss"] / 2**20
        lines.append(
            f"| `{row['method']}` | {row['budget']} | {peak:.0f} | {held:.0f} | {held / peak:.3f} "
            f"| {row['bytes_reread'] / 1e9:.2f} | {row['seconds']:.1f} |"
        )
    wrong = broken(rows)
    verdict = "; ".join(wrong) if wrong else "No process exceeds its planned peak"
    lines += [
        "",
        f"{verdict}. Bytes read, written and shared are compared with the plan, and the outputs of a method with each "
        f"other. One run each on {about['cpu']}, {about['cores']} cores; {about['date']}. The seconds come from "
        "unprepared runs and don't allow comparisons.",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("~/.cache/mergeloom-bench/1b").expanduser())
    parser.add_argument("--out", type=Path, default=Path("/dev/shm"), help="where outputs are made, and removed")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=METHODS)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    out = arguments.out / f"mergeloom-bench-out-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="mergeloom-bench-") as work:
        for method in arguments.methods:
            for budget in arguments.budgets:
                row = measure(method, budget, arguments.models.absolute(), out, Path(work))
                results["rows"].append(row)
                print(f"{method:16} {budget:6} {row['peak_rss']:>14,} of {row['peak_ram']:,} bytes", flush=True)
    (RESULTS / "budgets.json").write_text(json.dumps(results, indent=1) + "\n")
    put_between_markers(arguments.document, "budgets", text(results))
    wrong = broken(results["rows"])
    print("\n".join(wrong or ["every budget was kept, and every prediction true"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
