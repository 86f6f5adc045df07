"""Small models of transformers, each with a fine-tune in which every parameter has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 48
Model = Any
"""A model of transformers, which has no types."""

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama tied": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA, tie_word_embeddings=False),
    "qwen2 tied": lambda: transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    ),
    "qwen3 moe": lambda: transformers.Qwen3MoeConfig(**LLAMA, **EXPERTS, head_dim=8, tie_word_embeddings=False),
    "bert": lambda: transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    ),
}
CLASSES: dict[str, Any] = {"bert": transformers.AutoModel}
"""The classes that load the families that are not causal language models."""


def auto_class(family: str) -> Any:
    """The class of transformers that loads a family."""
    return CLASSES.get(family, transformers.AutoModelForCausalLM)


def load(family: str, directory: Path) -> Model:
    """Load a model in float32."""
    return auto_class(family).from_pretrained(directory, dtype=torch.float32).eval()


def save_pair(directory: Path, family: str, *, scale: float = 0.02, dtype: torch.dtype = torch.float32) -> None:
    """Save a base model and its fine-tune as ``base`` and ``tuned``.

    Args:
        directory: directory of both.
        family: key of `CONFIGS`.
        scale: standard deviation of the change of each parameter.
        dtype: dtype of both.
    """
    torch.manual_seed(sum(map(ord, family)))
    model = auto_class(family).from_config(CONFIGS[family]()).to(dtype)
    model.save_pretrained(directory / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (torch.randn(parameter.shape) * scale).to(dtype)
    model.save_pretrained(directory / "tuned")


def outputs(model: Model) -> torch.Tensor:
    """The logits or hidden states of a model for a fixed input."""
    with torch.no_grad():
        tokens = torch.arange(20).reshape(2, 10) * 7 % VOCABULARY
        return torch.as_tensor(model(input_ids=tokens)[0])
