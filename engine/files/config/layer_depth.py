"""Rules about the position of a layer or the number of layers that no list in config.json can replace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...model.warnings import ModelWarning, ModelWarningKind

_TRANSFORMERS = "https://github.com/huggingface/transformers/blob/main/src/transformers/models"


@dataclass(frozen=True, slots=True)
class _Derived:
    """A constant that a model derives from a layer's index, so a layer that moves gets another one.

    Args:
        what: the constant.
        source: URL of the code that derives it.
        only_if: key and value that enable it, or None.
    """

    what: str
    source: str
    only_if: tuple[str, Any] | None = None


_DERIVED = {
    "beam": _Derived("the scale of the residual connections", f"{_TRANSFORMERS}/beam/modeling_beam.py"),
    "big_bird": _Derived(
        "the random blocks of sparse attention",
        f"{_TRANSFORMERS}/big_bird/modeling_big_bird.py",
        ("attention_type", "block_sparse"),
    ),
    "diffllama": _Derived("lambda_init of differential attention", f"{_TRANSFORMERS}/diffllama/modeling_diffllama.py"),
    "gpt2": _Derived(
        "the scale of the attention scores",
        f"{_TRANSFORMERS}/gpt2/modeling_gpt2.py",
        ("scale_attn_by_inverse_layer_idx", True),
    ),
}
"""Constants derived from a layer's index, by ``model_type``."""

_LAST_IS_FULL = frozenset({"gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text"})
"""Each ``model_type`` that runs the last layer with full attention, whatever ``layer_types`` says."""

_SCALE = "scale_depth"
"""MiniCPM's key: residual connections are scaled by its value, divided by the square root of the number of layers."""

_LAST_HAS = {"gpt_neox_japanese": "attention.dense_bias"}
"""Tensors that only the last layer has, by ``model_type``."""

_BY_ORDINAL = {
    "zamba2": ("layers_block_type", "hybrid", "shared_transformer.*.*_adapter_list"),
    "qwen4_exp_text": ("ple_layer_ids", "", "ple.ple_embedding, whose size follows from the ordinal,"),
}
"""Tensors that models look up, or size, by the ordinal of a layer among those of its kind, by ``model_type``.

Each entry has the list with the kind of each layer, that kind, and the tensors. If the kind is empty, the list has the
numbers of the layers, from 1.
"""


def adapt_to_depth(
    section: dict[str, Any], old: Mapping[str, Any], before: int, source: Sequence[int]
) -> Iterator[ModelWarning]:
    """Update a config section whose layers have been rearranged, and warn about what it can't express.

    Args:
        section: the section, with its lists already rearranged; it is modified.
        old: the donor's section.
        before: number of layers in the donor.
        source: index in the donor of each output layer.
    """
    model_type = str(section.get("model_type"))
    derived = _DERIVED.get(model_type)
    applies = derived is not None and (derived.only_if is None or derived.only_if in section.items())
    if derived is not None and applies and any(new != old for new, old in enumerate(source)):
        yield ModelWarning(
            ModelWarningKind.LAYER_RULE,
            f"{model_type} derives {derived.what} from the index of a layer: the layers that have moved run with other "
            "values than in the donor",
            names=(derived.only_if[0] if derived.only_if else "model_type",),
        )
    types = section.get("layer_types")
    if model_type in _LAST_IS_FULL and isinstance(types, list) and types and types[-1] != "full_attention":
        yield ModelWarning(
            ModelWarningKind.LAYER_RULE,
            f"layer_types ends with {types[-1]}, but {model_type} runs the last layer with full_attention, unlike in "
            "the donor",
            "let the last slice end with a layer that has full_attention",
            ("layer_types",),
        )
    yield from _misplaced_tensors(section, old, before, source)
    scale = section.get(_SCALE)
    if isinstance(scale, (int, float)) and not isinstance(scale, bool) and len(source) != before:
        section[_SCALE] = scale * math.sqrt(len(source) / before)
        yield ModelWarning(
            ModelWarningKind.CONFIG_CHANGED,
            f"changed {_SCALE} from {scale} to {section[_SCALE]}: the model divides it by the square root of the "
            "number of layers",
            names=(_SCALE,),
        )


def _misplaced_tensors(
    section: Mapping[str, Any], old: Mapping[str, Any], before: int, source: Sequence[int]
) -> Iterator[ModelWarning]:
    """Warn about tensors that a model has, or looks up, by the position of a layer among others."""
    model_type = str(section.get("model_type"))
    last = _LAST_HAS.get(model_type)
    if last is not None and (source[-1] != before - 1 or before - 1 in source[:-1]):
        yield ModelWarning(
            ModelWarningKind.LAYER_RULE,
            f"only the last layer of {model_type} has {last}, and that layer has moved or is missing: the tensor is "
            "not used in other layers, and initialized at random if the last layer of the output lacks it",
            "let the last layer be the last one of the output, and of no other slice",
            (last,),
        )
    key, kind, tensors = _BY_ORDINAL.get(model_type, ("", "", ""))
    stated = old.get(key)
    if not isinstance(stated, list):
        return
    numbers = (
        [number for number, each in enumerate(stated) if each == kind]
        if kind
        else [each - 1 for each in stated if isinstance(each, int)]
    )
    ordinals = [numbers.index(layer) for layer in source if layer in numbers]
    if ordinals != list(range(len(numbers))):
        of = f"{kind} layer of {key}" if kind else f"layer in {key}"
        yield ModelWarning(
            ModelWarningKind.LAYER_RULE,
            f"{model_type} stores {tensors} for each {of}, in their order, and these layers have changed: they use the "
            "tensors of others, or missing or unfitting ones that are initialized at random, or leave some out",
            "keep all these layers in their order",
            (key,),
        )
