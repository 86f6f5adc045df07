"""Runs the planner and the merge of giant models within 4 GiB, as processes of their own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.process import run, wait_for_quiet

BUDGET = "4GiB"
MERGELOOM = str(Path(sys.executable).with_name("mergeloom"))


def fastest_plan(recipe: Path, runs: int) -> str:
    """Plan a merge several times; return the time of the fastest run, and its peak RSS."""
    found = []
    for _ in range(runs):
        wait_for_quiet(10)
        found.append(run([MERGELOOM, "plan", str(recipe)]))
    best = min(found, key=lambda each: each.seconds)
    return f"{best.seconds:.2f} s ({best.cpu_seconds:.2f} s of CPU), peak RSS {best.peak_rss / 1e6:.0f} MB"


def merge(recipe: Path, out: Path, *options: str) -> dict[str, Any]:
    """Run a merge; return its report."""
    report = out.with_name("report.json")
    run([MERGELOOM, "merge", str(recipe), str(out), "--max-ram", BUDGET, "--quiet", "--report", str(report), *options])
    found: dict[str, Any] = json.loads(report.read_text())
    report.unlink()
    return found


def plan_of(recipe: Path, *options: str) -> dict[str, Any]:
    """The plan of a merge as `plan --json` prints it."""
    with tempfile.TemporaryFile() as output:
        actions = [(os.POSIX_SPAWN_DUP2, output.fileno(), 1)]
        command = [MERGELOOM, "plan", str(recipe), "--json", *options]
        child = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{' '.join(command)} failed")
        output.seek(0)
        found: dict[str, Any] = json.loads(output.read())
    return found
