"""Measures what rounding keeps of a change on a real model: a published fine-tune of a sentence encoder.

    python -m benchmarks.compute.survival

The base is all-MiniLM-L6-v2 with the matrices of its layers in FP8, in blocks of 128 x 128 or with a scale for each
row. The table has the share of the change of all tensors of a group that is left, by the weight of the fine-tune
(task_arithmetic), when the merge is stored like the base and in bfloat16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import mergeloom
from mergeloom.engine.run.survival.shares import by_group
from tests.support.models.encoder import fine_tuned_encoder_dir
from tests.support.survival.fp8_encoder import write_fp8_encoder

WRITERS = {"FP8 blocks": "mergeloom", "FP8 rows": "compressed-tensors, rows"}
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)
GROUPS = ("attention", "MLP")


def shares(base: Path, weight: float, out: Path, **more: Any) -> list[str]:
    """The share of each group, and the lowest one of a tensor, as percentages."""
    entries = [{"model": str(fine_tuned_encoder_dir()), "parameters": {"weight": weight}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries, **more}
    found = [each for each in mergeloom.merge(recipe, out, survival=True).shares if each.group in GROUPS]
    groups = by_group(found)
    return [f"{100 * share:.1f}%" for share in (*(groups[group][0] for group in GROUPS), min(x.share for x in found))]


def main() -> None:
    """Print the table."""
    print("| stored as | weight | attention | MLP | lowest tensor | bfloat16: attention | MLP | lowest tensor |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for form, writer in WRITERS.items():
            base = write_fp8_encoder(Path(directory, writer), writer)
            for weight in WEIGHTS:
                outs = [Path(directory, f"{writer} {weight} {each}") for each in ("same", "bfloat16")]
                cells = shares(base, weight, outs[0]) + shares(base, weight, outs[1], dtype="bfloat16")
                print(f"| {form} | {weight} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
