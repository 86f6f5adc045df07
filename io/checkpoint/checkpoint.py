"""Opens checkpoints: finds a model's files, reads their headers and maps tensor names to stored tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import CheckpointError, ModelNotFound
from ..open_source import quoted
from ..reading import FileStamps, stat_fingerprints
from ..small_files import read_json
from ..tensors.refs import TensorRef
from ..tensors.views import View
from .contents import SAFETENSORS, Extras, read_contents
from .file_sets import ADAPTER, ONLY_FILES, check_file_set, loaded_with_config, stray_files, unlisted_shards
from .index import copied, follow_index, merge_headers, read_weight_map
from .other_weights import describe_no_weights, describe_training_state, listed_names
from .torch_names import TORCH_INDEX_SUFFIX, choose_torch_files, is_torch_name, is_training_state, torch_files

MAX_CONFIG_BYTES = 64_000_000
"""The maximum size of a config.json in bytes."""

INDEX_SUFFIX = ".safetensors.index.json"
_SUFFIX = ".safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
INDEX = "model" + INDEX_SUFFIX
"""The file that maps each tensor to its shard."""
SECONDARY = ("consolidated", ADAPTER)
"""Prefixes of files that are used only if there are no others: a copy of the weights in another format, an adapter."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk.

    Args:
        path: the path that was opened: a directory, a file of weights or an index.
        tensors: the tensors by name, ordered by file name and offset.
        config: the content of config.json; None if there is none.
        metadata: the merged ``__metadata__`` of the files; if they differ, the first file wins.
        files: the files that contain the tensors, sorted by name.
        ignored: other .safetensors files in the directory: stale shards, other formats of the same weights.
        remarks: warnings for the user, one sentence for each: the index and its shards disagree, or files that are
            not used would be loaded by other programs.
        stamps: the stamps of the files before their headers were read; empty for files not downloaded yet.
        index: the index that lists the files; None without one.
        standalone: whether the path is a file to which nothing else in its directory belongs, no config.json either.
        views: the tensors whose elements are not in the order of their shape, by name. `tensors` has the range of each
            as a one-dimensional tensor.
        kind: name of the files' format, for display.
        stored: the names in the files of the tensors that have other names in `tensors`, by these.
    """

    path: Path
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    files: tuple[Path, ...]
    ignored: tuple[Path, ...]
    remarks: tuple[str, ...] = ()
    stamps: FileStamps = field(default_factory=dict)
    index: Path | None = None
    standalone: bool = False
    views: Mapping[str, View] = field(default_factory=dict)
    kind: str = SAFETENSORS
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def bare(self) -> bool:
        """Whether the model is one file of weights without a config.json, such as a checkpoint of a diffusion model."""
        return self.config is None and self.index is None and len(self.files) <= 1

    def __repr__(self) -> str:
        """One line with the path and the number of tensors."""
        return f"<Checkpoint {str(self.path)!r}: {len(self.tensors):,} tensors in {len(self.files):,} files>"


def open_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint's files and read their headers.

    The files of a directory are those that its index lists (``model.safetensors.index.json``, else the only
    ``*.safetensors.index.json``); without an index, ``model.safetensors`` or ``diffusion_pytorch_model.safetensors``;
    without these, all .safetensors files. Files named ``consolidated*`` or ``adapter_model*`` are used only if there
    are no others. A directory without safetensors files may have those of PyTorch instead: see `choose_torch_files`.

    A file stands alone: the config.json and the other files next to it belong to it only if loaders expect its name
    there (``model.safetensors``, ``diffusion_pytorch_model.safetensors``, a shard) and there is a config.json.

    Args:
        path: a directory, a .safetensors, .bin, .pt, .pth or .ckpt file, or an index (``*.safetensors.index.json``,
            ``*.bin.index.json``).

    Raises:
        CheckpointError: the path does not exist, a file is missing or damaged, the index leads
            out of the directory or disagrees with its shards, two files contain a tensor of the same name, or files
            without an index are an incomplete set.
        EnvironmentFailure: reading failed.
    """
    directory, index, files = _find_weights(path)
    standalone = index is None and not path.is_dir() and not _belongs_to_config(path)
    config = None if standalone else read_config(directory / "config.json")
    remarks: list[str] = _unused_config(path) if standalone else []
    extras = Extras()
    if index is None:
        remarks += check_file_set(path, [file.name for file in files]) if path.is_dir() else []
        stamps = stat_fingerprints(files)
        tensors, metadata = merge_headers(files, extras.collect(read_contents(files)))
    else:
        weight_map = read_weight_map(index)
        files = _find_shards(index, sorted(map(copied, set(weight_map.values()))))
        stamps = stat_fingerprints(files)
        contents = extras.collect(read_contents(files))
        tensors, metadata, remarks = follow_index(index, weight_map, files, contents)
        remarks += unlisted_shards(index.name, (file.name for file in files))
    if not tensors:
        raise CheckpointError(f"{path}: contains no tensors (searched {listed_names(file.name for file in files)})")
    names = _list_names(directory) if path.is_dir() else []
    alike = [name for name in names if name.endswith(_SUFFIX)]
    if is_torch_name(files[0].name):
        alike += torch_files(names)
    used = set(files)
    ignored = tuple(directory / name for name in alike if directory / name not in used)
    remarks += stray_files(index.name if index else None, (file.name for file in ignored)) + extras.remarks()
    return Checkpoint(
        path=path,
        tensors=tensors,
        config=config,
        metadata=MappingProxyType(metadata),
        files=tuple(files),
        ignored=ignored,
        remarks=tuple(remarks),
        stamps=MappingProxyType(stamps),
        index=index,
        standalone=standalone,
        views=MappingProxyType(extras.views(tensors)),
        kind=extras.kind,
    )


def _belongs_to_config(file: Path) -> bool:
    """Whether a file of weights that is given by its path belongs to the config.json next to it."""
    return loaded_with_config(file.name) and _exists(file.parent / "config.json")


def _unused_config(file: Path) -> list[str]:
    """Describe a config.json that may belong to a file that stands alone: the directory contains no other weights."""
    others = [name for name in _list_names(file.parent) if name.endswith((_SUFFIX, INDEX_SUFFIX)) and name != file.name]
    if others or not _exists(file.parent / "config.json"):
        return []
    return [
        f"a file stands alone, so config.json next to {file.name} is not used: if it belongs to the model, give the "
        "path of the directory"
    ]


# ------------------------------------------------------------------------------------------------ finding the files


def _find_weights(path: Path) -> tuple[Path, Path | None, list[Path]]:
    """Find the checkpoint's directory and its index, or, without an index, its files."""
    if not _exists(path):
        raise ModelNotFound(_describe_missing(path))
    if not path.is_dir():
        if is_torch_name(path.name) and is_training_state(path.name):
            raise CheckpointError(describe_training_state(path))
        if path.name.endswith((INDEX_SUFFIX, TORCH_INDEX_SUFFIX)):
            return path.parent, path, []
        return path.parent, None, [path]
    names = _list_names(path)
    weights = [name for name in names if name.endswith((_SUFFIX, INDEX_SUFFIX))]
    if all(name.startswith(SECONDARY) for name in weights):
        index, files = choose_torch_files(names)
        if index or files:
            return path, path / index if index else None, [path / name for name in files]
    # Some models include a second copy of the weights, in the publisher's format (Mistral's consolidated.safetensors).
    weights = [name for name in weights if not name.startswith(SECONDARY)] or weights
    indexes = [name for name in weights if name.endswith(INDEX_SUFFIX)]
    # If there are both an index and a model.safetensors that the index doesn't list, transformers loads the file and
    # mergekit the shards. We follow mergekit, whose recipes we run; the file is listed as ignored.
    if INDEX in indexes:
        return path, path / INDEX, []
    if len(indexes) > 1:
        raise CheckpointError(
            f"{path}: has several indexes ({listed_names(indexes)}) and none is {INDEX}: give the path of the one to "
            "use"
        )
    if indexes:
        return path, path / indexes[0], []
    if only := [name for name in ONLY_FILES if name in weights]:  # like transformers, which ignores all other files
        return path, None, [path / only[0]]
    if weights:
        return path, None, [path / name for name in weights]
    raise CheckpointError(describe_no_weights(path, names))


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # permission denied, a symlink loop; a NUL or lone surrogate in the name
        reason = error.strerror if isinstance(error, OSError) else "invalid file name"
        raise CheckpointError(
            f"{quoted(str(path))}: can't be looked up ({reason}): check the path and its owner"
        ) from None
    return True


def _list_names(directory: Path) -> list[str]:
    """The sorted names in a directory without hidden files, such as the ._model.safetensors that macOS creates."""
    try:
        return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{directory}: can't be listed ({error.strerror}): check its owner and mode") from error


def _describe_missing(path: Path) -> str:
    if path.is_symlink():
        return f"{path}: is a broken link: download the model again"
    problem = f"{path}: there is no such directory or file"
    if not path.is_absolute() and _HUB_ID.fullmatch(str(path)):
        return (
            f"{problem}. If it is a model on the Hugging Face Hub: recipes can use this id, `mergeloom plan` reads "
            f"its headers from there, and `hf download {path} --local-dir {path.name}` downloads it"
        )
    return f"{problem}: check the path"


# ------------------------------------------------------------------------------------------------ config and shards


def read_config(file: Path) -> dict[str, Any] | None:
    """Read a config.json; None if it does not exist. Raises CheckpointError if it is not an object or too large."""
    if not _exists(file) and not file.is_symlink():
        return None
    config = read_json(file, MAX_CONFIG_BYTES, required=True)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: is {quoted(config)}, not an object: download it again")
    return config


def _find_shards(index: Path, shards: Sequence[str]) -> list[Path]:
    """The paths of an index's shards. A shard may be a link to anywhere, as in the Hub's cache."""
    missing = [shard for shard in shards if not _exists(index.parent / shard)]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of the {len(shards)} files that it names are missing from {index.parent}: "
            f"{listed_names(missing)}: download them (`hf download` resumes)"
        )
    return [index.parent / shard for shard in shards]
