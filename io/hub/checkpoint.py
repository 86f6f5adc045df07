"""A model of the Hugging Face Hub as a checkpoint: opened by its headers, and which of its files a merge needs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from xxhash import xxh3_128

from ...errors import CheckpointError
from ..companions import LARGEST_COMPANION, file_kind
from ..open_source import quoted
from ..safetensors.checkpoint import (
    INDEX,
    INDEX_SUFFIX,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    SECONDARY,
    SINGLE,
    Checkpoint,
    describe_no_weights,
    follow_index,
    open_checkpoint,
    read_config,
    read_weight_map,
    unite,
)
from ..safetensors.header import Header, data_start, parse_header, read_header
from ..safetensors.tensors import TensorRef
from .download import download
from .http import Place, in_parallel, read_file
from .repository import NOT_HERE, HubFile, Repository, cached_snapshot, find_repository, header_cache, write_whole

MAX_HEADERS_BYTES = 256_000_000
"""The most bytes that the headers of one model may have: some 2,000,000 tensors."""

_THREADS = 16  # a header is a round trip or two, and little else
_FIRST_REQUEST = 64 << 10  # bytes of a header whose length nothing foretells
_LARGEST_GUESS = 1 << 20
_ENTRY = 112  # bytes of a tensor in a header beside its name: dtype, shape, two offsets, JSON's own


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint(Checkpoint):
    """A checkpoint of the Hub. The files of its tensors needn't be here yet: `needed_files` and `download` bring them.

    Args:
        repository: where it comes from, and its files.
    """

    repository: Repository

    def identity(self, file: Path) -> str:
        """What tells whether one of its files is still the same one, as `file_identity`: by its hash, unread."""
        etag = _file_at(self.repository, file).etag
        return xxh3_128(b"mergeloom hub 1" + etag.encode()).hexdigest()


def open_hub_model(repo: str, revision: str | None = None) -> Checkpoint:
    """Open a model of the Hub: its config and index, and of its weights the headers only.

    The revision is resolved once, to the commit that all else is asked of. What was fetched is kept: opening the same
    revision again makes one request, for the commit, and none where the revision is a commit. Files that are in
    huggingface_hub's cache are read there. The rules are those of `open_checkpoint`.

    Args:
        repo: its id, such as ``meta-llama/Llama-3.1-8B``.
        revision: a branch, tag or commit; None for ``main``.

    Returns:
        A `HubCheckpoint`, or a plain one of the cache's directory where requests are forbidden (HF_HUB_OFFLINE) and
        another program downloaded the model.

    Raises:
        CheckpointError: there is no such model, it may not be read, or is no valid checkpoint.
        EnvironmentFailure: the Hub can't be reached, or the disk got in the way.
    """
    repository = find_repository(repo, revision)
    if repository is None:
        snapshot = cached_snapshot(repo, revision)
        if snapshot is None:
            raise CheckpointError(f"{Place(repo, revision or 'main')}: {NOT_HERE}")
        return open_checkpoint(snapshot)
    with _named(repository):
        return _open(repository)


def needed_files(checkpoint: Checkpoint, used: Iterable[TensorRef]) -> tuple[HubFile, ...]:
    """The files of a checkpoint of the Hub that hold the tensors in `used`, by name; none of a local checkpoint.

    Those with ``present`` are here already; ``to_fetch`` is what `download` must still transfer for one.
    """
    if not isinstance(checkpoint, HubCheckpoint):
        return ()
    paths = sorted({tensor.file for tensor in used} & set(checkpoint.files))
    return tuple(_file_at(checkpoint.repository, path) for path in paths)


def companions(checkpoint: Checkpoint) -> tuple[HubFile, ...]:
    """The files beside the weights of a checkpoint of the Hub that an output may take over; none of a local one.

    More than `companion_files` then takes: which Python files and modules belong to the model is written in these.
    """
    if not isinstance(checkpoint, HubCheckpoint):
        return ()
    files = checkpoint.repository.files
    names = [name for name in sorted(files) if file_kind(name) or (name.endswith(".py") and "/" not in name)]
    return tuple(files[name] for name in names if name.count("/") < 2 and files[name].nbytes <= LARGEST_COMPANION)


def _file_at(repository: Repository, path: Path) -> HubFile:
    return repository.files[path.relative_to(repository.snapshot).as_posix()]


@contextmanager
def _named(repository: Repository) -> Iterator[None]:
    """Let errors name the model, not the place in the cache where its file will be one day."""
    try:
        yield
    except CheckpointError as error:
        text = str(error).replace(f"{repository.snapshot}/", f"{repository.place}/")
        raise CheckpointError(text.replace(str(repository.snapshot), str(repository.place))) from error


# ------------------------------------------------------------------------------------------------ opening


def _open(repository: Repository) -> HubCheckpoint:
    """Choose a repository's files by the rules of `open_checkpoint`, and read their headers."""
    files, snapshot = repository.files, repository.snapshot
    names = [name for name in sorted(files) if "/" not in name and not name.startswith(".")]
    index, shards = _choose(repository, names)
    small = [(files["config.json"], MAX_CONFIG_BYTES)] if "config.json" in files else []
    if index is not None:
        small.append((files[index], MAX_INDEX_BYTES))
    for file, limit in small:
        if file.nbytes > limit:
            raise CheckpointError(
                f"{file.path}: has {file.nbytes:,} bytes, where {limit:,} are the most that make sense"
            )
    download(file for file, _ in small)
    config = read_config(snapshot / "config.json") if "config.json" in files else None
    remarks: list[str] = []
    if index is None:
        headers = _read_headers([files[name] for name in shards], {})
        tensors = unite([files[name].path for name in shards], headers)
    else:
        weight_map = read_weight_map(snapshot / index)
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if shard not in files]
        if absent:
            raise CheckpointError(
                f"{snapshot / index}: {len(absent)} of the {len(shards)} files that it names aren't in the repository: "
                f"{', '.join(map(quoted, absent[:4]))}: its upload is unfinished, or another revision has them"
            )
        headers = _read_headers([files[name] for name in shards], _expected_lengths(weight_map))
        tensors, remarks = follow_index(snapshot / index, weight_map, [files[name].path for name in shards], headers)
    if not tensors:
        raise CheckpointError(f"{snapshot}: holds no tensors (looked into {', '.join(map(quoted, shards[:4]))})")
    metadata: dict[str, str] = {}
    for header in headers:
        metadata = {**header.metadata, **metadata}
    used = set(shards)
    return HubCheckpoint(
        path=snapshot,
        tensors=MappingProxyType(tensors),
        config=config,
        metadata=MappingProxyType(metadata),
        files=tuple(files[name].path for name in shards),
        ignored=tuple(files[name].path for name in names if name.endswith(".safetensors") and name not in used),
        remarks=tuple(remarks),
        repository=repository,
    )


def _choose(repository: Repository, names: Sequence[str]) -> tuple[str | None, list[str]]:
    """The index among the names of a repository's own directory, else the names of its weights.

    As `checkpoint._find_weights` chooses in a directory; a test holds the two against each other.
    """
    weights = [name for name in names if name.endswith((".safetensors", INDEX_SUFFIX))]
    weights = [name for name in weights if not name.startswith(SECONDARY)] or weights
    indexes = [name for name in weights if name.endswith(INDEX_SUFFIX)]
    if INDEX in indexes:
        return INDEX, []
    if len(indexes) > 1:
        raise CheckpointError(
            f"{repository.place}: has several indexes ({', '.join(map(quoted, indexes[:4]))}) and none is {INDEX}: "
            "download it, and give the path of the one to use"
        )
    if indexes:
        return indexes[0], []
    if SINGLE in weights:
        return None, [SINGLE]
    if not weights:
        raise CheckpointError(describe_no_weights(Path(repository.repo), names))
    return None, weights


# ------------------------------------------------------------------------------------------------ headers


def _expected_lengths(weight_map: Mapping[str, str]) -> dict[str, int]:
    """About how many bytes the header of each shard has, somewhat more rather than less."""
    lengths: dict[str, int] = {}
    for name, shard in weight_map.items():
        lengths[shard] = lengths.get(shard, 1024) + len(name) + _ENTRY
    return {shard: min(length, _LARGEST_GUESS) for shard, length in lengths.items()}


def _read_headers(files: Sequence[HubFile], expected: Mapping[str, int]) -> list[Header]:
    """The headers of files, in their order, from wherever they are nearest."""
    allowance = _Allowance(MAX_HEADERS_BYTES)
    return in_parallel(
        lambda file, stop: _read_header(file, expected.get(file.name, _FIRST_REQUEST), allowance, stop),
        files,
        min(_THREADS, len(files)),
    )


class _Allowance:
    """How many bytes of headers may still come: a server must not fill the memory."""

    def __init__(self, nbytes: int) -> None:
        self._lock = threading.Lock()
        self._left = nbytes

    def take(self, file: HubFile, nbytes: int) -> None:
        """Count a header. Raises CheckpointError where they are too many."""
        with self._lock:
            self._left -= nbytes
            if self._left < 0:
                raise CheckpointError(
                    f"{file.path}: with its header of {nbytes:,} bytes, the model's headers have more than "
                    f"{MAX_HEADERS_BYTES:,}, which is the most that makes sense"
                )


def _read_header(file: HubFile, expected: int, allowance: _Allowance, stop: threading.Event) -> Header:
    """The header of a file: of the file itself if it is here, as it was kept from last time, or by range requests."""
    if file.present:
        return read_header(file.path)
    kept = header_cache(file)
    with suppress(OSError, CheckpointError):
        raw = kept.read_bytes()
        if len(raw) == data_start(raw[:8], file.nbytes, file=file.path):
            return parse_header(raw, file.nbytes, file=file.path)
    raw = b"".join(read_file(file.place, file.url, 0, min(expected, file.nbytes), file.nbytes, stop))
    start = data_start(raw[:8], file.nbytes, file=file.path)
    allowance.take(file, start)
    raw += b"".join(read_file(file.place, file.url, len(raw), start, file.nbytes, stop))
    header = parse_header(raw, file.nbytes, file=file.path)
    write_whole(kept, raw[:start])
    return header
