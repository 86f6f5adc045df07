"""Measures what rounding keeps of a change on a real model: a published fine-tune of a sentence encoder.

    python -m benchmarks.compute.survival

The base is all-MiniLM-L6-v2 with the matrices of its layers in FP8, in blocks of 128 x 128 or with a scale for each
row. The fine-tune moves it as sre-embedding-model moves the original: otherwise the changes would have the rounding
errors of the base in them, which are larger. The table has the share of the change of these matrices that is left, by
the weight of the fine-tune (task_arithmetic), when the merge is stored like the base and in bfloat16.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import mergeloom
from mergeloom.engine.run.survival.shares import TensorShare, by_group
from tests.support.models.encoder import encoder_dir, fine_tuned_encoder_dir
from tests.support.outputs import read_model
from tests.support.survival.fp8_encoder import SIZE, write_fp8_encoder
from tests.support.survival.shares import decoded

WRITERS = {"FP8 blocks": "mergeloom", "FP8 rows": "compressed-tensors, rows"}
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)
GROUPS = ("attention", "MLP")


def write_fine_tune(base: Path, block: tuple[int, int] | None, directory: Path) -> Path:
    """Write a model that differs from the decoded base as the fine-tune differs from the original, in float32."""
    shutil.copytree(encoder_dir(), directory)
    original, moved, values = read_model(encoder_dir()), read_model(fine_tuned_encoder_dir()), read_model(base)
    tensors = decoded(values, block)
    found = {name: each for name, each in original.items() if not each.is_floating_point()}
    for name in original.keys() - found.keys():
        found[name] = (tensors[name] + (moved[name].double() - original[name].double())).float().contiguous()
    save_file(found, directory / "model.safetensors", {"format": "pt"})
    return directory


def shares(
    base: Path, fine_tune: Path, weight: float, out: Path, names: Collection[str] = (), **more: Any
) -> tuple[TensorShare, ...]:
    """The shares of the matrices of a merge.

    Args:
        base: base model.
        fine_tune: its fine-tune.
        weight: weight of the fine-tune.
        out: output directory.
        names: tensors to compare; all if empty.
        more: further keys of the recipe.
    """
    entries = [{"model": str(fine_tune), "parameters": {"weight": weight}}]
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
            block = None if "rows" in form else (SIZE, SIZE)
            fine_tune = write_fine_tune(base, block, Path(directory, f"{writer} fine-tune"))
            for weight in WEIGHTS:
                outs = [Path(directory, f"{writer} {weight} {each}") for each in ("same", "bfloat16")]
                same = shares(base, fine_tune, weight, outs[0])
                names = {each.tensor for each in same}
                wide = shares(base, fine_tune, weight, outs[1], names, dtype="bfloat16")
                print(f"| {form} | {weight} | {' | '.join(cells(same) + cells(wide))} |", flush=True)


if __name__ == "__main__":
    main()
