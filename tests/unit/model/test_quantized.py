"""Quantized tensors: detection by name, passthrough without changes, and the error for arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.model.quantized import quantized_tensors
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from mergeloom.io.safetensors.dtypes import DTYPES
from mergeloom.io.safetensors.tensors import TensorRef
from tests.support.models import Shape, deepseek_v3, write_checkpoint
from tests.support.outputs import read_model, same_tensors

CPU = Options(device="cpu", threads=1)
Tensors = dict[str, tuple[str, Shape]]
"""Element type and shape by name."""

NORM: Tensors = {"model.norm.weight": ("BF16", (8,))}
FORMATS: dict[str, Tensors] = {
    "fp8 in blocks": {"p.weight": ("F8_E4M3", (8, 8)), "p.weight_scale_inv": ("F32", (1, 1))},
    "fp8": {"p.weight": ("F8_E4M3", (8, 8)), "p.weight_scale": ("F32", ()), "p.input_scale": ("F32", ())},
    "gptq": {
        "p.qweight": ("I32", (1, 8)),
        "p.qzeros": ("I32", (1, 1)),
        "p.scales": ("F16", (1, 8)),
        "p.g_idx": ("I32", (8,)),
        "p.bias": ("F16", (8,)),
    },
    "packed": {"p.weight_packed": ("I32", (8, 1)), "p.weight_scale": ("BF16", (8, 1)), "p.weight_shape": ("I64", (2,))},
    "nf4": {"p.weight": ("U8", (32, 1)), "p.weight.absmax": ("F32", (1,)), "p.weight.quant_map": ("F32", (16,))},
    "int8": {"p.weight": ("I8", (8, 8)), "p.SCB": ("F32", (8,))},
    "mxfp4": {"p.up_blocks": ("U8", (8, 4)), "p.up_scales": ("U8", (8, 1)), "p.up_bias": ("BF16", (8,))},
    "f4": {"p.weight": ("F4", (8, 8)), "p.weight_scale": ("F8_E8M0", (8, 1))},
}
QUANTIZED = {
    "fp8 in blocks": {"p.weight", "p.weight_scale_inv"},
    "fp8": {"p.weight", "p.weight_scale"},
    "gptq": {"p.qweight", "p.qzeros", "p.scales", "p.g_idx"},
    "packed": {"p.weight_packed", "p.weight_scale", "p.weight_shape"},
    "nf4": {"p.weight", "p.weight.absmax"},
    "int8": {"p.weight", "p.SCB"},
    "mxfp4": {"p.up_blocks"},
    "f4": {"p.weight", "p.weight_scale"},
}


def refs(tensors: Tensors) -> dict[str, TensorRef]:
    """References to tensors that don't exist."""
    return {name: TensorRef(Path("x"), 0, 0, DTYPES[dtype], shape) for name, (dtype, shape) in tensors.items()}


def write(directory: Path, tensors: Tensors, seed: int = 0) -> str:
    """A checkpoint; what has no random values is left as zeros."""
    fill = None if any(dtype in ("F4", "F8_E8M0") for dtype, _ in tensors.values()) else seed
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    return str(
        write_checkpoint(directory, shapes, dtype={name: dtype for name, (dtype, _) in tensors.items()}, fill=fill)
    )


@pytest.mark.parametrize("form", FORMATS)
def test_they_are_found_by_their_names(form: str) -> None:
    assert set(quantized_tensors(refs(FORMATS[form] | NORM))) == QUANTIZED[form]


def test_a_model_as_it_is_has_none() -> None:
    model = deepseek_v3(layers=4, experts=2, fp8=False)
    assert not quantized_tensors(refs({name: ("BF16", shape) for name, shape in model.tensors.items()}))
    others: Tensors = {"logit_scale": ("F32", ()), "layer_scale.weight": ("F32", (4,)), "blocks": ("BF16", (4,))}
    assert not quantized_tensors(refs(others))


@pytest.mark.parametrize("form", FORMATS)
def test_arithmetic_is_refused_at_planning(form: str, tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, FORMATS[form] | NORM, seed) for seed, name in enumerate("ab"))
    models = [{"model": model, "parameters": {"weight": 0.5}} for model in (first, second)]
    passed = {"merge_method": "passthrough", "models": [{"model": first}]}
    recipes = [{"merge_method": "linear", "models": models}, passed | {"parameters": {"scale": 2}}]
    if form not in ("mxfp4", "packed"):  # all their tensors have this dtype already, or are integers
        recipes.append(passed | {"dtype": "bfloat16"})
    for recipe in recipes:
        with pytest.raises(CheckpointError, match=r"is quantized \(.*passthrough without dtype copies"):
            plan(recipe, CPU)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "f4"])
def test_passthrough_copies_them_exactly(form: str, tmp_path: Path) -> None:
    model = write(tmp_path / "a", FORMATS[form] | NORM)
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out", CPU)
    assert same_tensors(read_model(tmp_path / "out"), read_model(tmp_path / "a"))


def test_passthrough_keeps_four_bit_numbers(tmp_path: Path) -> None:
    model = write(tmp_path / "a", FORMATS["f4"] | NORM)
    result = merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out", CPU)
    assert result.plan.to_dict()["output"]["dtypes"] == ["BF16", "F4", "F8_E8M0"]
    assert not result.plan.computes
