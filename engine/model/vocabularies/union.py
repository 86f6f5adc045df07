"""The union of vocabularies: the base's tokens in their rows, and after them the tokens that only other models have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .added_tokens import AddedToken


@dataclass(frozen=True, slots=True)
class ModelTokens:
    """The tokens of a model.

    Args:
        name: name of the model in the recipe.
        rows: row of each token; those beyond the model's embeddings are left out.
        added: its added tokens by text.
        embeddings: number of rows of the model's embeddings; 0 if it has none.
        opaque: whether its tokenizer's file stores bytes, to which no tokens can be added.
    """

    name: str
    rows: Mapping[str, int]
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    embeddings: int = 0
    opaque: bool = False

    def within(self, embeddings: int) -> ModelTokens:
        """Return the tokens that have a row in embeddings with this number of rows."""
        rows = {text: row for text, row in self.rows.items() if row < embeddings}
        return replace(self, rows=rows, embeddings=embeddings)


@dataclass(frozen=True, slots=True)
class Union:
    """What the union of vocabularies adds to the base's tokenizer.

    Args:
        new: added tokens in the order of their rows. The first ones are tokens of the base's vocabulary that another
            model has as added tokens; they keep their row.
        conflicts: added tokens whose flags differ between the models, of which the first model's are used.
    """

    new: tuple[AddedToken, ...]
    conflicts: tuple[str, ...] = ()


def united(base: ModelTokens, others: Sequence[ModelTokens], first_row: int) -> Union:
    """Return the union of vocabularies, as mergekit 0.1.5 makes it.

    First come the tokens that are part of a model's vocabulary, then those that were added to one: of each, the models
    in their order, and of each model its tokens in the order of their rows. mergekit numbers them in any order.

    Args:
        base: the base's tokens.
        others: the tokens of the other models, in the order of the recipe.
        first_row: row of the first new token.
    """
    flags: dict[str, AddedToken] = {}
    conflicts: dict[str, None] = {}
    for model in (base, *others):
        for token in _in_order(model.added.values()):
            known = flags.setdefault(token.text, token)
            if known.flags != token.flags:
                conflicts[token.text] = None
    promoted = [
        replace(flags[text], row=base.rows[text]) for text in flags if text in base.rows.keys() - base.added.keys()
    ]
    plain = (text for model in others for text in sorted(model.rows, key=model.rows.__getitem__) if text not in flags)
    known_rows = set(base.rows) | set(base.added)
    lacking = (AddedToken(text, 0) for text in dict.fromkeys(plain) if text not in known_rows)
    added = (token for text, token in flags.items() if text not in known_rows)
    new = [replace(token, row=first_row + number) for number, token in enumerate((*lacking, *added))]
    return Union((*promoted, *new), tuple(conflicts))


def _in_order(tokens: Iterable[AddedToken]) -> Iterator[AddedToken]:
    yield from sorted(tokens, key=lambda token: token.row)
