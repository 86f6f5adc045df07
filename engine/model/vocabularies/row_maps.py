"""For each model, where every row of its embeddings in the output's vocabulary comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ....methods.kernel.access.row_index import RowIndex
from .union import ModelTokens


@dataclass(frozen=True, slots=True)
class RowTable:
    """Rows that come from a model's table.

    Args:
        model: index of the model.
        rows: for each row of the output, the row of the table, or -1.
        count: number of models that a row is the mean of; 1 if it is this model's.
    """

    model: int
    rows: RowIndex
    count: int = 1


@dataclass(frozen=True, slots=True)
class RowCounts:
    """How many rows of a model's embeddings come from where.

    Args:
        own: the model's own rows.
        others: rows of each other model, by its index.
        mean: means of several models' rows.
        zero: rows of zeros for tokens that no model has.
        padding: rows without a token.
        lenders: indices of the other models that some padding rows come from.
    """

    own: int = 0
    others: Mapping[int, int] = field(default_factory=dict)
    mean: int = 0
    zero: int = 0
    padding: int = 0
    lenders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelRows:
    """The rows of a model's embeddings in the output's vocabulary.

    Args:
        tables: the tables that they come from, the model's own first.
        counts: how many rows come from where.
        rows: number of rows of the model's own table.
        same: for each row of the output, the model's own row of the same token, whether or not it is used, or -1.
    """

    tables: tuple[RowTable, ...]
    counts: RowCounts
    rows: int
    same: RowIndex

    @property
    def unchanged(self) -> bool:
        """Whether the model's own table is used as it is."""
        return len(self.tables) == 1 and self.tables[0].rows == RowIndex(range(self.rows))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The embedding that a recipe chooses for a token.

    Args:
        model: index of the model that has it; None for zeros, or for the usual rule if `usual` is set.
        row: its row there.
        usual: whether the usual rule applies.
        force: whether models that have the token use it, too.
    """

    model: int | None = None
    row: int = -1
    usual: bool = False
    force: bool = False


Sources = tuple[tuple[int, int], ...]
"""The rows that a row is the mean of, each as the index of a model and the row there; empty for zeros."""


class RowMaps:
    """Finds the rows of each model, by the rules of mergekit 0.1.5.

    A model uses its own row of a token. If it has none, the row is that of the only model that has the token, else the
    base's, else the mean of those of the models that have it, else zeros. Rows without a token are padding: a model
    uses its own row at the same place if it is padding there, too, else that of the base or of the first model for
    which it is, else zeros.

    Args:
        tokens: row of each token of the output.
        rows: number of rows of the output's embeddings.
        models: the models, in the order of the recipe.
        base: index of the base model, or None.
        chosen: embeddings that the recipe chooses, by token.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        rows: int,
        models: Sequence[ModelTokens],
        base: int | None,
        chosen: Mapping[str, Chosen] | None = None,
    ) -> None:
        self._rows, self._models, self._base = rows, models, base
        self._is_token = bytearray(rows)
        for row in tokens.values():
            self._is_token[row] = 1
        self._chosen = {tokens[text]: each for text, each in (chosen or {}).items()}
        self._has = [self._own_rows(tokens, model) for model in models]
        self._defaults = self._find_defaults()

    @property
    def without(self) -> tuple[int, ...]:
        """The rows of tokens that no model has, and for which the recipe chooses nothing."""
        return tuple(
            row
            for row, found in self._defaults.items()
            if not found and self._is_token[row] and row not in self._chosen
        )

    def _own_rows(self, tokens: Mapping[str, int], model: ModelTokens) -> list[int]:
        """For each row of the output, the model's own row, or -1."""
        own = [-1] * self._rows
        for text, row in tokens.items():
            known = model.rows.get(text)
            if known is not None:
                own[row] = known
        used = set(model.rows.values())
        for row in range(min(self._rows, model.embeddings)):
            if not self._is_token[row] and row not in used:
                own[row] = row
        return own

    def _find_defaults(self) -> dict[int, Sources]:
        """The sources of each row that a model lacks, or that the recipe chooses."""
        found: dict[int, Sources] = {}
        for row, own in enumerate(zip(*self._has, strict=True)):
            chosen = self._chosen.get(row)
            if min(own) >= 0 and not (chosen and chosen.force):
                continue
            if chosen is not None and not chosen.usual:
                found[row] = () if chosen.model is None else ((chosen.model, chosen.row),)
                continue
            present = tuple((model, place) for model, place in enumerate(own) if place >= 0)
            if len(present) > 1 and self._base is not None and own[self._base] >= 0:
                present = ((self._base, own[self._base]),)
            found[row] = present if self._is_token[row] else present[:1]
        return found

    def of(self, model: int) -> ModelRows:
        """Return the rows of one model."""
        own = list(self._has[model])
        tables: dict[tuple[int, int], list[int]] = {}
        others: Counter[int] = Counter()
        lenders: set[int] = set()
        mean = zero = 0
        for row, sources in self._defaults.items():
            chosen = self._chosen.get(row)
            if own[row] >= 0 and not (chosen and chosen.force):
                continue
            own[row] = -1
            if len(sources) == 1 and sources[0][0] == model:
                own[row] = sources[0][1]
                continue
            for other, place in sources:
                if (len(sources), other) not in tables:
                    tables[len(sources), other] = [-1] * self._rows
                tables[len(sources), other][row] = place
            if self._is_token[row]:
                mean, zero = mean + (len(sources) > 1), zero + (not sources)
                others.update(other for other, _ in sources if len(sources) == 1)
            else:
                lenders.update(other for other, _ in sources)
        padding = self._rows - sum(self._is_token)
        used = self._rows - padding - mean - zero - others.total()
        counts = RowCounts(used, dict(others), mean, zero, padding, tuple(sorted(lenders)))
        found = [RowTable(model, RowIndex(own))]
        found += [RowTable(other, RowIndex(rows), count) for (count, other), rows in sorted(tables.items())]
        return ModelRows(tuple(found), counts, self._models[model].embeddings, RowIndex(self._has[model]))
