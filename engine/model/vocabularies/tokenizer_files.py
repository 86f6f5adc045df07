"""Finds the tokenizer and generation files of a model, and downloads those that are needed of a model on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.companions import FileKind, companion_files, file_kind
from ....io.output.digests import file_digest
from ....io.small_files import read_json
from ..open import is_remote
from .vocabulary import equal_added_tokens, main_file_name

if TYPE_CHECKING:
    from ....io.hub.repository import HubFile

GENERATION = "generation_config.json"
POOLING = "1_Pooling/config.json"
"""The file in which sentence-transformers states how the embeddings of tokens are pooled."""
_SMALL = frozenset(
    (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        GENERATION,
        POOLING,
    )
)
"""The files that checks of tokens read of every model: some kilobytes."""


def directory_of(checkpoint: Checkpoint) -> Path:
    """The directory of a checkpoint, which contains its non-weight files; for a file that stands alone, its path."""
    return checkpoint.path if checkpoint.standalone or not checkpoint.path.is_file() else checkpoint.path.parent


def tokenizer_directory(checkpoint: Checkpoint) -> Path:
    """The directory of a model's tokenizer files, which are downloaded first for a model on the Hub."""
    return _download(checkpoint, lambda name: file_kind(name) is FileKind.TOKENIZER)


def small_files_directory(checkpoint: Checkpoint) -> Path:
    """The directory of the small tokenizer and generation files, which are downloaded first for a model on the Hub.

    Offline, files that are not in the cache are left out, since only checks need them.
    """
    if is_remote(checkpoint):
        from ....io.hub.http import is_offline  # local models do not need the network libraries

        if is_offline():
            return directory_of(checkpoint)
    return _download(checkpoint, _SMALL.__contains__)


def check_companions(others: Checkpoint, generation: Checkpoint, tokenizer: Checkpoint) -> None:
    """Check that an output can copy the companion files of its models, without reading them.

    Models on the Hub are left out: their files are checked when they are downloaded.

    Args:
        others: checkpoint that provides the processors and licenses.
        generation: checkpoint that provides the generation config.
        tokenizer: checkpoint that provides the tokenizer.

    Raises:
        CheckpointError: a file is a broken link, a pipe or a device, or not readable.
    """
    kinds = (FileKind.OTHER, others), (FileKind.GENERATION, generation), (FileKind.TOKENIZER, tokenizer)
    for kind, checkpoint in kinds:
        if not is_remote(checkpoint):
            for file in companion_files(directory_of(checkpoint), (kind,)):
                if not os.access(file.source, os.R_OK):
                    raise CheckpointError(f"{file.source}: can't be read: check its owner and mode")


def has_file(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a model has a file in its directory, downloaded or not."""
    return name in _hub_files(checkpoint) or (directory_of(checkpoint) / name).is_file()


def main_file(checkpoint: Checkpoint) -> str | None:
    """The name of the file with most of a model's vocabulary, downloaded or not; None if it has no tokenizer."""
    directory = directory_of(checkpoint)
    return main_file_name({*_hub_files(checkpoint), *(file.name for file in directory.glob("*") if file.is_file())})


def generation_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The content of a model's generation_config.json; empty if there is none. Raises CheckpointError."""
    if not has_file(checkpoint, GENERATION):
        return {}
    content = read_json(small_files_directory(checkpoint) / GENERATION)
    return content if isinstance(content, dict) else {}


def same_vocabulary_files(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two models have identical vocabulary files, which avoids parsing them for a comparison.

    Files on the Hub are compared by the hashes that it lists, without downloading them.
    """
    names = main_file(first), main_file(second)
    if names[0] is None or names[0] != names[1]:
        return False
    if directory_of(first) == directory_of(second):
        return True
    return _same(first, second, names[0]) and equal_added_tokens(
        small_files_directory(first), small_files_directory(second), names[0]
    )


def _same(first: Checkpoint, second: Checkpoint, name: str) -> bool:
    """Whether a file of two models has the same bytes."""
    hub = [_hub_files(checkpoint).get(name) for checkpoint in (first, second)]
    paths = [directory_of(checkpoint) / name for checkpoint in (first, second)]
    if hub[0] is not None and hub[1] is not None:
        return hub[0].etag == hub[1].etag
    for file, path in zip(hub, reversed(paths), strict=True):
        if file is not None:
            from ....io.hub.download import has_hash

            return has_hash(path, file)
    return paths[0].stat().st_size == paths[1].stat().st_size and file_digest(paths[0]) == file_digest(paths[1])


def _hub_files(checkpoint: Checkpoint) -> Mapping[str, HubFile]:
    """The files that a model has on the Hub; empty for a local model."""
    return checkpoint.repository.files if is_remote(checkpoint) else {}  # type: ignore[attr-defined]


def _download(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> Path:
    """Download the companion files of a model on the Hub whose name is wanted, and return the model's directory."""
    if is_remote(checkpoint):
        from ....io.hub.checkpoint import companions
        from ....io.hub.download import download

        download(file for file in companions(checkpoint) if wanted(file.name))
    return directory_of(checkpoint)
