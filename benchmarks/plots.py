"""Draw what benchmarks/results/*.json holds, as docs/benchmarks-*.png, and show the pictures in docs/benchmarks.md.

    python -m benchmarks.plots

It needs matplotlib, which nothing else does.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.compare import DOCUMENT, RESULTS, SIDES
from benchmarks.scaling import PARTS
from benchmarks.tables import cell, put_between_markers

mpl.use("Agg")  # no display

from matplotlib import pyplot as plt

COLOURS = dict(zip(SIDES, ("#1f6feb", "#bc4c00", "#8c959f"), strict=True))


def draw_comparison(results: dict[str, Any], file: Path) -> None:
    """Bars for each method, one a side, on a logarithmic axis; the ratio stands above."""
    runs = results["runs"]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for place, side in enumerate(SIDES):
        found = [(number, cell(runs, method, side)) for number, method in enumerate(methods)]
        bars = [(number + (place - 1) * 0.27, entry) for number, entry in found if entry]
        medians = [entry.median for _, entry in bars]
        spread = [
            [entry.median - min(entry.seconds) for _, entry in bars],
            [max(entry.seconds) - entry.median for _, entry in bars],
        ]
        label = "reading and writing alone" if side == "floor" else side
        axes.bar([x for x, _ in bars], medians, 0.27, yerr=spread, label=label, color=COLOURS[side], capsize=2)
    for number, method in enumerate(methods):
        ours, theirs = cell(runs, method, "mergeloom"), cell(runs, method, "mergekit")
        if ours and theirs:
            ratio = f"{theirs.median / ours.median:.1f}x"
            axes.annotate(ratio, (number, max(theirs.seconds)), (0, 4), textcoords="offset points", ha="center")
    axes.set_yscale("log")
    axes.set_ylabel("seconds, start to end of the process")
    axes.set_xticks(range(len(methods)), methods, rotation=20)
    axes.set_title(results["title"], fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_scaling(results: dict[str, Any], file: Path) -> None:
    """A picture for each series."""
    parts = [part for part in PARTS if part != "start" and any(row["part"] == part for row in results["rows"])]
    figure, all_axes = plt.subplots(1, len(parts), figsize=(3.4 * len(parts), 3.2), layout="constrained", squeeze=False)
    for part, axes in zip(parts, all_axes[0], strict=True):
        rows = [row for row in results["rows"] if row["part"] == part]
        for label in dict.fromkeys(row["label"] for row in rows):
            line = [(row["x"], statistics.median(row["seconds"])) for row in rows if row["label"] == label]
            axes.plot(*zip(*line, strict=True), marker="o", label=label)
        if part in ("planning", "tensors"):
            axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(PARTS[part][1], fontsize=8)
        axes.set_ylabel("seconds")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw everything that was measured."""
    shown = []
    for source in sorted(RESULTS.glob("*.json")):
        results = json.loads(source.read_text())
        file = DOCUMENT.parent / f"benchmarks-{source.stem}.png"
        if isinstance(results, dict) and "runs" in results:
            draw_comparison(results, file)
            shown.append(f"![{results['title']}: seconds by method]({file.name})")
        elif source.stem == "scaling" and any(row["part"] != "start" for row in results["rows"]):
            draw_scaling(results, file)
            shown.append(f"![How time grows with tensors, threads and models]({file.name})")
    put_between_markers(DOCUMENT, "plots", "\n\n".join(shown))


if __name__ == "__main__":
    main()
