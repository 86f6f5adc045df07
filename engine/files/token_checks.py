"""Checks the special tokens of an output: its end, padding and beginning tokens, and ids beyond its embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.checkpoint.checkpoint import Checkpoint
from ...io.small_files import read_json
from ..model.open import is_remote
from ..model.vocabularies.tokenizer_files import GENERATION, main_file, small_files_directory
from ..model.vocabularies.vocabulary import added_tokens, last_row, read_vocabulary
from ..model.warnings import ModelWarning, ModelWarningKind
from .chat_templates import find_template
from .token_ids import TOKEN_KEY, Renumbering

CONFIG = "config.json"
_ROLES = ("eos", "bos", "pad")
_OTHER_INPUT = re.compile(r"image|video|vision|audio|speech|patch|frame", re.IGNORECASE)
"""Tokens of other inputs than text may lie beyond the rows, since encoders replace them."""
_MARKUP = re.compile(r"<[|｜]?/?[\w▁ ]+[|｜]?>|\[\|\w+\|\]")
_ENDS = frozenset(
    (
        *("end", "ends", "eos", "eosid", "eot", "eotid", "eom", "eomid", "eoa", "eou", "s", "return", "imend"),
        *("endofturn", "endofturntoken", "endofmessage", "endofsentence", "endofutterance", "endoftext", "messageend"),
    )
)
"""The names of tokens that end an answer, in lower case and without punctuation."""
_DOCUMENT_ENDS = frozenset(("endoftext", "eos", "s"))

Ids = frozenset[int]


@dataclass(frozen=True, slots=True)
class TokenModel:
    """A model that some files of the output come from.

    Args:
        name: name of the model in the recipe.
        rows: number of rows of its embeddings, or else its vocab_size; None if both are unknown.
        merged: whether the output's embeddings are computed from those of the model.
    """

    name: str
    rows: int | None
    merged: bool

    def caused_by_merge(self, ids: Iterable[int]) -> bool:
        """Whether the model itself has rows for ids that the output lacks, which is a mistake in the recipe."""
        return not self.merged and (self.rows is None or any(token < self.rows for token in ids))


class SpecialTokens:
    """The special tokens that the files of a model state. Files are read when they are needed, and only once.

    Args:
        config: content of config.json, or None.
        generation: content of generation_config.json.
        tokenizer: checkpoint with the tokenizer files.
        template: chat template that replaces the tokenizer's, or None.
        new: rows of tokens that are added to the tokenizer.
        renumbering: the rows in another vocabulary, which all ids are given in; None for the model's own.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None,
        generation: Mapping[str, Any],
        tokenizer: Checkpoint,
        template: str | None = None,
        *,
        new: Mapping[str, int] | None = None,
        renumbering: Renumbering | None = None,
    ) -> None:
        self._config = config
        self._generation = generation
        self._tokenizer = tokenizer
        self._template = template
        self._new = new or {}
        self._renumbering = renumbering or Renumbering()

    def stated(self, role: str) -> dict[str, Ids]:
        """The ids of a token by the file that states them.

        Args:
            role: eos, bos or pad.
        """
        stated = self._settings(role)
        text = self.text(role)
        row = None if text is None else self.row(text)
        return stated if row is None else stated | {f"the tokenizer ({text!r})": frozenset((row,))}

    def effective(self, role: str) -> Ids:
        """The ids of a token that transformers uses in generation: those of generation_config.json come first."""
        settings = self._settings(role) or self.stated(role)
        return next(iter(settings.values()), frozenset())

    @property
    def template(self) -> str | None:
        """The chat template, or None."""
        return self._template or find_template(small_files_directory(self._tokenizer))

    def answer_ends(self) -> Ids:
        """The ids of the tokens that end an answer according to the chat template; empty if it does not say."""
        template = self.template or ""
        texts = [self.text("eos")] if "eos_token" in template else _template_ends(template)
        rows = (self.row(text) for text in texts if text is not None)
        return frozenset(row for row in rows if row is not None)

    def end_documents(self, ids: Ids) -> bool:
        """Whether all of these tokens are known to end texts that models are trained on, and not answers."""
        return ids <= {self.row(text) for text in self._added if _plain(text) in _DOCUMENT_ENDS}

    def text(self, role: str) -> str | None:
        """The text of a token according to the tokenizer's files; None if they do not state it."""
        for content in self._tokenizer_settings:
            value = content.get(f"{role}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def row(self, text: str) -> int | None:
        """The row of a token; None if the tokenizer has no such token, or if it is not downloaded."""
        row = self._added[text] if text in self._added else self._rows.get(text)
        return None if row is None else self._renumbering(row)

    def _settings(self, role: str) -> dict[str, Ids]:
        """The ids that generation_config.json and config.json state."""
        key = f"{role}_token_id"
        values = {
            GENERATION: self._generation.get(key),
            CONFIG: next((s[key] for s in _sections(self._config) if s.get(key) is not None), None),
        }
        found = {file: map(self._renumbering, _ids(value)) for file, value in values.items()}
        known = {file: frozenset(row for row in rows if row is not None) for file, rows in found.items()}
        return {file: ids for file, ids in known.items() if ids}

    @cached_property
    def _tokenizer_settings(self) -> list[dict[str, Any]]:
        directory = small_files_directory(self._tokenizer)
        contents = (read_json(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
        return [content for content in contents if isinstance(content, dict)]

    @cached_property
    def _added(self) -> Mapping[str, int]:
        return {**added_tokens(small_files_directory(self._tokenizer)), **self._new}

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        directory = small_files_directory(self._tokenizer)
        vocabulary = read_vocabulary(directory) if _is_local(self._tokenizer, directory) else None
        return {} if vocabulary is None else vocabulary.rows


# ------------------------------------------------------------------------------------------------ differences


def check_output_tokens(tokens: SpecialTokens, template: str | None) -> Iterator[ModelWarning]:
    """Warn if the files of an output disagree about its special tokens.

    Args:
        tokens: the output's files.
        template: the output's chat template, or None.
    """
    for role in _ROLES:
        stated = tokens.stated(role)
        decisive = stated.get(GENERATION, frozenset())
        if _conflict(list(stated.values())) and not all(ids <= decisive for ids in stated.values()):
            listed = ", ".join(f"{_listed(ids)} in {file}" for file, ids in stated.items())
            yield ModelWarning(
                ModelWarningKind.TOKENS,
                f"the output's files disagree about {role}_token_id: {listed}",
                f"{_EFFECT[role]}: correct the file of the model that it comes from, or choose another with "
                "`tokenizer_source` or `files_from`",
                (f"{role}_token_id",),
            )
    ends = _template_ends(template or "")
    stops = tokens.stated("eos")
    if not ends or not stops or tokens.text("eos") in ends:
        return
    ids = frozenset().union(*stops.values())
    if not any(tokens.row(end) in ids for end in ends):
        listed = ", ".join(f"{_listed(found)} in {file}" for file, found in stops.items())
        yield ModelWarning(
            ModelWarningKind.TOKENS,
            f"the chat template ends a message with {' or '.join(ends)}, which is not an end token of the output: "
            f"eos_token_id is {listed}",
            "the model does not stop at the end of its answer: add the token to eos_token_id in generation_config.json",
            tuple(ends),
        )


def check_input_tokens(output: SpecialTokens, models: Mapping[str, SpecialTokens]) -> Iterator[ModelWarning]:
    """Warn about special tokens of models that are merged if the output lacks them.

    Additional tokens of the output are harmless: they only end an answer of a model that never writes them.

    Args:
        output: the output's files.
        models: the models by name.
    """
    for role in _ROLES:
        ids = {name: found for name, tokens in models.items() if (found := tokens.effective(role))}
        used = output.effective(role) or next(iter(ids.values()), frozenset())
        if all(_covers(used, found, role, models[name]) for name, found in ids.items()):
            continue
        yield ModelWarning(
            ModelWarningKind.TOKENS,
            f"{role}_token_id differs between the models: {_by_ids(ids)}",
            f"{_EFFECT[role]}, since the output uses {_listed(used)}: set `tokenizer_source` to the model whose "
            "tokenizer and generation_config.json are right",
            (f"{role}_token_id",),
        )


_EFFECT = {
    "eos": "generation may not stop, or stop too early",
    "bos": "prompts may begin with the wrong token",
    "pad": "batches may be padded with the wrong token",
}


def _covers(used: Ids, found: Ids, role: str, tokens: SpecialTokens) -> bool:
    """Whether the ids of the output do for a model with the ids `found`: all, or those that end its answers."""
    if role != "eos" or found <= used:
        return found <= used
    if ends := tokens.answer_ends():
        return ends <= used & found
    own = tokens.text("eos")  # without a template, a model ends with its eos_token, if the others only end documents
    return own is not None and tokens.row(own) in used & found and tokens.end_documents(found - used)


def _conflict(sets: Sequence[Ids]) -> bool:
    """Whether there are two sets of which neither contains the other."""
    ordered = sorted(set(sets), key=len)
    return any(not small <= large for small, large in pairwise(ordered))


def _template_ends(template: str) -> list[str]:
    """The tokens in a chat template that end a message; empty if it uses the tokenizer's end token."""
    if "eos_token" in template:
        return []
    found = dict.fromkeys(_MARKUP.findall(template))
    return [text for text in found if _plain(text) in _ENDS]


def _plain(token: str) -> str:
    """A token's text in lower case and without punctuation."""
    return re.sub(r"[\W_]|▁", "", token).lower()


def _by_ids(ids: Mapping[str, Ids]) -> str:
    """The ids of all models, each with the models that have it."""
    owners: dict[Ids, list[str]] = {}
    for name, found in ids.items():
        owners.setdefault(found, []).append(name)
    separator = ", " if len(owners) == len(ids) else "; "
    return separator.join(f"{_listed(found)} in {', '.join(names)}" for found, names in owners.items())


def _listed(ids: Ids) -> str:
    return " or ".join(map(str, sorted(ids)))


def _ids(value: object) -> Ids:
    """The ids that the value of a key states: a number or a list. Negative numbers mean that there is none."""
    values = value if isinstance(value, list) else [value]
    return frozenset(each for each in values if isinstance(each, int) and not isinstance(each, bool) and each >= 0)


def _sections(config: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The sections of a config.json that describe the language model."""
    config = config or {}
    yield config
    if isinstance(config.get("text_config"), Mapping):
        yield config["text_config"]


# ------------------------------------------------------------------------------------------------ ids without a row


def stated_vocabulary(config: Mapping[str, Any] | None) -> int | None:
    """The vocab_size that a config.json states; None if it states none."""
    sizes = (section.get("vocab_size") for section in _sections(config))
    return next((size for size in sizes if isinstance(size, int) and not isinstance(size, bool)), None)


def check_tokenizer_rows(
    tokenizer: Checkpoint, model: TokenModel, rows: int, *, allowed: bool
) -> Iterator[ModelWarning]:
    """Warn about tokens of the output's tokenizer without a row in its embeddings.

    A tokenizer on the Hub that is not downloaded is checked as far as tokenizer_config.json lists its tokens.

    Args:
        tokenizer: checkpoint that the tokenizer comes from.
        model: the same model.
        rows: number of rows of the output's embeddings.
        allowed: whether the recipe accepts a tokenizer that does not fit.

    Raises:
        CheckpointError: the model has rows for these tokens, but the recipe takes the embeddings from others.
    """
    directory = small_files_directory(tokenizer)
    tokens = added_tokens(directory)
    if _is_local(tokenizer, directory) and last_row(directory) >= rows:
        vocabulary = read_vocabulary(directory)
        tokens |= {} if vocabulary is None else {**vocabulary.rows, **vocabulary.byte_rows}
    beyond = sorted(
        (row, token)
        for token, row in tokens.items()
        if row >= rows and (not _OTHER_INPUT.search(token) or model.caused_by_merge((row,)))
    )
    if not beyond:
        return
    listed = ", ".join(f"{token!r} ({row})" for row, token in beyond[:5])
    more = f" and {len(beyond) - 5:,} more" if len(beyond) > 5 else ""
    caused = model.caused_by_merge(row for row, _ in beyond)
    yield _beyond(
        f"the tokenizer of {model.name} has tokens beyond the {rows:,} rows of the output's embeddings: {listed}{more}",
        "take the tokenizer from a model whose embeddings are merged"
        if caused
        else "the model fails on these tokens: "
        "remove them from the tokenizer, or resize the model's embeddings with resize_token_embeddings",
        tuple(token for _, token in beyond),
        caused=caused and not allowed,
    )


def check_stated_ids(
    content: Mapping[str, Any], file: str, model: TokenModel, rows: int, *, allowed: bool
) -> Iterator[ModelWarning]:
    """Warn about token ids in config.json or generation_config.json without a row in the output's embeddings.

    Args:
        content: content of the file.
        file: name of the file.
        model: the model that the file comes from.
        rows: number of rows of the output's embeddings.
        allowed: whether the recipe accepts a vocabulary that does not fit.

    Raises:
        CheckpointError: the model has rows for these ids, but the recipe takes the embeddings from others.
    """
    keys = {
        key: ids
        for section in _sections(content)
        for key, value in section.items()
        if TOKEN_KEY.fullmatch(key)
        and not _OTHER_INPUT.search(key)
        and (ids := frozenset(each for each in _ids(value) if each >= rows))
    }
    if not keys:
        return
    listed = ", ".join(f"{key} {_listed(ids)}" for key, ids in keys.items())
    caused = model.caused_by_merge(frozenset().union(*keys.values()))
    yield _beyond(
        f"{file} of {model.name} names tokens beyond the {rows:,} rows of the output's embeddings: {listed}",
        "take the file from a model whose embeddings are merged"
        if caused
        else f"correct {file}: the model fails on these tokens",
        tuple(keys),
        caused=caused and not allowed,
    )


def _beyond(problem: str, advice: str, names: tuple[str, ...], *, caused: bool) -> ModelWarning:
    if caused:
        raise CheckpointError(f"{problem}; {advice}")
    return ModelWarning(ModelWarningKind.TOKENS, problem, advice, names)


def _is_local(checkpoint: Checkpoint, directory: Path) -> bool:
    """Whether the main file of a tokenizer is on this machine."""
    main = main_file(checkpoint)
    return main is not None and (not is_remote(checkpoint) or (directory / main).is_file())
