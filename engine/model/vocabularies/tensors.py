"""Finds the tensors of a model that have a row for each token: embeddings, heads and their biases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ....errors import CheckpointError
from ....io.tensors.dtypes import Kind
from ..inputs import Model
from ..logical import kind_of
from ..roles import is_embedding, is_head, is_prediction_table, tied_embedding

_BIAS = re.compile(
    r"(?:^|\.)(?:predictions(?:\.decoder)?|lm_head(?:\.decoder)?|decoder|embed_out|vocab_projector)\.bias$"
)
"""Vectors with an element for each token: BERT, RoBERTa, ModernBERT, GPT-J, DistilBERT."""


def embedding_names(model: Model) -> list[str]:
    """The names of a model's token embeddings and heads."""
    return [
        name
        for name in model.non_layer
        if len(kind_of(model.tensors, name).shape) == 2 and (is_embedding(name) or is_head(name))
    ]


def embedding_rows(model: Model) -> int | None:
    """The number of rows of a model's token embeddings, the largest if there are several; None without embeddings."""
    return max((kind_of(model.tensors, name).shape[0] for name in embedding_names(model)), default=None)


def vocabulary_names(model: Model, rows: int) -> list[str]:
    """The names of a model's tensors that have a row for each token.

    Args:
        model: the model.
        rows: number of rows of its embeddings.

    Raises:
        CheckpointError: a tensor seems to have a row for each token, and it is not known what its rows are.
    """
    return [name for name in model.tensors if _has_tokens(model, name, rows)]


def _has_tokens(model: Model, name: str, rows: int) -> bool:
    kind = kind_of(model.tensors, name)
    shape = tuple(kind.shape)
    if shape[:1] != (rows,):
        return False
    outside = model.layers.split(name) is None
    if len(shape) == 1:
        return outside and _BIAS.search(name) is not None
    if len(shape) == 2 and ((outside and (is_embedding(name) or is_head(name))) or is_prediction_table(name)):
        return True
    if shape[0] == shape[-1] or not (outside or kind.dtype.kind is not Kind.FLOAT):
        return False
    raise CheckpointError(
        f"tensor {name} of {model.name} has the shape {list(shape)}, a row for each of the {rows:,} rows of the "
        "embeddings, and it is not known how to rearrange it for another vocabulary: use models with the same "
        "vocabulary, or remove the tensor"
    )


def table_of(model: Model, name: str) -> str | None:
    """The tensor of a model that has the rows of the tensor `name` of another: a head is tied to the embedding.

    None if the model has neither.
    """
    if name in model.tensors:
        return name
    return tied_embedding(name, model.non_layer) if is_head(name) else None


def heads_of_others(models: Sequence[Model], model: Model) -> Iterator[str]:
    """Yield the heads of other models that a tied model lacks, and has the embedding for."""
    heads = dict.fromkeys(name for other in models for name in embedding_names(other) if is_head(name))
    for name in heads:
        if name not in model.tensors and not any(map(is_head, embedding_names(model))) and table_of(model, name):
            yield name
