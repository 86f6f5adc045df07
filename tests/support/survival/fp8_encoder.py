"""The real sentence encoder with FP8 weights: by our encoder, by torch's casts, and by compressed-tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergeloom.methods.formats.fp8_encoder import FP8_BLOCKS
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.fp8_reference import in_blocks, reference
from tests.support.methods.kernels import run_fused
from tests.support.models.encoder import encoder_dir

SIZE = 128
LARGEST = 448.0


def _stored(codes: bytes, scales: bytes, weight: Tensor) -> dict[str, Tensor]:
    counts = [-(-count // SIZE) for count in weight.shape]
    return {
        "weight": torch.frombuffer(bytearray(codes), dtype=torch.float8_e4m3fn).view(weight.shape),
        "weight_scale_inv": torch.frombuffer(bytearray(scales), dtype=torch.float32).view(counts),
    }


def by_mergeloom(weight: Tensor) -> dict[str, Tensor]:
    """Codes and scales of mergeloom's encoder."""
    parameters = {"rows": SIZE, "columns": SIZE, "scale_dtype": "F32"}
    kernel = FP8_BLOCKS.kernel(InputSpec(1, None, tuple(weight.shape)), parameters)
    return _stored(*run_fused(kernel, [weight], out=(torch.float8_e4m3fn, torch.float32)).outputs, weight)


def by_torch(weight: Tensor) -> dict[str, Tensor]:
    """Codes and scales of torch's casts."""
    return _stored(*reference(weight, "F32"), weight)


def by_compressed_tensors(strategy: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """Codes and scales of compressed-tensors, for blocks or channels."""

    def quantize(weight: Tensor) -> dict[str, Tensor]:
        rows, columns = (SIZE, SIZE) if strategy == "block" else (1, weight.shape[1])
        scales = in_blocks(weight, rows, columns).abs().amax((2, 4))[0] / LARGEST
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**_scheme(strategy)))
        compressor = BaseCompressor.get_value_from_registry("float-quantized")
        found = compressor.compress({"weight": weight, "weight_scale": scales}, scheme)
        return {name: found[name].detach().contiguous() for name in ("weight", "weight_scale")}

    return quantize


def _scheme(strategy: str) -> dict[str, Any]:
    scheme: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    return scheme | ({"block_structure": [SIZE, SIZE]} if strategy == "block" else {})


def _compressed_config(strategy: str) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": _scheme(strategy)}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [SIZE, SIZE]}
WRITERS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "mergeloom": (by_mergeloom, _BLOCKS),
    "torch": (by_torch, _BLOCKS),
    "compressed-tensors": (by_compressed_tensors("block"), _compressed_config("block")),
    "compressed-tensors, rows": (by_compressed_tensors("channel"), _compressed_config("channel")),
}
"""By writer: the function that quantizes a weight, and the description in config.json."""


def write_fp8_encoder(directory: Path, writer: str) -> Path:
    """Write the encoder with the matrices of its layers in FP8; the others are unchanged, in float32."""
    quantize, section = WRITERS[writer]
    shutil.copytree(encoder_dir(), directory)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if ".layer." not in name or tensor.dim() != 2:
            tensors[name] = tensor
            continue
        module = name.removesuffix("weight")
        tensors |= {f"{module}{ending}": part for ending, part in quantize(tensor).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": section}, indent=2))
    return directory
