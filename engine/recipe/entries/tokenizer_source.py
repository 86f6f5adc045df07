"""What a recipe says about the output's tokenizer and about the embeddings of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..nodes import Keys
from .model_reference import ModelReference


@dataclass(frozen=True, slots=True)
class TokenEmbedding:
    """The embedding of a token in the models that lack it.

    Args:
        token: text of the token.
        model: the model that has the embedding; None for the usual rule, or for zeros.
        other: text of the token of `model` that has the embedding; None for the token itself.
        row: row of `model` that has the embedding, or None.
        zero: whether the embedding is zeros.
        force: whether models that have the token use it, too.
        place: key path of the entry in the recipe.
    """

    token: str
    model: ModelReference | None = None
    other: str | None = None
    row: int | None = None
    zero: bool = False
    force: bool = False
    place: Keys = field(default=(), compare=False)

    @property
    def usual(self) -> bool:
        """Whether the embedding follows the usual rule."""
        return self.model is None and not self.zero


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The source of the output's tokenizer.

    Args:
        model: the model that it comes from; None for the base model, or without one the first model.
        union: whether the output's vocabulary is the union of all models' vocabularies.
        tokens: embeddings of tokens that do not follow the usual rule.
        multiple: number that the rows of the output's embeddings are a multiple of; None for no padding.
        place: key path of the source in the recipe.
    """

    model: ModelReference | None
    union: bool = False
    tokens: tuple[TokenEmbedding, ...] = ()
    multiple: int | None = None
    place: Keys = field(default=(), compare=False)
