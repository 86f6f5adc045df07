"""The values that are found in the headers of quantized checkpoints, and the errors for parts that don't fit."""

from __future__ import annotations

from typing import Any

import pytest

from mergeloom.engine.model.formats.registry import tensors_of, unknown_quantized
from mergeloom.engine.model.logical import LogicalTensor
from mergeloom.errors import CheckpointError
from mergeloom.methods.kernel.access import ALIGNED, Access, BlockRows, Nibbles, Slice
from tests.unit.graph.building import checkpoint

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def blocks(size: Any = (128, 128)) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(size)}}


def compressed(**weights: Any) -> dict[str, Any]:
    full = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": full}}}}


def found(tensors: Tensors, config: dict[str, Any] | None = None) -> dict[str, LogicalTensor]:
    """The values in a checkpoint that are computed from several tensors."""
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    made = checkpoint("x", shapes, {name: dtype for name, (dtype, _) in tensors.items()}, config)
    values = tensors_of(made)
    return {name: value for name in values if isinstance(value := values[name], LogicalTensor)}


CASES: list[tuple[str, Tensors, dict[str, Any] | None, tuple[int, ...], str, list[Access]]] = [
    (
        "blocks, with partial ones",
        {"p.weight": ("F8_E4M3", (576, 7168)), "p.weight_scale_inv": ("F32", (5, 56))},
        blocks(),
        (576, 7168),
        "FP8 blocks",
        [ALIGNED, BlockRows(128, 128)],
    ),
    (
        "blocks of 32 x 32 with powers of two",
        {"p.weight": ("F8_E4M3", (64, 96)), "p.scale": ("F8_E8M0", (2, 3))},
        blocks((32, 32)),
        (64, 96),
        "FP8 blocks",
        [ALIGNED, BlockRows(32, 32)],
    ),
    (
        "experts in one tensor",
        {"e.gate_up_proj": ("F8_E4M3", (4, 300, 128)), "e.gate_up_proj_scale_inv": ("BF16", (4, 3, 1))},
        blocks(),
        (4, 300, 128),
        "FP8 blocks",
        [ALIGNED, BlockRows(128, 128)],
    ),
    (
        "rows",
        {"p.weight": ("F8_E4M3", (64, 96)), "p.weight_scale": ("F32", (64, 1)), "p.input_scale_ub": ("F32", (1,))},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        (64, 96),
        "FP8 channels",
        [ALIGNED, BlockRows(1, 96)],
    ),
    (
        "integers of 4 bits",
        {
            "p.weight_packed": ("I32", (64, 16)),
            "p.weight_scale": ("BF16", (64, 4)),
            "p.weight_shape": ("I32", (2,)),
        },
        compressed(),
        (64, 128),
        "INT4",
        [Nibbles("U4"), BlockRows(1, 32)],
    ),
    (
        "integers of 8 bits in words that are not full",
        {"p.weight_packed": ("I32", (64, 8)), "p.weight_scale": ("F16", (64, 3))},
        compressed(num_bits=8, group_size=10),
        (64, 30),
        "INT8 packed",
        [Slice(0, 32), BlockRows(1, 10)],
    ),
    (
        "MXFP4",
        {"p.weight_packed": ("U8", (64, 48)), "p.weight_scale": ("U8", (64, 3))},
        compressed(type="float"),
        (64, 96),
        "MXFP4",
        [Nibbles("F4"), BlockRows(1, 32)],
    ),
    (
        "NVFP4 of ModelOpt",
        {
            "p.weight": ("U8", (64, 48)),
            "p.weight_scale": ("F8_E4M3", (64, 6)),
            "p.weight_scale_2": ("F32", ()),
            "p.input_scale": ("F32", ()),
        },
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        (64, 96),
        "NVFP4",
        [Nibbles("F4"), BlockRows(1, 16), BlockRows(64, 96)],
    ),
    (
        "experts of DeepSeek-V4",
        {"p.weight": ("I8", (64, 48)), "p.scale": ("F8_E8M0", (64, 3))},
        blocks() | {"expert_dtype": "fp4"},
        (64, 96),
        "MXFP4",
        [Nibbles("F4"), BlockRows(1, 32)],
    ),
]


@pytest.mark.parametrize(("tensors", "config", "shape", "form", "accesses"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_codes_and_scales_are_one_value(
    tensors: Tensors, config: dict[str, Any], shape: tuple[int, ...], form: str, accesses: list[Access]
) -> None:
    ((name, value),) = found(tensors, config).items()
    assert name == ("e.gate_up_proj" if "e.gate_up_proj" in tensors else "p.weight")
    assert (value.shape, value.dtype.name, value.format) == (shape, "BF16", form)
    assert [part.access for part in value.parts] == accesses
    stored = {part.name: part.as_stored for part in (*value.parts, *value.companions)}
    assert {each: (ref.dtype.name, ref.shape) for each, ref in stored.items()} == tensors
    assert all(part.ref.nbytes == part.as_stored.nbytes for part in value.parts)


@pytest.mark.parametrize("dtype", ["float16", "torch.float32", "bfloat16"])
def test_the_nominal_dtype_is_that_of_the_config(dtype: str) -> None:
    tensors: Tensors = {"p.weight": ("F8_E4M3", (64, 96)), "p.weight_scale": ("F32", ())}
    for config in ({"torch_dtype": dtype}, {"text_config": {"dtype": dtype}}):
        expected = {"float16": "F16", "torch.float32": "F32", "bfloat16": "BF16"}[dtype]
        assert found(tensors, config)["p.weight"].dtype.name == expected


FP8: Tensors = {"p.weight": ("F8_E4M3", (300, 256)), "p.weight_scale_inv": ("F32", (3, 2))}
ERRORS: list[tuple[Tensors, dict[str, Any] | None, str]] = [
    (
        FP8 | {"p.weight_scale_inv": ("F32", (2, 2))},
        blocks(),
        r"p\.weight_scale_inv of shape \[2, 2\] does not fit p\.weight of shape \[300, 256\]: config\.json has "
        r"blocks of 128 x 128 \(quantization_config\.weight_block_size\), which need \[3, 2\]",
    ),
    (FP8, None, r"config\.json does not say which elements share a scale \(weight_block_size\)"),
    (FP8, blocks((128,)), r"quantization_config\.weight_block_size is .*: expected rows and columns of a block"),
    (FP8, blocks((0, 128)), r"expected rows and columns of a block, such as \[128, 128\]"),
    (FP8 | {"p.weight_scale_inv": ("I8", (3, 2))}, blocks(), r"p\.weight_scale_inv is I8, which is not a dtype of sca"),
    (
        {"p.weight_packed": ("I32", (64, 16)), "p.weight_scale": ("BF16", (64, 5))},
        compressed(),
        r"p\.weight_scale of shape \[64, 5\] does not fit p\.weight_packed, whose value has the shape \[64, 128\]: "
        r"with a scale for each 32 columns \(config\.json: quantization_config\.config_groups\.g\.weights\) it has the "
        r"shape \[64, 4\]",
    ),
    (
        {
            "p.weight": ("U8", (64, 48)),
            "p.weight_scale": ("F8_E4M3", (64, 6)),
            "p.weight_scale_2": ("F32", (64,)),
        },
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        r"p\.weight_scale_2 is F32 of shape \[64\]: expected one F32 for all of p\.weight",
    ),
]


@pytest.mark.parametrize(("tensors", "config", "message"), ERRORS, ids=range(len(ERRORS)))
def test_parts_that_do_not_fit_are_refused(tensors: Tensors, config: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        found(tensors, config)


@pytest.mark.parametrize(
    ("added", "config"),
    [
        ({"p.weight_zero_point": ("I32", (8, 4))}, compressed(symmetric=False)),
        ({"p.weight_g_idx": ("I32", (128,))}, compressed()),
        ({}, None),  # without a description, the number of bits is a guess
        ({}, compressed(num_bits=3)),
    ],
)
def test_what_has_more_than_codes_and_scales_is_not_decoded(added: Tensors, config: dict[str, Any] | None) -> None:
    tensors: Tensors = {"p.weight_packed": ("I32", (64, 16)), "p.weight_scale": ("BF16", (64, 4))}
    assert not found(tensors | added, config)
    shapes = {name: shape for name, (_, shape) in (tensors | added).items()}
    dtypes = {name: dtype for name, (dtype, _) in (tensors | added).items()}
    made = checkpoint("x", shapes, dtypes, config)
    assert set(unknown_quantized(made, tensors_of(made))) == set(shapes)
