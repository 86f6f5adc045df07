"""Checks that a language model has the tensors outside its layers that it can't do without."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...io.units import listed
from .inputs import Model
from .roles import is_head
from .warnings import ModelWarning, ModelWarningKind

DAMAGED = "the model may be damaged: download it again"

_BEFORE_BLOCK = "input_layernorm.weight"
"""A norm before each block. Every architecture with one also has a final norm."""
_FINAL_NORM = re.compile(r"norm|ln_|(?:^|\.)ln\.")
_EMBEDDING = re.compile(r"emb|wte")
_LANGUAGE_MODEL = re.compile(r"ForCausalLM|LMHeadModel")


def incomplete_outside(model: Model, stack: int) -> Iterator[ModelWarning]:
    """Warn about a language model without a final norm or without an embedding.

    Args:
        model: the model that names the output's tensors.
        stack: number of the main stack.
    """
    main = model.stack(stack)
    architectures = (model.checkpoint.config or {}).get("architectures")
    is_language_model = isinstance(architectures, list) and any(_LANGUAGE_MODEL.search(str(a)) for a in architectures)
    last = model.by_layer.get((stack, main.count - 1), {})
    if not is_language_model or main.count < 2 or _BEFORE_BLOCK not in last:
        return
    parent = main.prefix.rpartition(".")[0]
    parent = f"{parent}." if parent else ""
    outside = [name.removeprefix(parent).lower() for name in model.non_layer if name.startswith(parent)]
    absent = [] if any(_FINAL_NORM.search(name) for name in outside) else [f"{parent}norm.weight"]
    others = (name.lower() for name in model.non_layer if not is_head(name))
    if not any(_EMBEDDING.search(name) for name in others):
        absent.append(f"{parent}embed_tokens.weight")
    if absent:
        yield ModelWarning(
            ModelWarningKind.LAYER_TENSORS,
            f"{model.name} has no {'final norm' if 'norm' in absent[0] else 'embedding'}"
            f"{' and no embedding' if len(absent) > 1 else ''}, probably named {listed(absent)}: loaders initialize "
            "what is missing at random",
            DAMAGED,
            tuple(absent),
        )
