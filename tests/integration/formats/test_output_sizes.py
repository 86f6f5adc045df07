"""The sizes of an output in other formats that `plan` shows are those of merges into these formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.planning import plan
from mergeloom.io.units import data_size
from mergeloom.report.plan import plan_text
from tests.support.adapters.files import write_lora
from tests.support.models import quantized, tiny_llama, write_checkpoint
from tests.support.models.shapes import llama
from tests.support.plans import linear

WRITABLE = (
    *("fp8 blocks", "fp8 blocks, bf16 scales", "fp8 blocks, e8m0 scales", "fp8 blocks, byte scales"),
    *("fp8 rows", "fp8 rows, a list of scales"),
)


def size(recipe: dict[str, Any]) -> int:
    return int(plan(recipe).output_dict()["bytes"])


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_sizes_are_those_of_other_plans(tmp_path: Path, form: str) -> None:
    models = [quantized.write_wide(tmp_path, form, seed) for seed in (1, 2)]
    copied = {"merge_method": "passthrough", "models": [{"model": str(models[0])}]}
    expected = {
        "tensors": 2,
        "as_stored": size(copied),
        "bfloat16": size(linear(*models, dtype="bfloat16")),
        "fp8_blocks": size(linear(*models, out_dtype="fp8_blocks")),
        "stored_format_is_written": form in WRITABLE,
    }
    for more in ({}, {"dtype": "bfloat16"}, {"out_dtype": "fp8_blocks"}):
        found = plan(linear(*models, **more)).to_dict()["quantized"]
        assert found.pop("stored_format").startswith(form.split()[0].upper())
        assert found == expected, more
    assert plan(copied).to_dict()["quantized"]["as_stored"] == expected["as_stored"]


@pytest.mark.parametrize(
    ("out_dtype", "marked"), [("bfloat16", "bfloat16"), ("fp8_blocks", "fp8_blocks"), (None, "bfloat16")]
)
def test_the_table_marks_what_the_plan_writes(tmp_path: Path, out_dtype: str | None, marked: str) -> None:
    models = [quantized.write_wide(tmp_path, "int4", seed) for seed in (1, 2)]
    planned = plan(linear(*models, **({} if out_dtype is None else {"out_dtype": out_dtype})))
    sizes = planned.output_sizes
    assert sizes is not None
    section = plan_text(planned).split("Output in other formats\n")[1].split("\n\n")[0]
    rows = {line.split()[0]: line for line in section.splitlines()[1:]}
    assert rows.keys() == {"same", "fp8_blocks", "bfloat16"}
    assert "INT4, which can only be copied" in rows["same"]
    for name, nbytes in (("same", sizes.as_stored), ("fp8_blocks", sizes.fp8_blocks), ("bfloat16", sizes.bfloat16)):
        assert f"{data_size(nbytes)} " in f"{rows[name]} "
        assert ("this plan" in rows[name]) == (name == marked)


@pytest.mark.parametrize("form", ["fp8 blocks", "fp8 rows", "int4"])
def test_sizes_are_those_of_the_base_without_an_adapter(tmp_path: Path, form: str) -> None:
    base = quantized.write_wide(tmp_path, form, 1)
    shapes = {f"model.layers.{layer}.mlp.down_proj.weight": quantized.WIDE for layer in range(quantized.LAYERS)}
    adapter = write_lora(tmp_path / "a", shapes)
    alone, adapted = (
        {"merge_method": "passthrough", "models": [{"model": reference}]}
        for reference in (f"{base}", f"{base}+{adapter}")
    )
    planned = plan(adapted)
    facts = planned.to_dict()["quantized"]
    assert facts == plan(alone).to_dict()["quantized"]
    assert facts["as_stored"] == size(alone)
    if form in WRITABLE:
        assert size(adapted) == size(alone)
        assert re.search(r"^  same .*  this plan$", plan_text(planned), re.MULTILINE)
    else:
        warning = next(each for each in planned.warnings if "are written in bfloat16" in each)
        norm = 2 * quantized.WIDE[0]  # one vector that is not quantized
        assert f"{data_size(size(adapted) - norm)} instead of {data_size(size(alone) - norm)}" in warning


def test_an_unquantized_merge_has_no_table(tmp_path: Path) -> None:
    models = [write_checkpoint(tmp_path / name, tiny_llama(), fill=None) for name in "ab"]
    planned = plan(linear(*models))
    assert planned.to_dict()["quantized"] is None
    assert "Output in other formats" not in plan_text(planned)


def test_an_unquantized_donor_has_no_format_of_its_own(tmp_path: Path) -> None:
    model = llama(layers=2, hidden=256, intermediate=256, heads=4, kv_heads=2, vocabulary=64)
    models = [write_checkpoint(tmp_path / name, model, fill=None) for name in "ab"]
    planned = plan(linear(*models, out_dtype="fp8_blocks"))
    found = planned.to_dict()["quantized"]
    assert found["fp8_blocks"] == size(linear(*models, out_dtype="fp8_blocks"))
    assert found["bfloat16"] == found["as_stored"] == size(linear(*models))
    assert found["stored_format"] is None
    assert found["tensors"] == 14
    assert "\n  same " not in plan_text(planned)
