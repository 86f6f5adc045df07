"""What a module of a checkpoint is by its name: embedding, head, transposed layer; and its name in the loaded model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ....io.checkpoint.checkpoint import Checkpoint
from ...model.checks.wrappers import expected_embeddings
from ...model.name_tables import NamePattern, any_of
from ...model.roles import is_head

EMBEDDING_MODULES = (
    NamePattern(r"(?:\w*_)?embeddings?", "bert.embeddings.position_embeddings.weight"),
    NamePattern(r"embed_(?:tokens|in|positions?)(?:_\w+)?", "model.embed_tokens_per_layer.weight"),  # Gemma 3n
    NamePattern(r"(?:tokens|positions|decoder|encoder)_embed", "tokens_embed.weight"),  # OpenAI GPT
    NamePattern(r"wte|wpe", "transformer.wpe.weight"),  # GPT-2
    NamePattern(r"shared", "shared.weight"),  # T5, BART
    NamePattern(r"relative_attention_bias", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
)
"""Last components of the names of modules that look up rows of their ``weight``."""

_EMBEDDING = re.compile(any_of(EMBEDDING_MODULES))
_BARE = "embeddings."
"""Prefix of an encoder's embeddings in a checkpoint without the prefix of the base model, such as ``bert.``."""
_TRANSPOSED_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_TRANSPOSED = re.compile(r"c_attn|c_proj|c_fc|q_attn")


def module_of(name: str) -> tuple[str, str]:
    """Split the name of a tensor into its module and its own name: ``("model.norm", "weight")``."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def is_embedding_module(module: str) -> bool:
    """Whether a module looks up rows: token, position and type embeddings, relative positions of T5."""
    return _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def is_head_module(module: str) -> bool:
    """Whether a module is a language model's head."""
    return is_head(f"{module}.weight")


def is_router(module: str) -> bool:
    """Whether a module chooses experts. Many are modules of their own kind, which PEFT has no factors for."""
    return module.rpartition(".")[2] in ("gate", "router")


def is_transposed(module: str, config: Mapping[str, Any] | None) -> bool:
    """Whether a module is a ``Conv1D`` of transformers, whose weight has the shape (in, out): those of GPT-2."""
    kind = (config or {}).get("model_type")
    return kind in _TRANSPOSED_TYPES and _TRANSPOSED.fullmatch(module.rpartition(".")[2]) is not None


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether the architecture in a config.json is a model with a head: not a bare ``BertModel`` or ``LlamaModel``."""
    architecture = architecture_of(config)
    return bool(architecture) and (not architecture.endswith("Model") or architecture.endswith("LMHeadModel"))


def tied_head(config: Mapping[str, Any]) -> str:
    """The module of a head that is tied to the embedding, and therefore not stored; empty if PEFT can't tie adapters.

    In encoder-decoder models, and in the heads of masked language models, more than two modules share the matrix.
    """
    architecture = architecture_of(config)
    if not architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return ""
    if config.get("is_encoder_decoder") is True:
        return ""
    return "embed_out" if str(config.get("model_type")).startswith("gpt_neox") else "lm_head"


def module_prefix(checkpoint: Checkpoint) -> str:
    """The prefix that the modules of the loaded model have, and the checkpoint's names lack; empty as a rule.

    ``gpt2`` stores ``h.0.attn.c_attn.weight``. The class in its config.json, ``GPT2LMHeadModel``, loads that as
    ``transformer.h.0.attn.c_attn``, and an adapter for this class needs the latter name.
    """
    config = checkpoint.config or {}
    expected = expected_embeddings(architecture_of(config)) if has_head(config) else ()
    names = checkpoint.tensors
    if any(name in names for name in expected if not name.startswith(_BARE)):
        return ""
    for name in expected:
        prefix, _, rest = name.partition(".")
        if not name.startswith(_BARE) and rest in names:
            return f"{prefix}."
    return ""


def in_loaded_model(name: str, prefix: str) -> str:
    """The name of a module or tensor in the loaded model; a head is outside of the base model with the prefix."""
    return name if is_head(name) or is_head_module(name) else f"{prefix}{name}"


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first architecture of a config.json; empty without one."""
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""
