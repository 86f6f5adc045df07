"""Reads the index of a sharded checkpoint, and combines the headers of its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...errors import CheckpointError
from ..open_source import quoted
from ..small_files import parse_json, read_small
from ..tensors.table import TensorTable
from .contents import Contents
from .other_weights import listed_names
from .torch_names import TORCH_INDEX_SUFFIX

MAX_INDEX_BYTES = 256_000_000
"""The maximum size of an index in bytes, enough for about 2,000,000 tensors."""

_SUFFIX = ".safetensors"


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the weight map of an index: tensor name -> shard, as a validated path relative to the index's directory."""
    raw = read_small(index, MAX_INDEX_BYTES)
    document = parse_json(index, raw)
    if b"\\" in raw or raw.count(b'"') != 2 * _count_strings(document):  # twice as fast as the other parse
        document = parse_json(index, raw, _refuse_duplicates)
    weight_map = document.pop("weight_map", None) if isinstance(document, dict) else None
    del raw
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map object, so it is not a valid index: download it again")
    if not weight_map:
        raise CheckpointError(f"{index}: its weight_map is empty: download it again")
    checked: dict[object, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index}: expected a file name for tensor {quoted(name)}, got {quoted(shard)}")
        if shard not in checked:
            checked[shard] = _check_shard_name(index, name, copied(shard))
        if checked[shard] != shard:
            weight_map[name] = checked[shard]
    return weight_map


def copied(text: str) -> str:
    """A copy of a string of a weight map, for paths, which intern and keep it.

    The strings of a weight map are freed together, but each one that is kept would keep a page of them.
    """
    return "".join(list(text))


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("duplicate key")
    return document


def _count_strings(document: Any) -> int:
    """The number of strings in a JSON document, if no object has a key twice."""
    if isinstance(document, dict):
        values = document.values()
        others = (value for value in values if not isinstance(value, str))
        return len(document) + sum(map(isinstance, values, repeat(str))) + sum(map(_count_strings, others))
    if isinstance(document, list):
        return sum(map(_count_strings, document))
    return int(isinstance(document, str))


def _check_shard_name(index: Path, name: str, shard: str) -> str:
    prefix = f"{index}: names {quoted(shard)} as the file of tensor {quoted(name)}"
    # By the rules of both POSIX and Windows, because the index may come from either.
    parts = (*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts)
    leaves = shard.startswith(("/", "\\")) or PureWindowsPath(shard).drive or ".." in parts
    if leaves or "\0" in shard:
        raise CheckpointError(f"{prefix}, which leads out of the model's directory: don't trust this model's files")
    suffix = ".bin" if index.name.endswith(TORCH_INDEX_SUFFIX) else _SUFFIX
    if not shard.endswith(suffix):
        raise CheckpointError(f"{prefix}, which is not a {suffix} file: download the index again")
    return str(PurePosixPath(shard))  # "./x" and "x" are one file


def merge_headers(files: Sequence[Path], headers: Iterable[Contents]) -> tuple[TensorTable, dict[str, str]]:
    """Combine the headers of files without an index; returns the tensors and the metadata.

    Raises:
        CheckpointError: a name occurs twice.
    """
    tensors = TensorTable()
    metadata: dict[str, str] = {}
    for file, header in zip(files, headers, strict=True):
        for name in header.names if not tensors.isdisjoint(header.names) else ():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: contains tensor {quoted(name)}, and so does {tensors[name].file}, and no index says "
                    "which one to use: remove the file that doesn't belong to the model, or use the path of one file"
                )
        tensors.add(file, header.names, header.classes, header.offsets)
        metadata = {**header.metadata, **metadata}
    return tensors, metadata


def follow_index(
    index: Path, weight_map: Mapping[str, str], files: Sequence[Path], headers: Iterable[Contents]
) -> tuple[TensorTable, dict[str, str], list[str]]:
    """Combine the headers of an index's shards; returns the tensors, the metadata, and remarks on disagreements.

    A tensor that the index doesn't list is part of the checkpoint: transformers takes only the shards' names from the
    index and loads all their tensors, so people know the model with this tensor. A tensor in several shards is taken
    from the one that the index names, like in mergekit (transformers takes the last one). If the index names none of
    them, it is an error.
    """
    tensors = TensorTable()
    metadata: dict[str, str] = {}
    shard_of = {index.parent / shard: shard for shard in set(weight_map.values())}
    unlisted: list[str] = []
    copies: list[tuple[str, str]] = []  # names, and the files that the index doesn't name for them
    for file, header in zip(files, headers, strict=True):
        metadata = {**header.metadata, **metadata}
        if set(map(weight_map.get, header.names)) <= {shard_of[file]}:
            tensors.add(file, header.names, header.classes, header.offsets)
            continue
        for row, name in enumerate(header.names):
            listed = weight_map.get(name)
            if listed is None:
                if name in tensors:
                    raise CheckpointError(
                        f"{index}: doesn't list tensor {quoted(name)}, which {tensors[name].file.name} and {file.name} "
                        "both contain: add it to the index's weight_map to say which one to use"
                    )
                unlisted.append(name)
            elif listed != shard_of[file]:
                copies.append((name, file.name))
                continue
            tensors.add(file, [name], header.classes[row : row + 1], header.offsets[row : row + 1])
    absent = [] if len(tensors) == len(weight_map) + len(unlisted) else [n for n in weight_map if n not in tensors]
    if absent:
        name = absent[0]
        elsewhere = [found for copy, found in copies if copy == name]
        hint = f"; it is in {listed_names(elsewhere)} instead" if elsewhere else ""
        more = f" (and {len(absent) - 1} more such tensors)" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{index}: says that tensor {quoted(name)} is in {quoted(weight_map[name])}, which doesn't contain it{hint}"
            f"{more}: the index and the files are from different versions; download both again"
        )
    remarks = []
    if unlisted:
        remarks.append(
            f"{index.name} doesn't list {listed_names(unlisted)}, which its files contain: used, like in transformers"
        )
    if copies:
        names = listed_names(name for name, _ in copies)
        remarks.append(f"{names}: in several files; the copy in the file that {index.name} names is used")
    return tensors, metadata, remarks
