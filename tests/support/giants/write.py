"""Writes models with the layouts of giants, and twins that store the values which the formats' libraries decode."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.giants.layouts import LAYERS, Giant
from tests.support.models import write_checkpoint
from tests.support.outputs import read_model


@dataclass(frozen=True)
class Written:
    """A model with the layout of a giant.

    Args:
        path: its directory.
        values: decoded values by name, in float32; integers as they are.
        coded: names of the values that are stored quantized.
    """

    path: Path
    values: Mapping[str, Tensor]
    coded: frozenset[str]


def model_class(giant: Giant) -> Any:
    """The class of transformers."""
    import transformers

    return getattr(transformers, giant.class_name)


def write_plain(giant: Giant, directory: Path, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write a model of the class with random weights as transformers does; returns its tensors and config.json."""
    from transformers import CONFIG_MAPPING

    kind = model_class(giant)
    settings = dict(giant.settings)
    if giant.vision is not None:
        text = CONFIG_MAPPING["deepseek_v3"](**settings)
        settings = {"text_config": text, "vision_config": dict(giant.vision), "projection_hidden_size": 32}
        settings |= {"image_token_id": 70, "video_token_id": 71, "vision_start_token_id": 72, "vision_end_token_id": 73}
        settings["tie_word_embeddings"] = False
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings))
    start, change = (torch.Generator().manual_seed(each) for each in (0, seed))
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                base = torch.randn(tensor.shape, generator=start) * 0.1
                step = torch.randn(tensor.shape, generator=change) * 0.02
                tensor.data.copy_(base + step + float(name.endswith("norm.weight")))
    model.to(torch.bfloat16).save_pretrained(directory)
    # transformers 5.23 saves Kimi's layers under the name of the vision encoder's
    renamed = {name.replace("model.blocks.", "model.layers."): tensor for name, tensor in read_model(directory).items()}
    return renamed, json.loads((directory / "config.json").read_text())


def with_prediction_layer(giant: Giant, tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Add a prediction layer: the last layer's tensors with other values, norms, a projection, embedding and head."""
    prefix = giant.prediction.replace("N", str(LAYERS))
    last = f"model.layers.{LAYERS - 1}."
    generator = torch.Generator().manual_seed(seed + 100)
    own = {name.replace(last, f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(last)}
    hidden = giant.settings["hidden_size"]
    shapes = {"enorm.weight": (hidden,), "hnorm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden)}
    ends = {"shared_head.norm.weight": (hidden,), "shared_head.head.weight": (80, hidden)}
    shapes |= ends | {"embed_tokens.weight": (80, hidden)}
    made = {f"{prefix}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    changed = {
        name: tensor + torch.randn(tensor.shape, generator=generator) * 0.02 if tensor.is_floating_point() else tensor
        for name, tensor in own.items()
    }
    return {name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in (made | changed).items()}  # fmt: skip


def write_giant(giant: Giant, directory: Path, seed: int, *, prediction: bool = True) -> Written:
    """Write a model with a giant's layout.

    Args:
        giant: the layout.
        directory: its directory.
        seed: models of other seeds are fine-tunes of the same one.
        prediction: whether it has the layout's prediction layer.
    """
    tensors, config = write_plain(giant, directory / "plain", seed)
    if giant.prediction and prediction:
        tensors |= with_prediction_layer(giant, tensors, seed)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    coded = set()
    for name, tensor in tensors.items():
        found = giant.quantize(name, tensor)
        if found is None:
            stored[name] = tensor
            values[name] = tensor.float() if tensor.is_floating_point() else tensor
            continue
        coded.add(name)
        module = name.removesuffix(".weight")
        for ending, part in found.stored.items():
            stored[module + (ending if ending.startswith("_") else f".{ending}")] = part
        values[name] = found.value
    assert coded
    path = write_checkpoint(
        directory / "model", stored, config=config | {"quantization_config": giant.section} | giant.more
    )
    return Written(path, values, frozenset(coded))


def write_values(giant: Giant, directory: Path, values: Mapping[str, Tensor], like: Path) -> Path:
    """Write values in float32 without a quantization, with the config.json of a model."""
    config = json.loads((like / "config.json").read_text())
    config.pop("quantization_config", None)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        section.update({key: "float32" for key in ("dtype", "torch_dtype") if key in section})
    contiguous = {name: tensor.contiguous() for name, tensor in values.items()}
    return write_checkpoint(directory, contiguous, config=config)
