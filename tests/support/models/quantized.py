"""Models in quantized formats, written by the formats' own libraries, and twins that store the decoded values.

Codes and values come from compressed-tensors or from torch's casts. Decoding is in float32: the scales are converted to
float32 before the library multiplies, so its values are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import Tensor

from tests.support.models import write_checkpoint

HIDDEN, INNER, VOCABULARY, LAYERS = 64, 80, 24, 2
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


@dataclass(frozen=True)
class Quantized:
    """A quantized weight.

    Args:
        stored: stored tensors by the end of their names, which follows the module's name.
        value: decoded value in float32.
    """

    stored: Mapping[str, Tensor]
    value: Tensor


Quantize = Callable[[Tensor], Quantized]


def blocks(
    weight: Tensor, rows: int, columns: int, scale: Callable[[Tensor], Tensor] = lambda each: each
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and values of FP8 blocks; the scales are rounded by `scale` first."""
    height, width = weight.shape
    padded = torch.zeros(-(-height // rows) * rows, -(-width // columns) * columns)
    padded[:height, :width] = weight
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    stored = scale(tiles.abs().amax((1, 3)) / LARGEST)
    expanded = stored.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:height, :width]
    codes = (weight / expanded).clamp(-LARGEST, LARGEST).to(FP8)
    return codes, stored, codes.float() * expanded


def fp8_blocks(scale: Callable[[Tensor], Tensor], ending: str = "weight_scale_inv") -> Quantize:
    """DeepSeek-V3: ``weight`` and ``weight_scale_inv`` (README_WEIGHTS.md of the model)."""

    def quantize(weight: Tensor) -> Quantized:
        codes, stored, value = blocks(weight, 32, 48, scale)
        return Quantized({"weight": codes, ending: stored}, value)

    return quantize


def powers_of_two(scales: Tensor) -> Tensor:
    """The next power of two as F8_E8M0."""
    return torch.exp2(torch.ceil(torch.log2(scales))).to(torch.float8_e8m0fnu)


def exponents(scales: Tensor) -> Tensor:
    """The next power of two as a byte that holds its exponent plus 127."""
    return (torch.ceil(torch.log2(scales)) + 127).to(torch.uint8)


def fp8_bytes(weight: Tensor) -> Quantized:
    """Blocks whose scales are bytes that hold exponents: MXFP8."""
    codes, stored, _ = blocks(weight, 32, 48)
    scale = exponents(stored)
    expanded = torch.exp2(scale.float() - 127).repeat_interleave(32, 0).repeat_interleave(48, 1)
    expanded = expanded[: weight.shape[0], : weight.shape[1]]
    codes = (weight / expanded).clamp(-LARGEST, LARGEST).to(FP8)
    return Quantized({"weight": codes, "weight_scale_inv": scale}, codes.float() * expanded)


def fp8_rows(weight: Tensor) -> Quantized:
    """A scale for each row, with an upper bound of the activations' scales: fbgemm (Llama-3.1-405B-FP8)."""
    codes, scale, value = blocks(weight, 1, weight.shape[1])
    return Quantized({"weight": codes, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])}, value)


def fp8_listed_rows(weight: Tensor) -> Quantized:
    """A scale for each row, in a tensor of one dimension."""
    codes, scale, value = blocks(weight, 1, weight.shape[1])
    return Quantized({"weight": codes, "weight_scale": scale.view(-1)}, value)


def fp8_tensor(weight: Tensor) -> Quantized:
    """One scale for the tensor, and a static one for the activations: ModelOpt's FP8."""
    codes, scale, value = blocks(weight, *weight.shape)
    return Quantized({"weight": codes, "weight_scale": scale.view(()), "input_scale": torch.tensor(0.5)}, value)


def compressed(form: str, scheme: Mapping[str, Any], scale_dtype: torch.dtype = torch.bfloat16) -> Quantize:
    """A format of compressed-tensors, written and read by its library."""
    arguments = QuantizationArgs(**scheme)
    compressor = BaseCompressor.get_value_from_registry(form)
    full = QuantizationScheme(targets=["Linear"], weights=arguments)

    def quantize(weight: Tensor) -> Quantized:
        group = scheme.get("group_size") or weight.shape[1]
        largest = weight.view(weight.shape[0], -1, group).abs().amax(-1)
        state = {"weight": weight}
        if form == "mxfp4-pack-quantized":
            state["weight_scale"] = torch.exp2(torch.floor(torch.log2(largest)) - 2)
        elif form == "nvfp4-pack-quantized":
            total = torch.tensor([LARGEST * 6]) / weight.abs().max()
            state |= {"weight_scale": (total * largest / 6).to(FP8).float(), "weight_global_scale": total}
        else:
            state["weight_scale"] = (largest / (2 ** (scheme["num_bits"] - 1) - 0.5)).to(scale_dtype)
        stored = compressor.compress(state, full)
        read = dict(stored)
        if form.startswith(("pack", "int")):
            read["weight_scale"] = read["weight_scale"].float()
        value = compressor.decompress(read, full)["weight"]
        if form == "nvfp4-pack-quantized":  # the compressor multiplies in bfloat16
            codes = unpack_fp4_from_uint8(read["weight_packed"], *weight.shape).float()
            total = read["weight_global_scale"]
            value = dequantize(codes, read["weight_scale"].float(), None, arguments, torch.float32, total)
        return Quantized({name: tensor.detach().contiguous() for name, tensor in stored.items()}, value.detach())

    return quantize


def nvfp4_of_modelopt(weight: Tensor) -> Quantized:
    """ModelOpt's NVFP4: the same numbers as compressed-tensors', but the tensor's scale multiplies."""
    found = NVFP4(weight)
    total = 1 / found.stored["weight_global_scale"]
    codes = found.stored["weight_packed"]
    scales = found.stored["weight_scale"]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[torch.stack([codes & 15, codes >> 4], -1).view(weight.shape).long()]
    value = values * (scales.float() * total).repeat_interleave(16, 1)
    stored = {"weight": codes, "weight_scale": scales, "weight_scale_2": total.view(())}
    return Quantized(stored | {"input_scale": torch.tensor(0.25)}, value)


def fp4_of_deepseek(weight: Tensor) -> Quantized:
    """DeepSeek-V4's experts: the bytes of MXFP4 as I8, and powers of two in ``scale``."""
    found = MXFP4(weight)
    scales = found.stored["weight_scale"].view(torch.float8_e8m0fnu)
    return Quantized({"weight": found.stored["weight_packed"].view(torch.int8), "scale": scales}, found.value)


_GROUPS = {"symmetric": True, "strategy": "group"}
FP8_ROWS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "group_size": 16, **_GROUPS}
INT8_CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT4 = {"num_bits": 4, "type": "float", **_GROUPS}
MXFP4 = compressed("mxfp4-pack-quantized", FLOAT4 | {"group_size": 16})
NVFP4 = compressed("nvfp4-pack-quantized", FLOAT4 | {"group_size": 16, "strategy": "tensor_group"})


def compressed_config(form: str, scheme: Mapping[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(scheme)}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def _blocks_config(**more: Any) -> dict[str, Any]:
    section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 48]}
    return section | more


FORMATS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "fp8 blocks": (fp8_blocks(lambda each: each), _blocks_config()),
    "fp8 blocks, bf16 scales": (fp8_blocks(lambda each: each.to(torch.bfloat16)), _blocks_config()),
    "fp8 blocks, f16 scales": (fp8_blocks(lambda each: each.to(torch.float16)), _blocks_config()),
    "fp8 blocks, e8m0 scales": (fp8_blocks(powers_of_two, "scale"), _blocks_config(scale_fmt="ue8m0")),
    "fp8 blocks, byte scales": (fp8_bytes, _blocks_config(scale_fmt="ue8m0")),
    "fp8 rows": (fp8_rows, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "fp8 rows, a list of scales": (fp8_listed_rows, compressed_config("float-quantized", FP8_ROWS)),
    "fp8 tensor": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "int4": (compressed("pack-quantized", INT4), compressed_config("pack-quantized", INT4)),
    "int8 packed": (
        compressed("pack-quantized", INT8_CHANNELS),
        compressed_config("pack-quantized", INT8_CHANNELS),
    ),
    "int8": (compressed("int-quantized", INT8_CHANNELS), compressed_config("int-quantized", INT8_CHANNELS)),
    "mxfp4": (MXFP4, compressed_config("mxfp4-pack-quantized", FLOAT4 | {"group_size": 16})),
    "nvfp4": (NVFP4, compressed_config("nvfp4-pack-quantized", FLOAT4 | {"group_size": 16})),
    "nvfp4 of modelopt": (nvfp4_of_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


def weights(seed: int) -> dict[str, Tensor]:
    """The weights of a small model by module, in float32, with amplitudes of several octaves."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return values * torch.exp2(torch.randint(-3, 2, (rows, 1), generator=generator).float())

    shapes = {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    return {
        f"model.layers.{layer}.{module}": matrix(*shape) for layer in range(LAYERS) for module, shape in shapes.items()
    }


def write_pair(directory: Path, form: str, seed: int) -> tuple[Path, Path]:
    """Write a model in a format, and its twin that stores the decoded values in float32."""
    quantize, section = FORMATS[form]
    generator = torch.Generator().manual_seed(seed + 1000)
    plain = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator).to(torch.bfloat16),
        "model.norm.weight": torch.randn(HIDDEN, generator=generator).to(torch.bfloat16),
    }
    for layer in range(LAYERS):
        norm = torch.randn(HIDDEN, generator=generator).to(torch.bfloat16)
        plain[f"model.layers.{layer}.input_layernorm.weight"] = norm
    stored, twin = dict(plain), {name: tensor.float() for name, tensor in plain.items()}
    for module, weight in weights(seed).items():
        found = quantize(weight)
        stored |= {f"{module}.{ending}": tensor for ending, tensor in found.stored.items()}
        twin[f"{module}.weight"] = found.value.contiguous()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    label = form.replace(" ", "-").replace(",", "")
    quantized = write_checkpoint(
        directory / f"{label}-{seed}", stored, config=config | {"quantization_config": section}
    )
    return quantized, write_checkpoint(directory / f"{label}-{seed}-values", twin, config=config)


WIDE = (512, 256)
"""Shape of the weights of `write_wide`: complete blocks of 128 x 128."""


def write_wide(directory: Path, form: str, seed: int) -> Path:
    """Write a model of two layers in a format, with one projection in each that is large enough for FP8 blocks."""
    quantize, section = FORMATS[form]
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.norm.weight": torch.randn(WIDE[0], generator=generator).to(torch.bfloat16)}
    for layer in range(LAYERS):
        stored = quantize(torch.randn(*WIDE, generator=generator)).stored
        tensors |= {f"model.layers.{layer}.mlp.down_proj.{ending}": tensor for ending, tensor in stored.items()}
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}
    label = form.replace(" ", "-").replace(",", "")
    return write_checkpoint(directory / f"{label}-{seed}", tensors, config=config | {"quantization_config": section})
