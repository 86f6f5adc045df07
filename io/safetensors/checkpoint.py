"""A model's checkpoint: which files it consists of, and where each of its tensors lies. Reads headers only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from ...errors import CheckpointError
from ..open_source import open_source, quoted, read_range
from ..reading import Stamps, stamps_of
from .header import Header, read_header
from .tensors import TensorRef

MAX_INDEX_BYTES = 256_000_000
"""The largest index that is read, in bytes: some 2,000,000 tensors."""

MAX_CONFIG_BYTES = 64_000_000
"""The largest config.json that is read, in bytes."""

INDEX_SUFFIX = ".safetensors.index.json"
_SUFFIX = ".safetensors"
INDEX = "model" + INDEX_SUFFIX
"""The file that says which shard each tensor is in."""
SINGLE = "model" + _SUFFIX
"""The only file of a model without shards."""
SECONDARY = ("consolidated", "adapter_model")
"""How files begin that aren't the weights: the same ones under the maker's own names, an adapter to them."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # pickles that a training run leaves
_THREADS = 8  # headers on a network file system are latency; parsing holds the interpreter's lock anyway


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk.

    Args:
        path: as it was asked for: a directory, a .safetensors file or an index.
        tensors: the tensors by name; files in the order of their names, and in each the order of their bytes.
        config: what config.json beside the weights says; None where there is none.
        metadata: the ``__metadata__`` of the files; where they differ, the first file's word.
        files: the files that hold the tensors, in the order of their names.
        ignored: other .safetensors files in the same directory: stale shards, other formats of the same weights.
        remarks: what the user should be told of: sentences, each about a disagreement between the index and its shards.
        stamps: what the files were before their headers were read; none of files that aren't here yet.
    """

    path: Path
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    files: tuple[Path, ...]
    ignored: tuple[Path, ...]
    remarks: tuple[str, ...] = ()
    stamps: Stamps = field(default_factory=dict)


def open_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint's files and read their headers.

    A directory's index says which files belong to the checkpoint (``model.safetensors.index.json``, else the only
    ``*.safetensors.index.json``); without one ``model.safetensors`` is all of it; without that all of its .safetensors
    files together are. Files called ``consolidated*`` or ``adapter_model*`` count only where there is nothing else.

    Args:
        path: a directory, a .safetensors file, or an index (``*.safetensors.index.json``).

    Raises:
        CheckpointError: nothing is there, the weights are pickles, a file is missing or damaged, the index leaves the
            directory or disagrees with its shards, or two files hold a tensor of the same name.
        EnvironmentFailure: the disk got in the way.
    """
    directory, index, files = _find_weights(path)
    config = read_config(directory / "config.json")
    remarks: list[str] = []
    if index is None:
        stamps = stamps_of(files)
        headers = _read_headers(files)
        tensors = unite(files, headers)
    else:
        weight_map = read_weight_map(index)
        files = _find_shards(index, sorted(set(weight_map.values())))
        stamps = stamps_of(files)
        headers = _read_headers(files)
        tensors, remarks = follow_index(index, weight_map, files, headers)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors (looked into {_listed(file.name for file in files)})")
    metadata: dict[str, str] = {}
    for header in headers:
        metadata = {**header.metadata, **metadata}
    present = [directory / name for name in _list_names(directory) if name.endswith(_SUFFIX)] if path.is_dir() else []
    used = set(files)
    return Checkpoint(
        path=path,
        tensors=MappingProxyType(tensors),
        config=config,
        metadata=MappingProxyType(metadata),
        files=tuple(files),
        ignored=tuple(file for file in present if file not in used),
        remarks=tuple(remarks),
        stamps=MappingProxyType(stamps),
    )


# ------------------------------------------------------------------------------------------------ finding the files


def _find_weights(path: Path) -> tuple[Path, Path | None, list[Path]]:
    """The directory of the checkpoint, its index if it has one, and else its files."""
    if not _exists(path):
        raise CheckpointError(_describe_missing(path))
    if not path.is_dir():
        if path.name.endswith(_PICKLES):
            raise CheckpointError(_describe_pickles(path.parent, [path.name]))
        if path.name.endswith(INDEX_SUFFIX):
            return path.parent, path, []
        return path.parent, None, [path]
    names = _list_names(path)
    weights = [name for name in names if name.endswith((_SUFFIX, INDEX_SUFFIX))]
    # A model's maker may add the same weights under names of his own (Mistral's consolidated.safetensors): together
    # they would be the model twice.
    weights = [name for name in weights if not name.startswith(SECONDARY)] or weights
    indexes = [name for name in weights if name.endswith(INDEX_SUFFIX)]
    # Where an index and model.safetensors stand side by side and the index doesn't name the file, transformers loads
    # the file and mergekit the shards. We follow mergekit, whose recipes we run, and the file is listed as ignored.
    if INDEX in indexes:
        return path, path / INDEX, []
    if len(indexes) > 1:
        raise CheckpointError(
            f"{path}: has several indexes ({_listed(indexes)}) and none is {INDEX}: give the path of the one to use"
        )
    if indexes:
        return path, path / indexes[0], []
    if SINGLE in weights:  # as transformers has it: other files beside it belong to something else
        return path, None, [path / SINGLE]
    if weights:
        return path, None, [path / name for name in weights]
    raise CheckpointError(describe_no_weights(path, names))


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # no permission, a loop of links; a NUL or half a character in the name
        reason = error.strerror if isinstance(error, OSError) else "no system has such a name"
        raise CheckpointError(
            f"{quoted(str(path))}: can't be looked up ({reason}): check the path and its owner"
        ) from None
    return True


def _list_names(directory: Path) -> list[str]:
    """The names in a directory, sorted; without hidden ones, such as the ._model.safetensors that macOS leaves."""
    try:
        return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{directory}: can't be listed ({error.strerror}): check its owner and mode") from error


def _describe_missing(path: Path) -> str:
    if path.is_symlink():
        return f"{path}: is a broken link: download the model again"
    found = f"{path}: there is no such directory or file here"
    if not path.is_absolute() and len(path.parts) == 2 and ".." not in path.parts:
        return (
            f"{found}. If it is a model of the Hugging Face Hub: recipes name it by this id, `mergeloom plan` reads "
            f"its headers there, and `hf download {path} --local-dir {path.name}` brings it here"
        )
    return f"{found}: check the path"


def describe_no_weights(path: Path, names: Sequence[str]) -> str:
    """What to say of a directory without weights to read, of the files that it has instead."""
    pickles = [name for name in names if name.endswith(_PICKLES) and not name.startswith(_NOT_WEIGHTS)]
    if pickles:
        return _describe_pickles(path, pickles)
    if (path / "snapshots").is_dir():
        return f"{path}: is a model's folder in the Hub's cache: give one of the directories in {path / 'snapshots'}"
    others = [name for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".npz"))]
    if others:
        return f"{path}: has no safetensors files, only {_listed(others)}, which mergeloom doesn't read: get the former"
    held = f"it holds {_listed(names)}" if names else "it is empty"
    return f"{path}: has no weights ({held}): a model's directory has *.safetensors files; download the model again"


def _describe_pickles(directory: Path, names: Sequence[str]) -> str:
    return (
        f"{directory}: its weights are Python pickles ({_listed(names)}), which can run any code when they are loaded: "
        "mergeloom never opens them. Where you trust them, convert them once:\n\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"    source, target = {str(directory)!r}, {str(directory) + '-safetensors'!r}\n"
        '    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto")\n'
        "    model.save_pretrained(target, safe_serialization=True)\n"
        "    AutoTokenizer.from_pretrained(source).save_pretrained(target)\n\n"
        "(with the model's own class if it is no causal language model), and give the new directory"
    )


def _listed(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    shown = [quoted(name) for name in names]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + more


# ------------------------------------------------------------------------------------------------ index and config


def _read_json(file: Path, limit: int, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    with open_source(file) as (descriptor, size):
        if size > limit:
            raise CheckpointError(f"{file}: has {size:,} bytes, where {limit:,} are the most that make sense")
        raw = read_range(descriptor, 0, size, file=file)
    try:
        return json.loads(raw.decode(), object_pairs_hook=hook)
    except RecursionError:
        raise CheckpointError(f"{file}: nests lists or objects too deeply: download it again") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise CheckpointError(f"{file}: is not valid JSON ({error}): download it again") from None


def read_config(file: Path) -> dict[str, Any] | None:
    """A config.json; None where there is none. Raises CheckpointError where it is no object, or too large."""
    if not _exists(file) and not file.is_symlink():
        return None
    config = _read_json(file, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: is {quoted(config)}, not an object: download it again")
    return config


def read_weight_map(index: Path) -> dict[str, str]:
    """The index's tensor name -> shard, the shard as a checked path relative to the index's directory."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands there twice")
        return found

    document = _read_json(index, MAX_INDEX_BYTES, refuse_duplicates)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map object, so it is no index of shards: download it again")
    if not weight_map:
        raise CheckpointError(f"{index}: its weight_map is empty: it names no tensors: download it again")
    checked: dict[object, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index}: gives {quoted(shard)}, not a file name, for tensor {quoted(name)}")
        if shard not in checked:
            checked[shard] = _check_shard_name(index, name, shard)
        weight_map[name] = checked[shard]
    return weight_map


def _check_shard_name(index: Path, name: str, shard: str) -> str:
    place = f"{index}: names {quoted(shard)} as the file of tensor {quoted(name)}"
    # By the rules of both systems, since an index says nothing of where it was written.
    parts = (*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts)
    leaves = shard.startswith(("/", "\\")) or PureWindowsPath(shard).drive or ".." in parts
    if leaves or "\0" in shard:
        raise CheckpointError(f"{place}, which leaves the model's directory: don't trust this model's files")
    if shard.endswith(_PICKLES):
        raise CheckpointError(_describe_pickles(index.parent, [shard]))
    if not shard.endswith(_SUFFIX):
        raise CheckpointError(f"{place}, which is no .safetensors file: download the index again")
    return str(PurePosixPath(shard))  # "./x" and "x" are one file


def _find_shards(index: Path, shards: Sequence[str]) -> list[Path]:
    """The paths of an index's shards. A shard may be a link to anywhere: the Hub's cache is made so."""
    missing = [shard for shard in shards if not _exists(index.parent / shard)]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of the {len(shards)} files that it names are missing from {index.parent}: "
            f"{_listed(missing)}: download them (`hf download` goes on where it stopped)"
        )
    return [index.parent / shard for shard in shards]


# ------------------------------------------------------------------------------------------------ headers into one map


def _read_headers(files: Sequence[Path]) -> list[Header]:
    if len(files) == 1:
        return [read_header(files[0])]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="headers") as pool:
        pending = [pool.submit(read_header, file) for file in files]
        try:
            return [future.result() for future in pending]  # in the files' order: the first bad file is the error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def unite(files: Sequence[Path], headers: Sequence[Header]) -> dict[str, TensorRef]:
    """The tensors of all files. Raises CheckpointError where two files hold one of the same name."""
    tensors: dict[str, TensorRef] = {}
    for file, header in zip(files, headers, strict=True):
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: holds tensor {quoted(name)}, and so does {tensors[name].file}, and no index says which "
                    "counts: remove the file that doesn't belong to the model, or give the path of one file"
                )
            tensors[name] = tensor
    return tensors


def follow_index(
    index: Path, weight_map: Mapping[str, str], files: Sequence[Path], headers: Sequence[Header]
) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors of an index's shards, and remarks on where the two disagree.

    A tensor that the index doesn't list is part of the checkpoint: transformers reads the index for the names of the
    shards only and loads these whole, so such a tensor takes part in the model that people know, and leaving it out
    would lose it in silence. A tensor that several shards hold is taken from the one that the index gives, as mergekit
    does (transformers takes the last shard's): that is what an index is for. If it lists none of them, it is an error.
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
                        "both hold: nothing says which counts; add it to the index's weight_map"
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
        hint = f"; it lies in {_listed(elsewhere)} instead" if elsewhere else ""
        more = f" (and {len(absent) - 1} more such tensors)" if len(absent) > 1 else ""
        raise CheckpointError(
            f"{index}: says that tensor {quoted(name)} is in {quoted(weight_map[name])}, which doesn't hold it{hint}"
            f"{more}: the index and the files are of different versions; download both again"
        )
    remarks = []
    if unlisted:
        remarks.append(
            f"{index.name} doesn't list {_listed(unlisted)}, which its files hold: used, as transformers does"
        )
    if copies:
        remarks.append(f"{_listed(copies)}: in several files; the copy in the file that {index.name} gives is used")
    return tensors, remarks
