"""FP8 outputs like their donors, for shapes at the edges of each layout: rows, columns, partial blocks, experts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergeloom
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.merges.resumable import OPTIONS, interrupt, run
from tests.support.merges.small import make_blocks_small
from tests.support.models import quantized, write_checkpoint
from tests.support.outputs import digests, read_model
from tests.support.plans import linear, weighted_mean

FP8 = torch.float8_e4m3fn
SHAPES = {
    "self_attn.q_proj.weight": (1, 80),
    "self_attn.k_proj.weight": (1, 1),
    "self_attn.o_proj.weight": (80, 1),
    "mlp.up_proj.weight": (80, 64),
    "mlp.down_proj.weight": (3, 5),
    "mlp.gate_proj.weight": (128, 128),
    "mlp.experts.gate_up_proj": (3, 70, 96),
    "mlp.experts.down_proj": (3, 96, 35),
    "mlp.experts.shared_proj": (2, 1, 7),
}
LAYERS = 2
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@dataclass(frozen=True)
class Layout:
    """A layout of codes and scales.

    Args:
        section: description in config.json.
        ending: what follows the name of a weight in that of its scales; ``.scale`` replaces ``.weight``.
        block: rows and columns of a block; None for rows.
        scales: dtype of the scales in the file.
        powers: whether they are powers of 2.
        listed: whether the scales of rows have no dimension for columns.
    """

    section: dict[str, Any]
    ending: str = "_scale_inv"
    block: tuple[int, int] | None = (32, 48)
    scales: torch.dtype = torch.float32
    powers: bool = False
    listed: bool = False

    def of(self, name: str) -> str:
        """The name of a weight's scales."""
        if self.ending == ".scale" and name.endswith(".weight"):
            return name.removesuffix(".weight") + self.ending
        return name + ("_scale" if self.ending == ".scale" else self.ending)

    def encode(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and decoded values of a matrix or a stack."""
        rows, columns = self.block or (1, value.shape[-1])
        *stack, height, width = value.shape
        high, wide = -(-height // rows), -(-width // columns)
        padded = torch.zeros(*stack, high * rows, wide * columns)
        padded[..., :height, :width] = value
        largest = padded.view(*stack, high, rows, wide, columns).abs().amax((-3, -1))
        scales = torch.where(largest == 0, 1.0, largest.clamp(min=1e-12) / 448)
        if self.powers or self.scales.itemsize == 1:
            scales = torch.exp2(torch.ceil(torch.log2(scales.double()))).float()
        stored = scales.to(torch.float8_e8m0fnu) if self.scales.itemsize == 1 else scales.to(self.scales)
        expanded = stored.float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :height, :width]
        codes = (value / expanded).clamp(-448, 448).to(FP8)
        written = stored.view(self.scales) if self.scales.itemsize == 1 else stored
        return codes, written.squeeze(-1) if self.listed else written, codes.float() * expanded


ROWS = quantized.compressed_config("float-quantized", quantized.FP8_ROWS)
GROUPS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
LAYOUTS = {
    "blocks": Layout(BLOCKS | {"weight_block_size": [32, 48]}),
    "blocks larger than tensors": Layout(BLOCKS | {"weight_block_size": [128, 128]}, block=(128, 128)),
    "blocks, scales in BF16": Layout(BLOCKS | {"weight_block_size": [32, 48]}, scales=torch.bfloat16),
    "blocks, powers of two in F32": Layout(BLOCKS | {"weight_block_size": [32, 48], "scale_fmt": "ue8m0"}, powers=True),
    "blocks, exponents in F8_E8M0": Layout(
        BLOCKS | {"weight_block_size": [32, 48], "scale_fmt": "ue8m0"}, ".scale", scales=torch.float8_e8m0fnu
    ),
    "blocks, exponents in U8": Layout(
        BLOCKS | {"weight_block_size": [32, 48], "scale_fmt": "ue8m0"}, scales=torch.uint8
    ),
    "groups, exponents in U8": Layout(
        quantized.compressed_config("mxfp8-quantized", GROUPS), "_scale", (1, 32), torch.uint8
    ),
    "rows": Layout({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "_scale", None),
    "rows, scales in BF16": Layout(ROWS, "_scale", None, torch.bfloat16),
    "rows, a list of scales": Layout(ROWS, "_scale", None, listed=True),
}


def write(directory: Path, layout: Layout, seed: int) -> tuple[Path, Path]:
    """Write a model in a layout, and its twin in float32."""
    generator = torch.Generator().manual_seed(seed)
    norm = torch.randn(64, generator=generator).bfloat16()
    stored, twin = {"model.norm.weight": norm}, {"model.norm.weight": norm.float()}
    for layer in range(LAYERS):
        for rest, shape in SHAPES.items():
            name = f"model.layers.{layer}.{rest}"
            octaves = torch.randint(-4, 4, (*shape[:-1], 1), generator=generator)
            codes, scales, value = layout.encode(torch.ldexp(torch.randn(shape, generator=generator), octaves))
            stored |= {name: codes, layout.of(name): scales}
            twin[name] = value
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}
    described = config | {"quantization_config": layout.section}
    model = write_checkpoint(directory / f"model{seed}", stored, config=described)
    return model, write_checkpoint(directory / f"twin{seed}", twin, config=config)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def check(found: dict[str, Tensor], layout: Layout, values: dict[str, Tensor], *, only: str = "") -> None:
    """Check that the tensors with `only` in their names are stored in a layout, and others are in bfloat16."""
    for name, value in values.items():
        if name == "model.norm.weight" or only not in name:
            assert torch.equal(found[name], value.bfloat16()), name
            assert layout.of(name) not in found
            continue
        codes, scales, _ = layout.encode(value)
        made = found[layout.of(name)]
        assert (made.dtype, made.shape, as_bytes(made)) == (scales.dtype, scales.shape, as_bytes(scales)), name
        assert as_bytes(found[name]) == as_bytes(codes), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_shape_is_stored_like_the_donors(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    pairs = [write(tmp_path, layout, seed) for seed in (1, 2)]
    models, twins = zip(*pairs, strict=True)
    mergeloom.merge(linear(*twins, dtype="float32"), tmp_path / "values")
    planned = plan(linear(*models, out_dtype="same"))
    assert not planned.warnings
    mergeloom.merge(planned, tmp_path / "same")
    values = read_model(tmp_path / "values")
    check(read_model(tmp_path / "same"), layout, values)
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert config["quantization_config"] == layout.section
    parameters = sum(value.numel() for value in values.values())
    assert mergeloom.inspect(tmp_path / "same").to_dict()["parameters"] == parameters
    assert planned.output_dict()["parameters"] == parameters
    mergeloom.merge(linear(tmp_path / "same", dtype="float32"), tmp_path / "decoded")
    for tensor, value in read_model(tmp_path / "decoded").items():
        if tensor != "model.norm.weight":
            assert torch.equal(value, layout.encode(values[tensor])[2])


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_alone_are_stored_like_the_donors(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is in bfloat16 and listed; a resumed merge is the same."""
    make_blocks_small(monkeypatch)
    layout = LAYOUTS[name]
    pairs = [write(tmp_path, layout, seed) for seed in (3, 4)]
    models, twins = zip(*pairs, strict=True)
    run(linear(*twins, dtype="float32"), tmp_path / "values")
    recipe = linear(*models, out_dtype=[{"filter": "experts", "value": "same"}, {"value": "bfloat16"}])
    run(recipe, tmp_path / "whole")
    assert interrupt(recipe, tmp_path / "out", 1)
    run(recipe, tmp_path / "out", replace(OPTIONS, threads=2))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    check(read_model(tmp_path / "out"), layout, read_model(tmp_path / "values"), only="experts")
    key = "ignore" if "ignore" in layout.section else "modules_to_not_convert"
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    plain = {f"model.layers.{layer}.{rest}" for layer in range(LAYERS) for rest in SHAPES if "experts" not in rest}
    assert set(section.pop(key)) == {each.removesuffix(".weight") for each in plain} | set(layout.section.get(key, ()))
    assert section == {name: value for name, value in layout.section.items() if name != key}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("rows, a list of scales", "rows, scales in F32"),
        ("rows, scales in F32", "rows, a list of scales"),
        ("blocks, exponents in U8", "blocks, exponents in F8_E8M0"),
        ("blocks, exponents in F8_E8M0", "blocks, exponents in U8"),
        ("blocks, powers of two in F32", "blocks, exponents in U8"),
    ],
)
def test_what_another_layout_contributes_is_stored_like_the_donors(tmp_path: Path, first: str, second: str) -> None:
    """Bytes that mean the same under another dtype, or in another shape, are not copied as they are."""
    layout, other = (
        LAYOUTS.get(name) or replace(LAYOUTS["rows, a list of scales"], listed=False) for name in (first, second)
    )
    (donor, _), (model, twin) = (write(tmp_path / each.ending, each, seed) for seed, each in enumerate((layout, other)))
    mergeloom.merge(weighted_mean({donor: 0.0, model: 1.0}, out_dtype="same"), tmp_path / "out")
    found = read_model(tmp_path / "out")
    found["model.norm.weight"] = found["model.norm.weight"].bfloat16()
    check(found, layout, read_model(twin))


def test_a_single_scale_for_several_blocks_is_an_error(tmp_path: Path) -> None:
    """It is one for the tensor only where config.json has no blocks."""
    layout = LAYOUTS["blocks"]
    model, _ = write(tmp_path, layout, 1)
    tensors, config = read_model(model), json.loads((model / "config.json").read_text())
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    damaged = write_checkpoint(tmp_path / "damaged", tensors, config=config)
    message = r"weight_scale_inv of shape \[1, 1\] does not fit .*\[80, 64\].*weight_block_size\), which need \[3, 2\]"
    with pytest.raises(CheckpointError, match=message):
        mergeloom.plan(linear(damaged))
