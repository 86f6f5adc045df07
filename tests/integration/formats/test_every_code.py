"""Every code with every scale decodes to the value of the format's own library, at partial blocks too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import mergeloom
from tests.support.models import quantized, write_checkpoint
from tests.support.outputs import read_model

MODULE = "model.layers.0.mlp.up_proj"
Made = tuple[Mapping[str, Tensor], Mapping[str, Any], Tensor]
"""Stored tensors by the end of their names, the description in config.json, and the reference's values in float32."""


def permutations(count: int, of: int, seed: int = 0) -> Tensor:
    """Rows that each have all numbers below `of`, in an order of their own."""
    return torch.rand(count, of, generator=torch.Generator().manual_seed(seed)).argsort(1)


def all_bytes() -> Tensor:
    return torch.arange(256, dtype=torch.uint8)


def all_scales(dtype: torch.dtype, count: int | None = None) -> Tensor:
    """The numbers of a dtype: all of them if they have 8 or 16 bits, otherwise special ones and random bits."""
    if dtype.itemsize == 1:
        return all_bytes().view(dtype)
    if dtype.itemsize == 2:
        found = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        return found if count is None else found[:: len(found) // count]
    special = [0.0, -0.0, 1.0, -1.5, 2.0**-149, 2.0**-127, 2.0**-126, 3.4028234663852886e38, torch.inf, torch.nan]
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, ((count or 1 << 12) - len(special),), dtype=torch.int32,
                         generator=torch.Generator().manual_seed(1))  # fmt: skip
    return torch.cat([torch.tensor(special), bits.view(dtype)])


def numbers(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents plus 127, and 255 is NaN (OCP Microscaling Formats 1.0)."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).to(torch.float32)


def fp8_blocks(codes: torch.dtype, scale: torch.dtype) -> Made:
    """256 blocks of 16 x 16 that have all codes, and blocks at the edges of which 5 rows or 7 columns are left."""
    stored = all_scales(scale, 256)
    edge = torch.zeros(17, 17, dtype=stored.dtype)
    grid = edge.view(torch.uint8) if stored.dtype.itemsize == 1 else edge
    whole = stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored
    grid[:16, :16] = whole.view(16, 16)
    grid[16, :16], grid[:16, 16], grid[16, 16] = whole[60:76], whole[100:116], whole[130]
    grid = grid.view(stored.dtype)
    blocks = permutations(17 * 17, 256).to(torch.uint8).view(17, 17, 16, 16).transpose(1, 2)
    matrix = blocks.reshape(272, 272)[: 256 + 5, : 256 + 7].contiguous().view(codes)
    expanded = numbers(grid).repeat_interleave(16, 0).repeat_interleave(16, 1)[: 256 + 5, : 256 + 7]
    section = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    return {"weight": matrix, "weight_scale_inv": grid}, section, matrix.to(torch.float32) * expanded


def fp8_rows(scale: torch.dtype) -> Made:
    """A row of all codes for each scale."""
    stored = all_scales(scale)[:, None]
    codes = permutations(len(stored), 256).to(torch.uint8).view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": stored}, {"quant_method": "fbgemm_fp8"}, codes.float() * numbers(stored)


def fp8_tensor() -> Made:
    codes, scale = all_bytes().view(torch.float8_e4m3fn).view(16, 16), torch.tensor(0.0123)
    section = {"quant_method": "modelopt", "quant_algo": "FP8"}
    return {"weight": codes, "weight_scale": scale}, section, codes.to(torch.float32) * scale


def packed_integers(bits: int, scale: torch.dtype) -> Made:
    """A group of all codes for each scale, and a last word that is not full."""
    size = 1 << bits
    scales = all_scales(scale, 1 << 16 if bits == 4 else 1 << 12)
    rows, group = len(scales) // 16, size + 4 if bits == 8 else size
    codes = permutations(len(scales), size)
    codes = torch.cat([codes, codes[:, : group - size]], 1) - size // 2
    shape = (rows, 16 * group)
    words = pack_to_int32(codes.to(torch.int8).reshape(shape), bits)
    stored = {"weight_packed": words, "weight_scale": scales.view(rows, 16), "weight_shape": torch.tensor(shape)}
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    value = unpack_from_int32(words, bits, torch.Size(shape)).float() * numbers(scales).view(
        rows, 16
    ).repeat_interleave(group, 1)
    return stored, quantized.compressed_config("pack-quantized", scheme), value


def int8(scale: torch.dtype) -> Made:
    scales = all_scales(scale, 1 << 12)[:, None]
    codes = permutations(len(scales), 256).to(torch.uint8).view(torch.int8)
    scheme = quantized.INT8_CHANNELS
    arguments = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme))
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    value = compressor.decompress({"weight": codes, "weight_scale": numbers(scales)}, arguments)["weight"]
    return {"weight": codes, "weight_scale": scales}, quantized.compressed_config("int-quantized", scheme), value


def nibbles(groups: int, columns: int) -> Tensor:
    """Groups of all codes of four bits, two in each byte in an order that is not symmetric."""
    codes = torch.cat([permutations(groups, 16, seed) for seed in range(columns // 16)], 1).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def fp4_values(packed: Tensor) -> Tensor:
    """The numbers of compressed-tensors' own unpacking, as float32."""
    return unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)


def mxfp4(ending: str) -> Made:
    """Groups of 32 codes for each of the 256 exponents: compressed-tensors (U8), or DeepSeek-V4's experts (F8_E8M0)."""
    packed, scales = nibbles(256, 32).view(64, 64), all_bytes().view(64, 4)
    value = fp4_values(packed) * numbers(scales).repeat_interleave(32, 1)
    if ending == "scale":
        stored = {"weight": packed.view(torch.int8), "scale": scales.view(torch.float8_e8m0fnu)}
        return stored, {"quant_method": "fp8", "weight_block_size": [128, 128]}, value
    scheme = quantized.FLOAT4 | {"group_size": 32}
    section = quantized.compressed_config("mxfp4-pack-quantized", scheme)
    return {"weight_packed": packed, "weight_scale": scales}, section, value


def nvfp4(name: str) -> Made:
    """Groups of 16 codes for each of the 256 scales in FP8, and a scale of the tensor that divides or multiplies."""
    packed, scales = nibbles(256, 16).view(64, 32), all_bytes().view(torch.float8_e4m3fn).view(64, 4)
    total = torch.tensor([0.00317])
    if name == "weight_scale_2":
        scale = scales.float() * total
        stored = {"weight": packed, "weight_scale": scales, name: total.view(())}
        section: Mapping[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    else:
        scale = scales.float() / total
        stored = {"weight_packed": packed, "weight_scale": scales, name: total}
        section = quantized.compressed_config("nvfp4-pack-quantized", quantized.FLOAT4 | {"group_size": 16})
    return stored, section, fp4_values(packed) * scale.repeat_interleave(16, 1)


MODELS: dict[str, Callable[[], Made]] = {
    **{
        f"FP8 {codes} in blocks, {scale} scales": lambda codes=codes, scale=scale: fp8_blocks(
            getattr(torch, codes), getattr(torch, scale)
        )
        for codes in ("float8_e4m3fn", "float8_e5m2")
        for scale in ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
    },
    "FP8 in rows, F32 scales": lambda: fp8_rows(torch.float32),
    "FP8 in rows, all BF16 scales": lambda: fp8_rows(torch.bfloat16),
    "FP8 with one scale": fp8_tensor,
    "INT4, all BF16 scales": lambda: packed_integers(4, torch.bfloat16),
    "INT4, all F16 scales": lambda: packed_integers(4, torch.float16),
    "INT8 packed, BF16 scales": lambda: packed_integers(8, torch.bfloat16),
    "INT8, F32 scales": lambda: int8(torch.float32),
    "MXFP4 of compressed-tensors": lambda: mxfp4("weight_scale"),
    "MXFP4 of DeepSeek-V4": lambda: mxfp4("scale"),
    "NVFP4 of compressed-tensors": lambda: nvfp4("weight_global_scale"),
    "NVFP4 of ModelOpt": lambda: nvfp4("weight_scale_2"),
}


def decoded(directory: Path, stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The values that a passthrough to float32 writes."""
    model = write_checkpoint(directory / "model", stored, config={"model_type": "x", "num_hidden_layers": 1} | config)
    made = {"merge_method": "passthrough", "models": [{"model": str(model)}], "dtype": "float32"}
    mergeloom.merge(made | {"allow_nonfinite": True}, directory / "out")
    return read_model(directory / "out")


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to the bit, signs of zeros too; a NaN has no sign."""
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int32), expected[number].view(torch.int32))


@pytest.mark.parametrize("form", MODELS)
def test_every_code_has_the_value_of_the_formats_library(tmp_path: Path, form: str) -> None:
    stored, section, value = MODELS[form]()
    tensors = {f"{MODULE}.{ending}": tensor for ending, tensor in stored.items()}
    found = decoded(tmp_path, tensors, {"quantization_config": section})
    assert found.keys() == {f"{MODULE}.weight"}
    assert_same(found[f"{MODULE}.weight"], value)


def test_every_byte_of_gpt_oss_has_the_value_of_transformers(tmp_path: Path) -> None:
    """Each of the 256 exponents with 32 codes; transformers computes 2^128 for 255, which the format defines as NaN."""
    blocks = nibbles(256, 32).view(2, 32, 4, 16)
    scales = all_bytes().view(2, 32, 4)
    value = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    is_nan = (scales == 255).repeat_interleave(32, 2).transpose(1, 2)
    name = "model.layers.0.mlp.experts.down_proj"
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    found = decoded(tmp_path, stored, {"quantization_config": {"quant_method": "mxfp4"}})
    assert found.keys() == {name}
    assert_same(found[name], torch.where(is_nan, torch.nan, value))
