"""Checks that models whose embeddings are merged have the same vocabulary: the same tokens in the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from ...errors import CheckpointError, MergeloomError
from ...io.checkpoint.checkpoint import Checkpoint
from ..graph.build import BuiltGraph, Model
from ..graph.usage import stored_parts
from ..model.vocabularies.added_tokens import AddedToken
from ..model.vocabularies.tensors import embedding_names
from ..model.vocabularies.tokenizer_files import main_file, same_vocabulary_files, tokenizer_directory
from ..model.vocabularies.vocabulary import Difference, Vocabulary, difference, read_vocabulary
from ..model.warnings import ModelWarning, ModelWarningKind
from ..recipe.types import ModelReference

ALLOW = "allow_vocabulary_mismatch"
"""The recipe key that merges embeddings row by row although vocabularies differ."""
_PROCEED = f"if the rows match anyway, set `{ALLOW}: true`"
_BY_TOKEN = "set `tokenizer_source: union` (or base, or a model) to merge them token by token"


@dataclass(frozen=True, slots=True)
class TokenizerModel:
    """A model with its tokenizer.

    Args:
        name: name of the tokenizer's model in the recipe.
        checkpoint: checkpoint that contains the tokenizer files.
        rows: number of rows of the model's embeddings; None if unknown.
        merged: whether the model's embeddings or heads are merged with those of another, and not only copied.
        new: tokens that earlier stages add to the tokenizer.
        located: begins the message of an error in a ``with`` block with the model's location in the recipe.
    """

    name: str
    checkpoint: Checkpoint
    rows: int | None = None
    merged: bool = False
    new: tuple[AddedToken, ...] = ()
    located: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True, slots=True)
class VocabularyRule:
    """What a recipe requires of the vocabularies.

    Args:
        required: whether the output must have a tokenizer, since the recipe sets it.
        equal: whether all vocabularies must be equal, since the recipe sets their union as the output's.
        allowed: whether differences are accepted, since the recipe sets `allow_vocabulary_mismatch`.
        error: makes the error for different vocabularies.
        advice: what to do if a vocabulary is different or unknown that must not be.
    """

    required: bool = False
    equal: bool = False
    allowed: bool = False
    error: Callable[[str], MergeloomError] = CheckpointError
    advice: str = "Take the tokenizer from a model that has one"


def models_with_used_embeddings(built: BuiltGraph) -> list[Model]:
    """The models of a stage whose embeddings or heads its output is computed from."""
    used = {number for number, _ in _tables(built)}
    return [model for model in built.named if model.number in used]


def models_with_merged_embeddings(built: BuiltGraph) -> set[int]:
    """The numbers of the models of a stage whose embeddings or heads are merged with those of another model."""
    graph, tables = built.graph, _tables(built)
    reads = {read for _, parts in tables for part in parts for read in part}
    using = (node for read in reads for node in graph.node_sources.having(read))
    merged: set[int] = set()
    for node in dict.fromkeys(graph.outputs.nodes if graph.users() else using):
        sources = reads.intersection(graph.reads_of(node))
        if len(sources) > 1:
            models = {number for number, parts in tables if not any(map(sources.isdisjoint, parts))}
            merged |= models if len(models) > 1 else set()
    return merged


def _tables(built: BuiltGraph) -> list[tuple[int, list[set[int]]]]:
    """The embeddings and heads that a stage reads: the number of the model, and for each stored part its reads.

    The parts of a model with an adapter are tensors of the base, of the adapter, or of both.
    """
    graph = built.graph
    tables = [(model.number, stored_parts(model, name)) for model in built.named for name in embedding_names(model)]
    names = {name for _, parts in tables for _, name in parts}
    reads: dict[tuple[ModelReference, str], set[int]] = {}
    for read, name in enumerate(graph.read_names):
        if name in names:
            reads.setdefault((built.models[graph.read_models[read]].reference, name), set()).add(read)
    return [(number, [reads[part] for part in parts]) for number, parts in tables if reads.keys() >= set(parts)]


def check_vocabularies(
    tokenizer: TokenizerModel, models: Sequence[TokenizerModel], rule: VocabularyRule
) -> Iterator[ModelWarning]:
    """Compare the vocabularies of models whose embeddings are merged with that of the output's tokenizer.

    Args:
        tokenizer: the model that the output's tokenizer comes from.
        models: the models whose embeddings are merged.
        rule: what the recipe requires.

    Yields:
        A warning for each model of which a few rows differ, and one for all models without a tokenizer.

    Raises:
        CheckpointError: a model's vocabulary is unrelated to that of the output, or a tokenizer file is not valid.
        MergeloomError: `rule.error`, for vocabularies that are different or unknown although they must be equal, and
            for a missing tokenizer.
    """
    if rule.allowed:
        return
    compared = list({(each.checkpoint.path, each.new): each for each in (tokenizer, *models)}.values())
    known = [each for each in compared if main_file(each.checkpoint) is not None]
    unknown = [each.name for each in compared if each not in known]
    lacking = rule.equal or (rule.required and tokenizer.name in unknown)
    if unknown and lacking and len(compared) > 1:
        raise rule.error(f"{unknown[0]} has no tokenizer files, so its vocabulary is unknown. {rule.advice}")
    if unknown and known:
        yield _missing(tokenizer, unknown)
    parsed: dict[str, Vocabulary] = {}  # that of the first model, which is compared with all others
    for other in known[1:]:
        first = known[0]
        found = _difference(first, other, parsed)
        if found is None:
            continue
        pair = f"the vocabularies of {first.name} and {other.name}"
        if rule.equal:
            raise rule.error(f"{pair} differ: {found.text}. {rule.advice}")
        together = first.merged and other.merged
        combined = f"has the tokenizer of {first.name} and embeddings or a head of {other.name}"
        if tokenizer.name in unknown:
            combined = "has embeddings or heads of both"
        if found.unrelated:
            effect = "Embeddings are merged row by row, which would mix different tokens"
            with other.located():
                raise CheckpointError(
                    f"{pair} are unrelated: {found.rows:,} of {found.compared:,} rows differ; {found.text}. "
                    f"{effect if together else f'The output {combined}'}: {_BY_TOKEN}; {_PROCEED}"
                )
        yield _differing(pair, found, "" if together else combined)


def _difference(first: TokenizerModel, second: TokenizerModel, parsed: dict[str, Vocabulary]) -> Difference | None:
    """How the vocabularies of two models differ in the rows that their embeddings have; None if they are equal."""
    if first.new == second.new and same_vocabulary_files(first.checkpoint, second.checkpoint):
        return None
    if first.name not in parsed:
        parsed[first.name] = _vocabulary(first)
    rows = min((each.rows for each in (first, second) if each.rows is not None), default=None)
    return difference(parsed[first.name], _vocabulary(second), (first.name, second.name), rows)


def _vocabulary(model: TokenizerModel) -> Vocabulary:
    with model.located():
        found = read_vocabulary(tokenizer_directory(model.checkpoint))
    assert found is not None
    return replace(found, rows={**found.rows, **{token.text: token.row for token in model.new}})


def _differing(pair: str, found: Difference, combined: str) -> ModelWarning:
    """The warning for vocabularies that differ; `combined` says what the output combines if nothing is merged."""
    if found.rows:
        count = f"{found.rows:,} of {found.compared:,} rows"
        effect = f", although the output {combined}" if combined else ""
        effect = effect or ", which are merged although they belong to different tokens"
        problem = f"{pair} differ in {count}{effect}: {found.text}"
    else:
        problem = f"{pair} may differ: {found.text}"
    return ModelWarning(ModelWarningKind.VOCABULARY, problem, f"{_BY_TOKEN}; {_PROCEED}", found.tokens)


def _missing(tokenizer: TokenizerModel, unknown: Sequence[str]) -> ModelWarning:
    has, its = ("has", "its vocabulary") if len(unknown) == 1 else ("have", "their vocabularies")
    problem = f"{', '.join(unknown)} {has} no tokenizer files, so {its} cannot be compared with the other models'"
    if tokenizer.name in unknown:
        problem += ", and the output has no tokenizer"
    advice = f"add the tokenizer files; {_PROCEED}"
    return ModelWarning(ModelWarningKind.VOCABULARY, problem, advice)
