"""Writes LoRA adapters in PEFT's format with chosen or random factors, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.models.shapes import Shape

PREFIX = "base_model.model."
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_lora(
    directory: Path,
    shapes: Mapping[str, Shape],
    *,
    targets: Iterable[str] = LINEAR,
    rank: int = 4,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    more: Mapping[str, Tensor | None] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter of all linear layers whose last component is a target.

    Args:
        directory: made if it isn't there.
        shapes: shapes of the base's tensors by name.
        targets: last components of the changed modules.
        rank: rank of all factors.
        seed: seed of the values.
        dtype: dtype of the factors.
        more: further tensors by name; None removes one.
        config: entries of adapter_config.json.

    Returns:
        The directory.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = set(targets)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in wanted and name != module:
            a, b = (torch.randn(size, generator=generator) / 8 for size in ((rank, shape[1]), (shape[0], rank)))
            tensors |= {f"{PREFIX}{module}.lora_A.weight": a.to(dtype), f"{PREFIX}{module}.lora_B.weight": b.to(dtype)}
    return write_adapter(directory, tensors | dict(more or {}), **({"r": rank, "lora_alpha": 2 * rank} | config))


def write_adapter(directory: Path, tensors: Mapping[str, Tensor | None], **config: Any) -> Path:
    """Write an adapter with these tensors, except for those that are None."""
    directory.mkdir(parents=True, exist_ok=True)
    present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(present, directory / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "peft_version": "0.21.2"} | config
    (directory / "adapter_config.json").write_text(json.dumps(written))
    return directory


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter."""
    return dict(load_file(directory / "adapter_model.safetensors"))


def product(adapter: Path, module: str) -> Tensor:
    """What an adapter adds to the weight of a module, in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
        a, b = (stored.get_tensor(f"{PREFIX}{module}.lora_{factor}.weight").double() for factor in "AB")
    rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    return config["lora_alpha"] / rank * (b @ a)
