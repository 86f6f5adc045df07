"""The role of a tensor by its name: head, embedding, buffer, before or after the layers, side module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from . import name_tables as tables

_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,5})(?=\.|$)")
_HEAD = re.compile(rf"(?:^|\.){tables.any_of(tables.HEADS)}\.weight$|^{tables.any_of(tables.TOP_LEVEL_HEADS)}\.weight$")
_EMBEDDING = re.compile(rf"(?:^|\.){tables.any_of(tables.EMBEDDINGS)}\.weight$")
_BUFFER = re.compile(tables.any_of(tables.BUFFERS))
_MASK = re.compile(rf"(?:^|\.){tables.any_of(tables.MASKED_ATTENTION)}\.bias$")
_AFTER = re.compile(tables.component(tables.AFTER_LAYERS) + r"|^decoder\.(?:weight|bias)$")
_BEFORE = re.compile(tables.any_of(tables.BEFORE_LAYERS))
_AFTER_BY_DEFAULT = re.compile(tables.component(tables.AFTER_LAYERS_BY_DEFAULT))
_SIDE_INPUT = re.compile(tables.word(tables.VISION, tables.OTHER_INPUTS))
_SIDE_OUTPUT = re.compile(tables.word(tables.SIDE_OUTPUTS))
_VISION = re.compile(tables.word(tables.VISION))
_PREDICTION = re.compile(r"(?:^|\.)(?:\w+_)?(?:mtp|nextn)(?:_\w+)?(?:\.|$)")
_PREDICTION_TABLE = re.compile(r"\.(?:embed_tokens|shared_head\.head)\.weight$")
_LANGUAGE = re.compile(tables.word(tables.LANGUAGE))


def is_head(name: str) -> bool:
    """Whether a tensor is a language model's output matrix, such as ``lm_head.weight``, at any depth."""
    # the number first: it rules out the tensors of all layers, and is found faster than a head isn't
    return not _NUMBER.search(name) and bool(_HEAD.search(name)) and not is_side_module(name)


def is_embedding(name: str) -> bool:
    """Whether a tensor is the matrix of token embeddings, which a tied head shares."""
    return not _NUMBER.search(name) and bool(_EMBEDDING.search(name)) and not is_side_module(name)


def is_prediction(name: str) -> bool:
    """Whether a tensor belongs to a module of prediction layers, such as ``mtp.0.enorm.weight``."""
    return ("mtp" in name or "nextn" in name) and bool(_PREDICTION.search(name))


def is_prediction_table(name: str) -> bool:
    """Whether a tensor is a copy of the embedding or the head in a layer that predicts further tokens.

    DeepSeek-V3 and GLM have them.
    """
    return _PREDICTION_TABLE.search(name) is not None


def tied_embedding(head: str, names: Iterable[str]) -> str | None:
    """The embedding among `names` that a missing `head` is tied to, or None.

    Of several embeddings, the nearest is used: the one that shares the longest prefix with the head; then a matrix that
    encoder and decoder share rather than their own, and the decoder's rather than the encoder's.
    """

    def distance(name: str) -> tuple[int, bool, bool, int, str]:
        components = name.split(".")
        shared = sum(name.startswith(head[: dot.end()]) for dot in re.finditer(r"\.", head))
        return (-shared, "shared" not in components, not _LANGUAGE.search(name), len(components), name)

    return min(filter(is_embedding, names), key=distance, default=None)


def is_optional(name: str) -> bool:
    """Whether a tensor may be missing from some inputs: heads, biases, T5's relative positions (first layer only)."""
    return name.endswith((".bias", "proj_bias", ".relative_attention_bias.weight")) or name == "bias" or is_head(name)


def is_buffer(name: str, shape: Sequence[int] | None = None) -> bool:
    """Whether a tensor is a buffer rather than a parameter, such as rotary frequencies or position ids.

    The `shape` distinguishes GPT-2's causal mask ``attn.bias``, which is (1, 1, n, n), from a bias with that name.
    """
    is_square = shape is not None and len(shape) == 4 and tuple(shape[:2]) == (1, 1) and shape[2] == shape[3]
    has_buffer_name = _is_buffer_component(name.rpartition(".")[2]) or name.endswith("rope.freqs")
    return has_buffer_name or (is_square and bool(_MASK.search(name)))


@lru_cache(4096)
def _is_buffer_component(last: str) -> bool:
    """Whether the last component of a name is a buffer's. A model has few of them."""
    return _BUFFER.fullmatch(last) is not None


def is_after_layers(name: str, *, in_side_module: bool = False) -> bool:
    """Whether a tensor outside the layers comes after them, so the parameters of the last slice apply to it.

    Heads, final norms and poolers come after the layers. Embeddings come before them, and so do vision encoders and
    projectors, which produce the layers' input. A name that no rule matches comes before, as in mergekit.

    Args:
        name: name of the tensor.
        in_side_module: whether the layers are those of a side module, whose name then says nothing about the order.
    """
    text = name.lower()
    if not in_side_module and is_side_module(text):
        return _SIDE_OUTPUT.search(text) is not None
    return bool(_AFTER.search(text)) or (not _BEFORE.search(text) and bool(_AFTER_BY_DEFAULT.search(text)))


def is_side_module(name: str) -> bool:
    """Whether a name belongs to a module next to the language model: its other inputs, or extra outputs."""
    text = name.lower()
    return bool(_SIDE_INPUT.search(text) or _SIDE_OUTPUT.search(text))


def is_vision(name: str) -> bool:
    """Whether a name belongs to a vision encoder."""
    return _VISION.search(name) is not None


def is_language(name: str) -> bool:
    """Whether a name says that it belongs to a language model."""
    return _LANGUAGE.search(name) is not None
