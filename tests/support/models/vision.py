"""Tiny vision-language models and the text models that they contain, written by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYERS = 3
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}


@dataclass(frozen=True)
class Family:
    """A vision-language model of transformers and the text model that it contains.

    Args:
        model: name of the vision-language model's class.
        text: name of the text model's class.
        text_type: name of the text model's configuration class.
        vision: settings of the vision encoder.
        more: further settings of the text model.
        settings: further settings of the vision-language model.
        head: whether the models have a head of their own.
    """

    model: str
    text: str
    text_type: str
    vision: dict[str, Any]
    more: dict[str, Any]
    settings: dict[str, Any]
    head: bool = True


FAMILIES = {
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2ForCausalLM", "Qwen2Config",
        _QWEN | {"fullatt_block_indexes": [1]}, _MROPE, {"image_token_id": 70, "video_token_id": 71},
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration", "Qwen3ForCausalLM", "Qwen3Config",
        _QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, _MROPE,
        {"image_token_id": 70, "video_token_id": 71}, head=False,
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM", "Gemma3TextConfig",
        _TOWER | {"model_type": "siglip_vision_model"}, {"sliding_window": 8},
        {"mm_tokens_per_image": 4, "image_token_index": 70, "boi_token_index": 71, "eoi_token_index": 72}, head=False,
    ),
    "llava": Family(
        "LlavaForConditionalGeneration", "LlamaForCausalLM", "LlamaConfig",
        _TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}, {}, {"image_token_index": 70},
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration", "MistralForCausalLM", "MistralConfig",
        _TOWER | {"model_type": "pixtral", "head_dim": 8}, {}, {"image_token_index": 70},
    ),
}  # fmt: skip
"""The families by the type of the vision-language model."""


def write_text(family: Family, directory: Path, seed: int, dtype: str = "float32") -> Path:
    """Write a text model with random values."""
    return _write(_class(family.text)(_text_config(family, inside=False)), directory, seed, dtype)


def write_model(family: Family, directory: Path, seed: int, dtype: str = "float32") -> Path:
    """Write a vision-language model with random values."""
    type_ = _class(family.model)
    config = type_.config_class(
        text_config=_text_config(family, inside=True).to_dict() | _text_type(type_),
        vision_config=family.vision,
        tie_word_embeddings=not family.head,
        **family.settings,
    )
    return _write(type_(config), directory, seed, dtype)


def load(class_name: str, directory: Path) -> tuple[Any, dict[str, list[str]]]:
    """Load a model, and what transformers says about it: missing, unexpected and mismatched keys."""
    model, info = _class(class_name).from_pretrained(directory, output_loading_info=True, dtype="auto")
    return model.eval(), {key: sorted(map(str, value)) for key, value in info.items() if value}


def _text_type(type_: Any) -> dict[str, Any]:
    """The type of the text model's configuration in a vision-language model, if it isn't the text model's own."""
    inner = type_.config_class.sub_configs.get("text_config")
    own = getattr(inner, "model_type", "")
    return {"model_type": own} if own and own.endswith("_text") else {}


def _text_config(family: Family, *, inside: bool) -> Any:
    """The configuration of a text model, alone or inside a vision-language model, whose positions have three axes."""
    more = {key: value for key, value in family.more.items() if inside or key != "rope_parameters"}
    return _class(family.text_type)(**_TEXT, **more, tie_word_embeddings=not family.head)


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _write(model: Any, directory: Path, seed: int, dtype: str) -> Path:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory
