"""Tables of results for docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = ("mergeloom", "mergekit", "first", "floor")
"""What is compared; ``first`` is the first edition, commit d163d86."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The runs of one side on one method."""

    seconds: list[float]
    peak_rss: float

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        spread = f" ({min(self.seconds):.2f} to {max(self.seconds):.2f})" if len(self.seconds) > 1 else ""
        return f"{self.median:.2f}{spread}"


def cell(runs: list[dict[str, Any]], method: str, side: str) -> Cell | None:
    """The runs of one side on one method, or None where there are none."""
    chosen = [run for run in runs if (run["method"], run["side"]) == (method, side)]
    if not chosen:
        return None
    return Cell([run["seconds"] for run in chosen], statistics.median(run["peak_rss"] for run in chosen))


def table(results: dict[str, Any]) -> str:
    """The markdown table of one results file: medians, with the smallest and largest of the runs."""
    runs: list[dict[str, Any]] = results["runs"]
    sides = [side for side in SIDES if any(run["side"] == side for run in runs)]
    heads = ["method", *(f"{side}, s" for side in sides)]
    heads += ["times faster"] if {"mergeloom", "mergekit"} <= set(sides) else []
    heads += ["of the floor"] if {"mergeloom", "floor"} <= set(sides) else []
    heads += [f"{side}, peak RSS, GiB" for side in sides if side != "floor"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method in dict.fromkeys(run["method"] for run in runs):
        cells = {side: cell(runs, method, side) for side in sides}
        ours, theirs, floor = (cells.get(side) for side in ("mergeloom", "mergekit", "floor"))
        row = [f"`{method}`", *(str(found or "") for found in cells.values())]
        if "times faster" in heads:
            row.append(f"{theirs.median / ours.median:.1f}" if ours and theirs else "")
        if "of the floor" in heads:
            row.append(f"{ours.median / floor.median:.2f}" if ours and floor else "")
        row += [f"{found.peak_rss / 2**30:.2f}" if found else "" for side, found in cells.items() if side != "floor"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", caption(results)])


def caption(results: dict[str, Any]) -> str:
    """What the table's figures are, what they were measured on, and how quiet the machine was."""
    runs, about = results["runs"], results["machine"]
    counts = sorted(Counter((run["method"], run["side"]) for run in runs).values())
    count = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else str(counts[0])
    stored = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    disturbed = sum(run["others_cpu_seconds"] > 0.1 * run["seconds"] for run in runs)
    flags = {
        side: f"with `{given}`" if (given := results[f"{side}_flags"]) else "with its default flags"
        for side in SIDES[:2]
    }
    sentences = [
        f"{results['title']}.",
        f"Medians of {count} (smallest to largest)." if counts[-1] > 1 else "One run each.",
        f"{about['cpu']}, {about['cores']} cores, {about['ram'] / 2**30:.0f} GiB, Linux {about['kernel']},",
        f"Python {about['python']}, {stored}; {about['date']}.",
        f"mergeloom ran {flags['mergeloom']}, mergekit {flags['mergekit']}."
        if "mergekit" in results["versions"]
        else "",
        f"In {disturbed} of {len(runs)} runs other processes took more than a tenth of a core." if disturbed else "",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def put_between_markers(document: Path, name: str, text: str) -> None:
    """Replace what a document holds between ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = document.read_text() if document.exists() else "# Benchmarks\n\nMade by `make bench`; see `benchmarks/`.\n"
    if begin not in old:
        old += f"\n{begin}\n{end}\n"
    head, _, rest = old.partition(begin)
    _, _, tail = rest.partition(end)
    document.parent.mkdir(exist_ok=True)
    document.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
