"""Hold what was measured against the bars that mergeloom is meant to clear: met or not, in docs/benchmarks.md.

    python -m benchmarks.bars

It measures nothing: the figures are those of benchmarks/results/, where `compare` and `scaling` leave them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.compare import DOCUMENT, RESULTS
from benchmarks.tables import cell, put_between_markers

FASTER = {
    "linear": 6.0,
    "slerp": 6.0,
    "task_arithmetic": 6.0,
    "model_stock": 5.0,
    "karcher": 5.0,
    "sce": 5.0,
    "dare_ties": 14.0,
    "ties": 30.0,
    "breadcrumbs": 30.0,
    "passthrough": 8.0,
}
"""How many times faster than mergekit, on two cores, with models of Llama-3.2-1B's shapes and OUT on tmpfs."""
FLOOR = {
    **dict.fromkeys(("linear", "task_arithmetic", "passthrough"), (1.3, 0.6)),
    **dict.fromkeys(("slerp", "model_stock"), (2.0, 0.6)),
    **dict.fromkeys(("karcher", "ties", "dare_ties", "breadcrumbs", "sce"), (4.0, 1.0)),
}
"""Maximum time: a multiple of the time that reading the inputs and writing the output takes, and seconds to start."""
PEAK = {"linear": 220 << 20}
"""Maximum peak RSS in bytes; `PEAK_OTHERS` for every other method."""
PEAK_OTHERS = 1 << 30
START = {"mergeloom --help": 0.3, "mergeloom plan": 1.5}
"""Maximum seconds of each command."""
PLAN = {1_000: 0.4, 10_000: 0.7, 101_000: 3.0, 252_000: 8.0}
"""Maximum seconds of a plan of at most this many tensors."""
PEAK_PLAN = 250 * 10**6
"""Maximum peak RSS of these plans in bytes."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar and what was found."""

    what: str
    wanted: str
    found: str
    met: bool


def of_comparison(results: dict[str, Any]) -> Iterator[Bar]:
    """The bars that a run of `compare` tells about."""
    runs = results["runs"]
    for method in dict.fromkeys(run["method"] for run in runs):
        ours, theirs, floor = (cell(runs, method, side) for side in ("mergeloom", "mergekit", "floor"))
        if ours and theirs and method in FASTER:
            ratio = theirs.median / ours.median
            yield Bar(f"`{method}` vs. mergekit", f"{FASTER[method]:g}x", f"{ratio:.1f}x", ratio >= FASTER[method])
        if ours and floor and method in FLOOR:
            factor, start = FLOOR[method]
            limit = factor * floor.median + start
            wanted = f"at most {factor:g}x + {start:g} s = {limit:.2f} s"
            yield Bar(f"`{method}` vs. reading and writing", wanted, f"{ours.median:.2f} s", ours.median <= limit)
        if ours:
            peak, most = ours.peak_rss / 2**20, PEAK.get(method, PEAK_OTHERS) / 2**20
            yield Bar(f"peak RSS of `{method}`", f"at most {most:.0f} MiB", f"{peak:.0f} MiB", peak <= most)


def of_scaling(results: dict[str, Any]) -> Iterator[Bar]:
    """The bars that a run of `scaling` tells about."""
    for row in results["rows"]:
        if row["part"] == "start" and row["label"] in START:
            limit, found = START[row["label"]], statistics.median(row["seconds"])
            yield Bar(f"`{row['label']}`", f"under {limit:g} s", f"{found:.2f} s", found < limit)
        if row["part"] == "planning":
            limit, found = PLAN[next(most for most in PLAN if row["x"] <= most)], statistics.median(row["seconds"])
            what, peak = f"plan of {row['x']:,} tensors", row["peak_rss"]
            yield Bar(what, f"at most {limit:g} s", f"{found:.2f} s", found <= limit)
            yield Bar(
                f"peak RSS of the {what}",
                f"at most {PEAK_PLAN / 1e6:.0f} MB",
                f"{peak / 1e6:.0f} MB",
                peak <= PEAK_PLAN,
            )


def text(bars: list[Bar]) -> str:
    """The bars as a table."""
    lines = ["| what | bar | measured | |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {b.what} | {b.wanted} | {b.found} | {'met' if b.met else 'missed'} |" for b in bars)]
    )


def main() -> None:
    """Read the results and write the table."""
    bars: list[Bar] = []
    for name, reader in (("1b-tmpfs-warm", of_comparison), ("scaling", of_scaling)):
        file = RESULTS / f"{name}.json"
        if file.exists():
            bars += reader(json.loads(file.read_text()))
    put_between_markers(DOCUMENT, "bars", text(bars))
    print(text(bars))


if __name__ == "__main__":
    main()
