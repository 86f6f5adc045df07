"""Opens checkpoints: finds a model's files, reads their headers and maps tensor names to stored tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from ...errors import CheckpointError, ModelNotFound
from ..open_source import quoted
from ..reading import FileStamps, stat_fingerprints
from ..small_files import read_json
from .file_sets import ADAPTER, SINGLE, check_file_set, stray_files, unlisted_shards
from .header import Header, read_header
from .tensors import TensorRef

MAX_INDEX_BYTES = 256_000_000
"""The maximum size of an index in bytes, enough for about 2,000,000 tensors."""

MAX_CONFIG_BYTES = 64_000_000
"""The maximum size of a config.json in bytes."""

INDEX_SUFFIX = ".safetensors.index.json"
_SUFFIX = ".safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
INDEX = "model" + INDEX_SUFFIX
"""The file that maps each tensor to its shard."""
SECONDARY = ("consolidated", ADAPTER)
"""Prefixes of files that are used only if there are no others: a copy of the weights in another format, an adapter."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # pickles of a training run
_THREADS = 8  # to hide the latency of a network file system; parsing holds the GIL anyway


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk.

    Args:
        path: the path that was opened: a directory, a .safetensors file or an index.
        tensors: the tensors by name, ordered by file name and offset.
        config: the content of config.json; None if there is none.
        metadata: the merged ``__metadata__`` of the files; if they differ, the first file wins.
        files: the files that contain the tensors, sorted by name.
        ignored: other .safetensors files in the directory: stale shards, other formats of the same weights.
        remarks: warnings for the user, one sentence for each: the index and its shards disagree, or files that are
            not used would be loaded by other programs.
        stamps: the stamps of the files before their headers were read; empty for files not downloaded yet.
        index: the index that lists the files; None without one.
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

    def __repr__(self) -> str:
        """One line with the path and the number of tensors."""
        return f"<Checkpoint {str(self.path)!r}: {len(self.tensors):,} tensors in {len(self.files):,} files>"


def open_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint's files and read their headers.

    The files of a directory are those that its index lists (``model.safetensors.index.json``, else the only
    ``*.safetensors.index.json``); without an index, ``model.safetensors``; without that, all .safetensors files. Files
    named ``consolidated*`` or ``adapter_model*`` are used only if there are no others.

    Args:
        path: a directory, a .safetensors file, or an index (``*.safetensors.index.json``).

    Raises:
        CheckpointError: the path does not exist, the weights are pickles, a file is missing or damaged, the index leads
            out of the directory or disagrees with its shards, two files contain a tensor of the same name, or files
            without an index are an incomplete set.
        EnvironmentFailure: reading failed.
    """
    directory, index, files = _find_weights(path)
    config = read_config(directory / "config.json")
    remarks: list[str] = []
    if index is None:
        remarks = check_file_set(path, [file.name for file in files]) if path.is_dir() else []
        stamps = stat_fingerprints(files)
        headers = _read_headers(files)
        tensors = merge_headers(files, headers)
    else:
        weight_map = read_weight_map(index)
        files = _find_shards(index, sorted(set(weight_map.values())))
        stamps = stat_fingerprints(files)
        headers = _read_headers(files)
        tensors, remarks = follow_index(index, weight_map, files, headers)
        remarks += unlisted_shards(index.name, (file.name for file in files))
    if not tensors:
        raise CheckpointError(f"{path}: contains no tensors (searched {_listed(file.name for file in files)})")
    metadata: dict[str, str] = {}
    for header in headers:
        metadata = {**header.metadata, **metadata}
    present = [directory / name for name in _list_names(directory) if name.endswith(_SUFFIX)] if path.is_dir() else []
    used = set(files)
    ignored = tuple(file for file in present if file not in used)
    remarks += stray_files(index.name if index else None, (file.name for file in ignored))
    return Checkpoint(
        path=path,
        tensors=MappingProxyType(tensors),
        config=config,
        metadata=MappingProxyType(metadata),
        files=tuple(files),
        ignored=ignored,
        remarks=tuple(remarks),
        stamps=MappingProxyType(stamps),
        index=index,
    )


# ------------------------------------------------------------------------------------------------ finding the files


def _find_weights(path: Path) -> tuple[Path, Path | None, list[Path]]:
    """Find the checkpoint's directory and its index, or, without an index, its files."""
    if not _exists(path):
        raise ModelNotFound(_describe_missing(path))
    if not path.is_dir():
        if path.name.endswith(_PICKLES):
            raise CheckpointError(_describe_pickles(path.parent, [path.name]))
        if path.name.endswith(INDEX_SUFFIX):
            return path.parent, path, []
        return path.parent, None, [path]
    names = _list_names(path)
    weights = [name for name in names if name.endswith((_SUFFIX, INDEX_SUFFIX))]
    # Some models include a second copy of the weights, in the publisher's format (Mistral's consolidated.safetensors).
    weights = [name for name in weights if not name.startswith(SECONDARY)] or weights
    indexes = [name for name in weights if name.endswith(INDEX_SUFFIX)]
    # If there are both an index and a model.safetensors that the index doesn't list, transformers loads the file and
    # mergekit the shards. We follow mergekit, whose recipes we run; the file is listed as ignored.
    if INDEX in indexes:
        return path, path / INDEX, []
    if len(indexes) > 1:
        raise CheckpointError(
            f"{path}: has several indexes ({_listed(indexes)}) and none is {INDEX}: give the path of the one to use"
        )
    if indexes:
        return path, path / indexes[0], []
    if SINGLE in weights:  # like transformers, which ignores all other files
        return path, None, [path / SINGLE]
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


def describe_no_weights(path: Path, names: Sequence[str]) -> str:
    """Describe what a directory without safetensors files contains instead, as an error."""
    pickles = [name for name in names if name.endswith(_PICKLES) and not name.startswith(_NOT_WEIGHTS)]
    if pickles and all(name.startswith(ADAPTER) for name in pickles):
        return (
            f"{path}: is an adapter ({_listed(pickles)}), not a model: merge it into its base model with PEFT's "
            "merge_and_unload, save the result with save_pretrained, and use that"
        )
    if pickles:
        return _describe_pickles(path, pickles)
    if (path / "snapshots").is_dir():
        return f"{path}: is a model's folder in the Hub's cache: use one of the directories in {path / 'snapshots'}"
    others = [name for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".npz"))]
    if others:
        return f"{path}: has {_listed(others)}, which mergeloom can't read: download the model's safetensors files"
    content = f"it contains {_listed(names)}" if names else "it is empty"
    return f"{path}: has no weights ({content}): a model needs *.safetensors files; download the model again"


def _describe_pickles(directory: Path, names: Sequence[str]) -> str:
    return (
        f"{directory}: its weights are Python pickles ({_listed(names)}), which can run any code when they are loaded: "
        "mergeloom never opens them. If you trust them, convert them once:\n\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"    source, target = {str(directory)!r}, {str(directory) + '-safetensors'!r}\n"
        '    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto")\n'
        "    model.save_pretrained(target, safe_serialization=True)\n"
        "    AutoTokenizer.from_pretrained(source).save_pretrained(target)\n\n"
        "(with the model's own class if it is not a causal language model), and use the new directory"
    )


def _listed(names: Iterable[str]) -> str:
    """The first four names, quoted, and the number of the others."""
    shown = [quoted(name) for name in names]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + more


# ------------------------------------------------------------------------------------------------ index and config


def read_config(file: Path) -> dict[str, Any] | None:
    """Read a config.json; None if it does not exist. Raises CheckpointError if it is not an object or too large."""
    if not _exists(file) and not file.is_symlink():
        return None
    config = read_json(file, MAX_CONFIG_BYTES, required=True)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: is {quoted(config)}, not an object: download it again")
    return config


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the weight map of an index: tensor name -> shard, as a validated path relative to the index's directory."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ValueError("duplicate key")
        return document

    document = read_json(index, MAX_INDEX_BYTES, required=True, hook=refuse_duplicates)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map object, so it is not a valid index: download it again")
    if not weight_map:
        raise CheckpointError(f"{index}: its weight_map is empty: download it again")
    checked: dict[object, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index}: expected a file name for tensor {quoted(name)}, got {quoted(shard)}")
        if shard not in checked:
            checked[shard] = _check_shard_name(index, name, shard)
        weight_map[name] = checked[shard]
    return weight_map


def _check_shard_name(index: Path, name: str, shard: str) -> str:
    prefix = f"{index}: names {quoted(shard)} as the file of tensor {quoted(name)}"
    # By the rules of both POSIX and Windows, because the index may come from either.
    parts = (*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts)
    leaves = shard.startswith(("/", "\\")) or PureWindowsPath(shard).drive or ".." in parts
    if leaves or "\0" in shard:
        raise CheckpointError(f"{prefix}, which leads out of the model's directory: don't trust this model's files")
    if shard.endswith(_PICKLES):
        raise CheckpointError(_describe_pickles(index.parent, [shard]))
    if not shard.endswith(_SUFFIX):
        raise CheckpointError(f"{prefix}, which is not a .safetensors file: download the index again")
    return str(PurePosixPath(shard))  # "./x" and "x" are one file


def _find_shards(index: Path, shards: Sequence[str]) -> list[Path]:
    """The paths of an index's shards. A shard may be a link to anywhere, as in the Hub's cache."""
    missing = [shard for shard in shards if not _exists(index.parent / shard)]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of the {len(shards)} files that it names are missing from {index.parent}: "
            f"{_listed(missing)}: download them (`hf download` resumes)"
        )
    return [index.parent / shard for shard in shards]


# ------------------------------------------------------------------------------------------------ headers into one map


def _read_headers(files: Sequence[Path]) -> list[Header]:
    if len(files) == 1:
        return [read_header(files[0])]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="headers") as pool:
        pending = [pool.submit(read_header, file) for file in files]
        try:
            return [future.result() for future in pending]  # the error of the first bad file
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def merge_headers(files: Sequence[Path], headers: Sequence[Header]) -> dict[str, TensorRef]:
    """Map names to tensors for files without an index. Raises CheckpointError if a name occurs twice."""
    tensors: dict[str, TensorRef] = {}
    for file, header in zip(files, headers, strict=True):
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: contains tensor {quoted(name)}, and so does {tensors[name].file}, and no index says "
                    "which one to use: remove the file that doesn't belong to the model, or use the path of one file"
                )
            tensors[name] = tensor
    return tensors


def follow_index(
    index: Path, weight_map: Mapping[str, str], files: Sequence[Path], headers: Sequence[Header]
) -> tuple[dict[str, TensorRef], list[str]]:
    """Map names to tensors for an index and its shards, with remarks on disagreements between the two.

    A tensor that the index doesn't list is part of the checkpoint: transformers takes only the shards' names from the
    index and loads all their tensors, so people know the model with this tensor. A tensor in several shards is taken
    from the one that the index names, like in mergekit (transformers takes the last one). If the index names none of
    them, it is an error.
    """
    tensors: dict[str, TensorRef] = {}
    unlisted: list[str] = []
    copies: list[str] = []
    for file, header in zip(files, headers, strict=True):
        for name, tensor in header.tensors.items():
            listed = weight_map.get(name)
            if listed is None:
                if name in tensors:
                    raise CheckpointError(
                        f"{index}: doesn't list tensor {quoted(name)}, which {tensors[name].file.name} and {file.name} "
                        "both contain: add it to the index's weight_map to say which one to use"
                    )
                unlisted.append(name)
            elif index.parent / listed != file:
                copies.append(name)
                continue
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        name = absent[0]
        elsewhere = [file.name for file, header in zip(files, headers, strict=True) if name in header.tensors]
        hint = f"; it is in {_listed(elsewhere)} instead" if elsewhere else ""
        more = f" (and {len(absent) - 1} more such tensors)" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{index}: says that tensor {quoted(name)} is in {quoted(weight_map[name])}, which doesn't contain it{hint}"
            f"{more}: the index and the files are from different versions; download both again"
        )
    remarks = []
    if unlisted:
        remarks.append(
            f"{index.name} doesn't list {_listed(unlisted)}, which its files contain: used, like in transformers"
        )
    if copies:
        remarks.append(f"{_listed(copies)}: in several files; the copy in the file that {index.name} names is used")
    return tensors, remarks
