"""Measures what rounding keeps of a change on a real model: a published fine-tune of a sentence encoder.

    python -m benchmarks.compute.survival

The base is all-MiniLM-L6-v2 with the matrices of its layers in FP8, in blocks of 128 x 128 or with a scale for each
row. The table has the share of the change of these matrices that is left, by the weight of the fine-tune
(task_arithmetic), when the merge is stored like the base and in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import mergeloom
from mergeloom.engine.run.survival.shares import TensorShare, by_group
from tests.support.models.encoder import fine_tuned_encoder_dir
from tests.support.survival.fp8_encoder import write_fp8_encoder

WRITERS = {"FP8 blocks": "mergeloom", "FP8 rows": "compressed-tensors, rows"}
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)
GROUPS = ("attention", "MLP")


def shares(base: Path, weight: float, out: Path, names: Collection[str] = (), **more: Any) -> tuple[TensorShare, ...]:
    """The shares of the matrices of a merge.

    Args:
        base: base model.
        weight: weight of the fine-tune.
        out: output directory.
        names: tensors to compare; all if empty.
        more: further keys of the recipe.
    """
    entries = [{"model": str(fine_tuned_encoder_dir()), "parameters": {"weight": weight}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries, **more}
    found = mergeloom.merge(recipe, out, survival=bool(names)).shares
    return tuple(each for each in found if not names or each.tensor in names)


def cells(found: Sequence[TensorShare]) -> list[str]:
    """The share of each group, and the lowest one of a tensor, as percentages."""
    groups = by_group(found)
    least = min(each.share for each in found)
    return [f"{100 * share:.1f}%" for share in (*(groups[group][0] for group in GROUPS), least)]


def main() -> None:
    """Print the table."""
    print("| stored as | weight | attention | MLP | lowest tensor | bfloat16: attention | MLP | lowest tensor |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for form, writer in WRITERS.items():
            base = write_fp8_encoder(Path(directory, writer), writer)
            for weight in WEIGHTS:
                outs = [Path(directory, f"{writer} {weight} {each}") for each in ("same", "bfloat16")]
                same = shares(base, weight, outs[0])
                names = {each.tensor for each in same}
                wide = shares(base, weight, outs[1], names, dtype="bfloat16")
                print(f"| {form} | {weight} | {' | '.join(cells(same) + cells(wide))} |", flush=True)


if __name__ == "__main__":
    main()
