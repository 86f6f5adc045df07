"""The vocabulary of a stage's output, and where the rows of its models' embeddings come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ....errors import CheckpointError, MergeloomError
from ....io.units import listed
from ...recipe.entries.tokenizer_source import TokenEmbedding, TokenizerSource
from ...recipe.types import ModelReference, Recipe, Stage
from ..inputs import Model
from ..paths import located
from ..warnings import ModelWarning, ModelWarningKind
from .added_tokens import AddedToken
from .known import Vocabularies
from .row_maps import Chosen, ModelRows, RowMaps
from .tensors import embedding_rows
from .tokenizer_files import main_file
from .union import ModelTokens, united

_RELATED = 0.5
"""Share of a model's tokens in the output's vocabulary below which a warning says what it is."""


@dataclass(frozen=True)
class StageVocabulary:
    """The vocabulary of a stage's output, if the embeddings of some models are rearranged for it.

    Args:
        source: the model whose tokenizer is the output's, with the new tokens.
        new: tokens that are added to it, in the order of their rows. Some may have a row already.
        rows: number of rows of the output's embeddings.
        tokens: number of tokens.
        models: for each model with embeddings, by number, where its rows come from.
        names: names of the stage's models, by number.
        warnings: warnings about the vocabularies.
    """

    source: ModelReference
    new: tuple[AddedToken, ...]
    rows: int
    tokens: int
    models: Mapping[int, ModelRows]
    names: tuple[str, ...] = ()
    warnings: tuple[ModelWarning, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the vocabulary as plain data: where the rows of each model's embeddings come from."""
        models = [
            {
                "model": self.names[number],
                "own": rows.counts.own,
                "others": {self.names[other]: count for other, count in rows.counts.others.items()},
                "mean": rows.counts.mean,
                "zero": rows.counts.zero,
                "padding": rows.counts.padding,
                "padding_from": [self.names[other] for other in rows.counts.lenders],
            }
            for number, rows in self.models.items()
        ]
        added = [token.text for token in self.new]
        facts = {"tokenizer": self.source.text, "rows": self.rows, "tokens": self.tokens, "added": added}
        return {**facts, "models": models}


def stage_vocabulary(
    recipe: Recipe, stage: Stage, models: Sequence[Model], donor: Model, used: Collection[Model], known: Vocabularies
) -> StageVocabulary | None:
    """Find the vocabulary of a stage's output; None if all models' embeddings are used row by row as they are.

    Args:
        recipe: the recipe, for error messages.
        stage: the stage.
        models: the stage's models, by number.
        donor: the model that provides the tokenizer unless the recipe says otherwise.
        used: the models whose embeddings or heads the output is computed from.
        known: the tokens of models.

    Raises:
        RecipeError: the recipe chooses an embedding that no model has, or needs a stage's rows rearranged.
        CheckpointError: vocabularies are unknown or can't be compared.
    """
    planner = _Planner(recipe, stage, models, donor, used, known)
    if stage.allow_vocabulary_mismatch:
        planner.check_row_by_row()
        return None
    return planner.plan()


class _Planner:
    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        models: Sequence[Model],
        donor: Model,
        used: Collection[Model],
        known: Vocabularies,
    ) -> None:
        self._recipe, self._known, self._wanted = recipe, known, stage.tokenizer or TokenizerSource(None)
        self._explicit = stage.tokenizer is not None
        self._place = self._wanted.place or stage.place
        self._source = self._wanted.model or donor.reference
        self._base = stage.base_model
        found = ((model, embedding_rows(model)) for model in models)
        self._models = [(model, rows) for model, rows in found if rows is not None]
        self._counts = {rows for model, rows in self._models if model in used}
        self._names = tuple(model.name for model in models)
        self._warnings: list[ModelWarning] = []

    def plan(self) -> StageVocabulary | None:
        """Find the vocabulary; None if the models' embeddings are used as they are."""
        counts = self._counts
        if not counts or (not self._explicit and len(counts) == 1):
            return None
        unknown = [model for model, _ in self._models if not self._known.has_tokenizer(model.reference)]
        if not self._known.has_tokenizer(self._source) or (unknown and (self._wanted.union or not self._explicit)):
            return None  # the checks of vocabularies, or those of shapes, say so
        if self._all_equal(unknown):
            unset = not self._wanted.tokens and self._wanted.multiple is None
            return None if len(counts) == 1 and unset else self._arranged(unknown, equal=True)
        if not self._explicit:
            return None
        return self._arranged(unknown, equal=False)

    def check_row_by_row(self) -> None:
        """Raise RecipeError if a tokenizer is set, and embeddings can't be merged row by row."""
        if self._explicit and len(self._counts) > 1:
            counts = " and ".join(f"{rows:,}" for rows in sorted(self._counts))
            raise self._recipe.error(
                self._place,
                f"`allow_vocabulary_mismatch` merges embeddings row by row, and these have {counts} rows: remove it to "
                "merge them token by token",
            )

    def _all_equal(self, unknown: Sequence[Model]) -> bool:
        """Whether the known vocabularies are that of the tokenizer's model, but for tokens without a row."""
        own = next((rows for model, rows in self._models if model.reference == self._source), 0)
        for model, rows in self._models:
            if model not in unknown and model.reference != self._source:
                limit = max(own, rows)
                if self._known.differ(self._source, model.reference, limit) is not None:
                    return False
        return True

    def _arranged(self, unknown: Sequence[Model], *, equal: bool) -> StageVocabulary:
        source = self._known.tokens(self._source)
        models = [self._tokens(model, rows, source, unknown) for model, rows in self._models]
        own = next((rows for model, rows in self._models if model.reference == self._source), 0)
        tokens, new = self._vocabulary(source, models if self._wanted.union and not equal else ())
        padded = max([own, *(self._counts if equal else ())])
        needed = max(tokens.values(), default=-1) + 1
        multiple = self._wanted.multiple
        rows = max(needed, padded) if multiple is None else -(-needed // multiple) * multiple
        base = next((n for n, (model, _) in enumerate(self._models) if model.reference == self._base), None)
        maps = RowMaps(tokens, rows, models, base, self._chosen(tokens, models))
        found = {model.number: self._numbered(maps.of(n)) for n, (model, _) in enumerate(self._models)}
        self._check_stages(found)
        self._warn_of_tokens(tokens, maps, models)
        return StageVocabulary(self._source, new, rows, len(tokens), found, self._names, tuple(self._warnings))

    def _tokens(self, model: Model, rows: int, source: ModelTokens, unknown: Sequence[Model]) -> ModelTokens:
        """The tokens of a model that have a row; those of the tokenizer's model if the model has no tokenizer."""
        if model not in unknown:
            return self._known.tokens(model.reference).within(rows)
        others = next((rows for other, rows in self._models if other.reference == self._source), rows)
        if rows != others:
            with located(self._recipe, model.reference):
                raise CheckpointError(
                    f"{model.name} has no tokenizer files, so its vocabulary is unknown, and its embeddings have "
                    f"{rows:,} rows, not {others:,}, as {self._source.text}: add its tokenizer files"
                )
        problem = f"{model.name} has no tokenizer files: its vocabulary is assumed to be that of {self._source.text}"
        self._warn(problem, "add the tokenizer files")
        return replace(source, name=model.name, added={}).within(rows)

    def _vocabulary(
        self, source: ModelTokens, models: Sequence[ModelTokens]
    ) -> tuple[dict[str, int], tuple[AddedToken, ...]]:
        """The row of each token of the output, and the tokens that are added to the tokenizer: those of `models`."""
        tokens = dict(source.rows)
        first = max(tokens.values(), default=-1) + 1
        new: list[AddedToken] = []
        if models:
            union = united(source, [each for each in models if each.name != self._source.text], first)
            new += union.new
            for text in union.conflicts:
                problem = f"token {text!r} is added with different flags: those of the first model that has it are used"
                self._warn(problem, "", (text,))
        tokens |= {token.text: token.row for token in new}
        for each in self._wanted.tokens:
            if each.token not in tokens:
                new.append(AddedToken(each.token, max(tokens.values(), default=-1) + 1))
                tokens[each.token] = new[-1].row
        if any(token.row >= first for token in new):
            with located(self._recipe, self._source):
                self._check_appendable(source)
        return tokens, tuple(new)

    def _check_appendable(self, source: ModelTokens) -> None:
        """Raise CheckpointError if new tokens can't be added to the tokenizer, or would get other ids than rows."""
        file = main_file(self._known.checkpoint(self._source)[0]) or ""
        last = max(source.rows.values(), default=-1)
        if file == "tokenizer.json" and len(set(source.rows.values())) <= last:
            raise CheckpointError(
                f"{source.name}: tokenizer.json numbers {len(source.rows):,} tokens up to {last:,}, so libraries would "
                "give new tokens other ids than their rows. Use `tokenizer_source: base` or another model, or number "
                "its tokens without gaps"
            )
        if source.opaque:
            raise CheckpointError(
                f"{source.name}: tokens can't be added to {file}, whose tokens are bytes: add tokenizer.json"
            )

    # --- embeddings that the recipe chooses --------------------------------------------------------------------

    def _chosen(self, tokens: Mapping[str, int], models: Sequence[ModelTokens]) -> dict[str, Chosen]:
        return {each.token: self._choice(each, models) for each in self._wanted.tokens}

    def _choice(self, each: TokenEmbedding, models: Sequence[ModelTokens]) -> Chosen:
        if each.model is None:
            return Chosen(usual=each.usual, force=each.force)
        number = next((n for n, (model, _) in enumerate(self._models) if model.reference == each.model), None)
        if number is None:
            raise self._error(each, f"{each.model.text} is not a model of this merge that has embeddings")
        tokens = models[number]
        row = tokens.rows.get(each.other or each.token) if each.row is None else each.row
        if row is None:
            raise self._error(each, f"{each.model.text} has no token {each.other or each.token!r} with an embedding")
        if row >= tokens.embeddings:
            raise self._error(each, f"row {row} is beyond the {tokens.embeddings:,} rows of {each.model.text}")
        return Chosen(number, row, force=each.force)

    def _error(self, each: TokenEmbedding, problem: str) -> MergeloomError:
        return self._recipe.error(each.place, f"{problem}: write a model that has it, or `{{kind: zero}}`")

    # --- results -----------------------------------------------------------------------------------------------

    def _numbered(self, rows: ModelRows) -> ModelRows:
        """The rows of a model with the numbers of the stage's models, instead of those among models with embeddings."""
        numbers = [model.number for model, _ in self._models]
        tables = tuple(replace(table, model=numbers[table.model]) for table in rows.tables)
        others = {numbers[other]: count for other, count in rows.counts.others.items()}
        lenders = tuple(numbers[other] for other in rows.counts.lenders)
        return replace(rows, tables=tables, counts=replace(rows.counts, others=others, lenders=lenders))

    def _check_stages(self, found: Mapping[int, ModelRows]) -> None:
        """Raise RecipeError if the rows of a stage's output would have to be rearranged before they are computed."""
        stages = {model.number: model for model, _ in self._models if self._known.is_stage(model.reference)}
        for number, rows in found.items():
            used = {table.model for table in rows.tables if table.rows.highest >= 0}
            for other in used & stages.keys() if not rows.unchanged else ():
                name = stages[other].reference.base.text
                problem, advice = f"embeddings of stage `{name}` would be rearranged for another vocabulary", ""
                if other != number:
                    problem = f"{self._names[number]} lacks rows that it would take from the output of stage `{name}`"
                elif stages[other].reference.adapters:
                    problem = f"embeddings of {stages[other].name} would be rearranged for another vocabulary"
                else:
                    advice = f"write the same tokenizer in stage `{name}`, with as many rows as here, or "
                raise self._recipe.error(
                    self._place,
                    f"{problem}, which is only possible where they are read from files: {advice}merge stage `{name}` "
                    "on its own first, and write the directory of its output here",
                )

    def _warn_of_tokens(self, tokens: Mapping[str, int], maps: RowMaps, models: Sequence[ModelTokens]) -> None:
        for each in models:
            shared = sum(tokens.get(text) is not None for text in each.rows) if not self._wanted.union else 0
            if self._wanted.union:
                others = [set(other.rows) for other in models if other is not each]
                shared = len(set(each.rows) & set().union(*others)) if others else len(each.rows)
            if len(models) > 1 and each.rows and shared < _RELATED * len(each.rows):
                where = "other models'" if self._wanted.union else "output's"
                self._warn(
                    f"only {shared:,} of the {len(each.rows):,} tokens of {each.name} ({shared / len(each.rows):.1%}) "
                    f"are in the {where} vocabulary",
                    "the models number and split text differently, so merged embeddings and layers hardly fit: use "
                    "models with the same tokenizer",
                )
        if maps.without:
            texts = {row: text for text, row in tokens.items()}
            names = tuple(texts[row] for row in maps.without)
            self._warn(
                f"no model has an embedding for {listed(list(map(repr, names)))}: zeros are used",
                "remove the token, or choose an embedding under `tokenizer: {tokens: ...}`",
                names,
            )

    def _warn(self, problem: str, advice: str, names: tuple[str, ...] = ()) -> None:
        self._warnings.append(ModelWarning(ModelWarningKind.VOCABULARY, problem, advice, names))
