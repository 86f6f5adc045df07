"""Merges that are written as FP8 blocks: codes and scales equal those of an independent encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergeloom
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from mergeloom.io.units import data_size
from mergeloom.report.explain import explain
from mergeloom.report.plan import plan_sections
from mergeloom.report.sections import plain
from mergeloom.report.tensors.sources import sources_section
from tests.support.models import quantized
from tests.support.outputs import digests, read_model

WRITTEN: dict[str, tuple[str, int | None, Callable[[Tensor], Tensor]]] = {
    "fp8 blocks": ("weight_scale_inv", 32, lambda each: each),
    "fp8 blocks, bf16 scales": ("weight_scale_inv", 32, lambda each: each.to(torch.bfloat16)),
    "fp8 blocks, e8m0 scales": ("scale", 32, quantized.powers_of_two),
    "fp8 blocks, byte scales": ("weight_scale_inv", 32, quantized.powers_of_two),
    "fp8 rows": ("weight_scale", None, lambda each: each),
    "fp8 rows, a list of scales": ("weight_scale", None, lambda each: each),
}
"""By format: the name of the scales, the rows of a block (None for a row each), and how scales are rounded."""


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def linear(models: list[Path], **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": entries} | more


def ties(models: list[Path], **more: Any) -> dict[str, Any]:
    made = linear(models, **more) | {"merge_method": "ties", "base_model": str(models[0])}
    return made | {"parameters": {"density": 0.5}}


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("make", [linear, ties])
def test_codes_and_scales_equal_those_of_the_reference(
    tmp_path: Path, form: str, make: Callable[..., dict[str, Any]]
) -> None:
    """The values are those of a merge of decoded models to float32; the test divides, clamps and casts them."""
    ending, rows, rounded = WRITTEN[form]
    pairs = [quantized.write_pair(tmp_path, form, seed) for seed in (1, 2, 3)]
    mergeloom.merge(make([model for model, _ in pairs]), tmp_path / "out")
    mergeloom.merge(make([values for _, values in pairs], dtype="float32"), tmp_path / "values")
    found, values = read_model(tmp_path / "out"), read_model(tmp_path / "values")
    stored = read_model(pairs[0][0])
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()
    }
    for module in quantized.weights(1):
        value = values[f"{module}.weight"]
        codes, scales, _ = quantized.blocks(value, rows or 1, 48 if rows else value.shape[1], rounded)
        assert as_bytes(found[f"{module}.{ending}"]) == as_bytes(scales), module
        assert torch.equal(found[f"{module}.weight"].view(torch.uint8), codes.view(torch.uint8)), module
    configs = [json.loads((each / "config.json").read_text()) for each in (tmp_path / "out", pairs[0][0])]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("form", [*WRITTEN, "int4"])
@pytest.mark.parametrize("dtype", [{}, {"dtype": "bfloat16"}, {"out_dtype": "float16"}, {"out_dtype": "fp8_blocks"}])
def test_explain_marks_the_base_whatever_the_output_is_stored_as(
    tmp_path: Path, form: str, dtype: dict[str, Any]
) -> None:
    models = [quantized.write_wide(tmp_path, form, seed) for seed in (1, 2, 3)]
    planned = plan(ties(models, **dtype), options=Options(device="cpu", survival=True))
    explained = {name: explain(planned, name) for name in planned.built.graph.outputs.names}
    merged = {name: found for name, found in explained.items() if found.how == "merge"}
    assert {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)} <= merged.keys()
    for name, found in merged.items():
        assert [(each.model, each.base) for each in found.sources] == [
            (str(model), model == models[0]) for model in models
        ], name
        models_in_table = sources_section(found.sources).grid.rows  # type: ignore[union-attr]
        assert [row[0] for row in models_in_table if row[0]] == [f"{models[0]} (base)", *map(str, models[1:])], name


def test_slerp_is_within_half_a_step_of_float64(tmp_path: Path) -> None:
    pairs = [quantized.write_pair(tmp_path, "fp8 blocks", seed) for seed in (1, 2)]
    made = linear([model for model, _ in pairs]) | {"merge_method": "slerp", "base_model": str(pairs[0][0])}
    mergeloom.merge(made | {"parameters": {"t": 0.3}}, tmp_path / "out")
    found = read_model(tmp_path / "out")
    first, second = (read_model(values) for _, values in pairs)
    for module in quantized.weights(1):
        a, b = (values[f"{module}.weight"].double() for values in (first, second))
        angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
        value = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
        scales = found[f"{module}.weight_scale_inv"].double().repeat_interleave(32, 0).repeat_interleave(48, 1)
        scales = scales[: value.shape[0], : value.shape[1]]
        decoded = found[f"{module}.weight"].double() * scales
        half = torch.maximum(value.abs() * 2.0**-4, scales * 2.0**-10)
        assert ((decoded - value).abs() <= half * (1 + 1e-5)).all()


def test_a_dtype_decodes_and_a_filter_list_chooses(tmp_path: Path) -> None:
    models = [quantized.write_pair(tmp_path, "fp8 blocks", seed)[0] for seed in (1, 2)]
    mergeloom.merge(linear(models, dtype="bfloat16"), tmp_path / "plain")
    assert {tensor.dtype for tensor in read_model(tmp_path / "plain").values()} == {torch.bfloat16}
    chosen = [{"filter": "self_attn", "value": "bfloat16"}, {"value": "same"}]
    mergeloom.merge(linear(models, out_dtype=chosen), tmp_path / "mixed")
    found = read_model(tmp_path / "mixed")
    section = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert section["modules_to_not_convert"] == [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    for layer in range(2):
        assert found[f"model.layers.{layer}.self_attn.o_proj.weight"].dtype == torch.bfloat16
        assert f"model.layers.{layer}.self_attn.o_proj.weight_scale_inv" not in found
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


UNWRITTEN = {
    "int4": ("INT4", "config_groups.group_0.weights", ""),
    "int8": ("INT8", "config_groups.group_0.weights", ""),
    "mxfp4": ("MXFP4", "config_groups.group_0.weights", ""),
    "nvfp4 of modelopt": ("NVFP4", "quant_algo", ""),
    "fp8 tensor": ("FP8 tensor", "quant_algo", ""),
    "fp8 blocks, f16 scales": ("FP8 blocks", "weight_block_size", " with codes in F8_E4M3 and scales in F16"),
}
"""By format, what an error calls it, the key of quantization_config that describes it, and why it isn't written."""


@pytest.mark.parametrize("form", UNWRITTEN)
def test_same_is_refused_for_formats_that_are_not_written(tmp_path: Path, form: str) -> None:
    models = [quantized.write_wide(tmp_path, form, seed) for seed in (1, 2)]
    label, key, why = UNWRITTEN[form]
    with pytest.raises(CheckpointError) as caught:
        mergeloom.plan(linear(models, out_dtype="same"))
    elements = 2 * 512 * 256
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in read_model(models[0]).items()
        if name != "model.norm.weight"
    )
    plain, blocks = data_size(2 * elements), data_size(elements + 4 * elements // 128**2)
    assert str(caught.value) == (
        f"tensor model.layers.0.mlp.down_proj.weight of {models[0]} is stored in the format {label} (config.json: "
        f"quantization_config.{key}), which mergeloom reads but does not write{why}, and out_dtype `same` needs it. "
        f"Set out_dtype: bfloat16 ({plain}) or out_dtype: fp8_blocks ({blocks}) for the 2 tensors in such formats "
        f"({data_size(stored)} as stored), for some of them with `filter`"
    )


def test_an_intermediate_stage_that_asks_for_same_is_refused(tmp_path: Path) -> None:
    """It stores no format, so the alternative is neither, and all quantized tensors count."""
    models = [quantized.write_wide(tmp_path, "fp8 blocks", seed) for seed in (1, 2)]
    first = linear(models, out_dtype="same") | {"name": "first"}
    with pytest.raises(CheckpointError) as caught:
        mergeloom.plan([first, linear([Path("first"), models[1]])])
    assert "an intermediate stage does not write" in str(caught.value)
    assert f"Set out_dtype: bfloat16 ({data_size(4 * 512 * 256)}) for the 2 tensors" in str(caught.value)


def test_the_alternatives_to_a_4_bit_format_have_their_sizes(tmp_path: Path) -> None:
    """An error names them where `same` asks for the format, and the default warns with the same sizes."""
    models = [quantized.write_wide(tmp_path, "int4", seed) for seed in (1, 2)]
    elements = 2 * 512 * 256
    plain, blocks = data_size(2 * elements), data_size(elements + 4 * elements // 128**2)
    assert plain != blocks
    with pytest.raises(CheckpointError, match="does not write, and out_dtype `same` needs it") as caught:
        mergeloom.plan(linear(models, out_dtype="same"))
    assert f"out_dtype: bfloat16 ({plain}) or out_dtype: fp8_blocks ({blocks}) for the 2 tensors" in str(caught.value)
    (warning,) = [each for each in plan(linear(models)).warnings if "are written in bfloat16" in each]
    assert f"are written in bfloat16: {plain} instead of " in warning
    assert f"or out_dtype: fp8_blocks ({blocks})" in warning
    mergeloom.merge(linear(models, out_dtype="fp8_blocks"), tmp_path / "out")
    written = sum(tensor.numel() * tensor.element_size() for tensor in read_model(tmp_path / "out").values())
    assert written == elements + 4 * elements // 128**2 + 2 * 512


def test_an_intermediate_stage_keeps_values(tmp_path: Path) -> None:
    """The second stage merges the values of the first one, which are not rounded to FP8."""
    pairs = [quantized.write_pair(tmp_path, "fp8 blocks", seed) for seed in (1, 2, 3)]
    for column, name in ((0, "out"), (1, "values")):
        models = [pair[column] for pair in pairs]
        first = linear(models[:2]) | {"name": "first"}
        last = {"merge_method": "linear", "models": [
            {"model": each, "parameters": {"weight": 0.5}} for each in ("first", str(models[2]))]}  # fmt: skip
        last["dtype"] = "float32"
        mergeloom.merge([first, last], tmp_path / name)
    found, expected = read_model(tmp_path / "out"), read_model(tmp_path / "values")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("last_dtype", [{}, {"out_dtype": "same"}])
def test_the_last_stage_is_stored_like_its_donor(tmp_path: Path, last_dtype: dict[str, Any]) -> None:
    """Its codes are those of the unrounded values of the stage before it."""
    pairs = [quantized.write_pair(tmp_path, "fp8 blocks", seed) for seed in (1, 2, 3)]
    for column, name, more in ((0, "out", last_dtype), (1, "values", {"dtype": "float32"})):
        models = [pair[column] for pair in pairs]
        first = linear(models[:2]) | {"name": "first"}
        last = linear([models[2], Path("first")]) | more
        mergeloom.merge([first, last], tmp_path / name)
    found, values = read_model(tmp_path / "out"), read_model(tmp_path / "values")
    assert len(found) == len(read_model(pairs[2][0]))
    for module in quantized.weights(1):
        codes, scales, _ = quantized.blocks(values[f"{module}.weight"], 32, 48)
        assert torch.equal(found[f"{module}.weight_scale_inv"], scales)
        assert torch.equal(found[f"{module}.weight"].view(torch.uint8), codes.view(torch.uint8))


def test_planned_bytes_are_executed_for_any_budget(tmp_path: Path) -> None:
    models = [quantized.write_pair(tmp_path, "fp8 blocks", seed)[0] for seed in (1, 2)]
    plan = mergeloom.plan(linear(models))
    planned = plan.to_dict()
    inspected = mergeloom.inspect(models[0]).to_dict()
    assert planned["output"]["parameters"] == inspected["parameters"]
    assert "6 by FP8 encoding of linear of FP8 blocks, 4 by linear" in plain(plan_sections(plan))
    result = mergeloom.merge(linear(models), tmp_path / "out")
    smallest = mergeloom.merge(linear(models), tmp_path / "small", max_ram=planned["minimum_ram"] + (64 << 20))
    for measured in (result.measured, smallest.measured):
        assert measured.bytes_written == planned["bytes_written"]
        assert measured.bytes_read == planned["bytes_read"]
    assert digests(tmp_path / "out") == digests(tmp_path / "small")


@pytest.mark.parametrize("out_dtype", [None, "same"])
def test_what_only_one_model_contributes_is_copied_or_stored_like_the_donors(
    tmp_path: Path, out_dtype: str | None
) -> None:
    """Codes of the donor's format are copied exactly; those of a model with other scales get the donor's."""
    donor, alike = (quantized.write_pair(tmp_path, "fp8 blocks", seed)[0] for seed in (1, 2))
    more = {} if out_dtype is None else {"out_dtype": out_dtype}
    other, values = quantized.write_pair(tmp_path, "fp8 blocks, e8m0 scales", 3)
    for model, name in ((alike, "alike"), (other, "other")):
        pairs = ((donor, 0.0), (model, 1.0))
        models = [{"model": str(each), "parameters": {"weight": weight}} for each, weight in pairs]
        mergeloom.merge({"merge_method": "linear", "models": models} | more, tmp_path / name)
    found, stored = read_model(tmp_path / "alike"), read_model(alike)
    for module in quantized.weights(1):
        for ending in ("weight", "weight_scale_inv"):
            name = f"{module}.{ending}"
            assert torch.equal(found[name].view(torch.uint8), stored[name].view(torch.uint8)), name
    found, decoded = read_model(tmp_path / "other"), read_model(values)
    for module in quantized.weights(1):
        codes, scales, _ = quantized.blocks(decoded[f"{module}.weight"], 32, 48)
        assert torch.equal(found[f"{module}.weight_scale_inv"], scales)
        assert torch.equal(found[f"{module}.weight"].view(torch.uint8), codes.view(torch.uint8))
        assert f"{module}.scale" not in found
