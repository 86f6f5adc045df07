"""The tokens of the models of a recipe, and of the outputs of its stages, which have no files yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.small_files import read_json
from ...recipe.types import ModelReference, Recipe, Stage
from ..paths import located
from .adapter_tokenizers import adapter_with_tokenizer
from .added_tokens import AddedToken, read_added_tokens
from .tokenizer_files import main_file, same_vocabulary_files, tokenizer_directory
from .union import ModelTokens
from .vocabulary import Vocabulary, difference, read_vocabulary


def open_directory(reference: ModelReference) -> Checkpoint | None:
    """A local directory as the source of files other than weights, which it need not have; None for another model."""
    path = Path(reference.path).expanduser()
    if not path.is_dir():
        return None
    config: Any = read_json(path / "config.json")
    return Checkpoint(path, {}, config if isinstance(config, dict) else None, {}, (), ())


def tokenizer_source(stage: Stage, donor: ModelReference) -> ModelReference:
    """The model that provides the tokenizer of a stage's output, to which tokens may be added."""
    if stage.tokenizer is not None:
        return stage.tokenizer.model or donor
    return stage.files_from or donor


_Known = tuple[ModelReference, Checkpoint, tuple[AddedToken, ...]]
"""A model, the checkpoint with its tokenizer files, and the tokens that stages add."""


class Vocabularies:
    """The tokens of models and stages, each read once.

    Args:
        recipe: the recipe with the stages.
        open_model: opens the checkpoint of a model that is not a stage.
    """

    def __init__(self, recipe: Recipe, open_model: Callable[[ModelReference], Checkpoint]) -> None:
        self._recipe = recipe
        self._open = open_model
        self._stages: dict[str | None, tuple[ModelReference, tuple[AddedToken, ...]]] = {}
        self._checkpoints: dict[ModelReference, Checkpoint] = {}
        self._read: dict[Path, tuple[Vocabulary, ModelTokens]] = {}

    def add_stage(self, stage: Stage, source: ModelReference, new: Sequence[AddedToken]) -> None:
        """Record the vocabulary of a stage's output: that of a model, and new tokens."""
        self._stages[stage.name] = source, tuple(new)

    def is_stage(self, reference: ModelReference) -> bool:
        """Whether a reference is the output of a stage."""
        return self._recipe.stage(reference.base) is not None

    def checkpoint(self, reference: ModelReference) -> tuple[Checkpoint, tuple[AddedToken, ...]]:
        """The checkpoint with a model's tokenizer files, and the tokens that stages add to it."""
        with located(self._recipe, reference):
            adapter = adapter_with_tokenizer(reference, self._open)
        if adapter is not None:
            return adapter, ()
        reference = reference.base
        stage = self._recipe.stage(reference)
        if stage is not None:
            source, new = self._stages[stage.name]
            checkpoint, before = self.checkpoint(source)
            return checkpoint, (*before, *new)
        if reference not in self._checkpoints:
            with located(self._recipe, reference):
                self._checkpoints[reference] = open_directory(reference) or self._open(reference)
        return self._checkpoints[reference], ()

    def has_tokenizer(self, reference: ModelReference) -> bool:
        """Whether a model has tokenizer files."""
        checkpoint, _ = self.checkpoint(reference)
        with located(self._recipe, reference):
            return main_file(checkpoint) is not None

    def tokens(self, reference: ModelReference) -> ModelTokens:
        """The tokens of a model that has a tokenizer. Raises CheckpointError if they can't be numbered."""
        checkpoint, new = self.checkpoint(reference)
        with located(self._recipe, reference):
            return self._numbered(reference, checkpoint, new)

    def _numbered(self, reference: ModelReference, checkpoint: Checkpoint, new: Sequence[AddedToken]) -> ModelTokens:
        vocabulary, tokens = self._parsed(checkpoint)
        rows = dict(tokens.rows)
        if vocabulary.file.name == "sentencepiece.bpe.model" or (vocabulary.digest and not vocabulary.byte_rows):
            raise CheckpointError(
                f"{reference.text}: {vocabulary.file.name} does not say which rows its tokens have: add tokenizer.json"
            )
        added = dict(tokens.added) | {token.text: token for token in new}
        rows |= {token.text: token.row for token in new}
        return ModelTokens(reference.text, rows, added, opaque=vocabulary.digest is not None)

    def differ(self, first: ModelReference, second: ModelReference, rows: int) -> str | None:
        """How the vocabularies of two models with tokenizers differ in rows below `rows`; None if they don't.

        Raises:
            CheckpointError: they can't be compared, since only one of them stores text, for example.
        """
        (one, new), (other, others) = self.checkpoint(first), self.checkpoint(second)
        if new == others and same_vocabulary_files(one, other):
            return None
        with located(self._recipe, first):
            self._parsed(one)
        with located(self._recipe, second):
            return self._difference((first, one, new), (second, other, others), rows)

    def _difference(self, first: _Known, second: _Known, rows: int) -> str | None:
        (one, checkpoint, new), (other, theirs, others) = first, second
        if not new and not others:
            pair = self._parsed(checkpoint)[0], self._parsed(theirs)[0]
            found = difference(*pair, (one.text, other.text), rows)
            if found is not None and not found.rows:
                raise CheckpointError(f"{found.text}; if the rows match anyway, set `allow_vocabulary_mismatch: true`")
            return None if found is None else found.text
        a, b = ({text: row for text, row in self.tokens(each).rows.items() if row < rows} for each in (one, other))
        return None if a == b else f"{len(a.items() ^ b.items()):,} entries differ"

    def _parsed(self, checkpoint: Checkpoint) -> tuple[Vocabulary, ModelTokens]:
        directory = tokenizer_directory(checkpoint)
        if directory not in self._read:
            vocabulary = read_vocabulary(directory)
            assert vocabulary is not None
            added = read_added_tokens(directory, vocabulary.file.name)
            rows = {**vocabulary.rows, **vocabulary.byte_rows}
            self._read[directory] = vocabulary, ModelTokens(str(directory), rows, added)
        return self._read[directory]
