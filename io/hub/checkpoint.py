"""Opens models on the Hugging Face Hub as checkpoints from their headers, and lists the files that a merge needs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from xxhash import xxh3_128

from ...errors import CheckpointError, ModelNotFound
from ..checkpoint.checkpoint import (
    INDEX,
    INDEX_SUFFIX,
    MAX_CONFIG_BYTES,
    SECONDARY,
    Checkpoint,
    open_checkpoint,
    read_config,
)
from ..checkpoint.contents import Contents, Extras
from ..checkpoint.file_sets import ONLY_FILES, check_file_set, stray_files, unlisted_shards
from ..checkpoint.index import MAX_INDEX_BYTES, follow_index, merge_headers, read_weight_map
from ..checkpoint.other_weights import describe_no_weights
from ..checkpoint.torch_names import choose_torch_files, is_torch_name, torch_files
from ..companions import LARGEST_COMPANION, file_kind
from ..open_source import quoted
from ..safetensors.header import Header, data_start, parse_header, read_header
from ..small_files import check_size
from ..tensors.assembled import files_of
from ..tensors.refs import TensorRef
from .download import download
from .http import HubLocation, in_parallel, read_file
from .repository import NOT_CACHED, HubFile, Repository, cached_snapshot, find_repository, header_cache, write_cache

MAX_HEADERS_BYTES = 256_000_000
"""The maximum size of all headers of a model in bytes, enough for about 2,000,000 tensors."""

_THREADS = 16  # reading a header takes one or two round trips and little else
_FIRST_REQUEST = 64 << 10  # bytes to request of a header of unknown length
_LARGEST_GUESS = 1 << 20
_ENTRY = 112  # bytes of a tensor's entry in a header in addition to its name


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class HubCheckpoint(Checkpoint):
    """A checkpoint on the Hub. Its files need not be downloaded yet; see `needed_files` and `download`.

    Args:
        repository: the repository at the checkpoint's commit.
    """

    repository: Repository

    def identity(self, file: Path) -> str:
        """The identity of a file, like `file_identity`, from its hash on the Hub and without reading it."""
        etag = _file_at(self.repository, file).etag
        return xxh3_128(b"mergeloom hub 1" + etag.encode()).hexdigest()


def open_hub_model(repo: str, revision: str | None = None) -> Checkpoint:
    """Open a model on the Hub. Downloads its config.json, its index and the headers of its weights.

    The revision is resolved once, and all other requests use its commit. Results are cached: opening the same revision
    again makes one request, which resolves the revision, and none if the revision is a commit. Files in
    huggingface_hub's cache are read from there. Files are selected by the rules of `open_checkpoint`.

    Args:
        repo: the repository id, such as ``meta-llama/Llama-3.1-8B``.
        revision: a branch, tag or commit; None for ``main``.

    Returns:
        A `HubCheckpoint`; a plain `Checkpoint` of the cached snapshot if HF_HUB_OFFLINE is set and another program
        downloaded the model.

    Raises:
        CheckpointError: the model does not exist, is not accessible, or is not a valid checkpoint.
        EnvironmentFailure: the Hub is not reachable, or reading failed.
    """
    repository = find_repository(repo, revision)
    if repository is None:
        snapshot = cached_snapshot(repo, revision)
        if snapshot is None:
            raise ModelNotFound(f"{HubLocation(repo, revision or 'main', implied=revision is None)}: {NOT_CACHED}")
        return open_checkpoint(snapshot)
    with _naming_model(repository):
        return _open(repository)


def needed_files(checkpoint: Checkpoint, used: Iterable[TensorRef]) -> tuple[HubFile, ...]:
    """List the files of a checkpoint on the Hub that contain the tensors in `used`; empty for a local checkpoint.

    The list includes files that are downloaded already; see ``HubFile.present`` and ``HubFile.to_fetch``.
    """
    if not isinstance(checkpoint, HubCheckpoint):
        return ()
    paths = sorted({file for tensor in used for file in files_of(tensor)} & set(checkpoint.files))
    return tuple(_file_at(checkpoint.repository, path) for path in paths)


def companions(checkpoint: Checkpoint) -> tuple[HubFile, ...]:
    """List the candidate companion files of a checkpoint on the Hub; empty for a local checkpoint.

    These are more files than `companion_files` selects after their download: only their content says which Python files
    and modules belong to the model.
    """
    if not isinstance(checkpoint, HubCheckpoint):
        return ()
    files = checkpoint.repository.files
    names = [name for name in sorted(files) if file_kind(name) or (name.endswith(".py") and "/" not in name)]
    return tuple(files[name] for name in names if name.count("/") < 2 and files[name].nbytes <= LARGEST_COMPANION)


def card_of(checkpoint: Checkpoint) -> HubFile | None:
    """The model card of a checkpoint on the Hub; None if it has none, and for a local checkpoint."""
    return checkpoint.repository.files.get("README.md") if isinstance(checkpoint, HubCheckpoint) else None


def _file_at(repository: Repository, path: Path) -> HubFile:
    return repository.files[path.relative_to(repository.snapshot).as_posix()]


@contextmanager
def _naming_model(repository: Repository) -> Iterator[None]:
    """Replace the path of the snapshot in errors with the name of the model: the files may not exist yet."""
    try:
        yield
    except CheckpointError as error:
        text = str(error).replace(f"{repository.snapshot}/", f"{repository.location}/")
        raise CheckpointError(text.replace(str(repository.snapshot), str(repository.location))) from error


# ------------------------------------------------------------------------------------------------ opening


def _open(repository: Repository) -> HubCheckpoint:
    """Select a repository's files by the rules of `open_checkpoint` and read their headers."""
    files, snapshot = repository.files, repository.snapshot
    names = [name for name in sorted(files) if "/" not in name and not name.startswith(".")]
    index, shards = _choose(repository, names)
    small = [(files["config.json"], MAX_CONFIG_BYTES)] if "config.json" in files else []
    if index is not None:
        small.append((files[index], MAX_INDEX_BYTES))
    for file, limit in small:
        check_size(file.path, file.nbytes, limit)
    download(file for file, _ in small)
    config = read_config(snapshot / "config.json") if "config.json" in files else None
    remarks: list[str] = []
    extras = Extras()
    if index is None:
        remarks = check_file_set(snapshot, shards)
        headers = extras.collect(_read_headers([files[name] for name in shards], {}))
        tensors, metadata = merge_headers([files[name].path for name in shards], headers)
    else:
        weight_map = read_weight_map(snapshot / index)
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if shard not in files]
        if absent:
            raise CheckpointError(
                f"{snapshot / index}: {len(absent)} of the {len(shards)} files that it names aren't in the repository: "
                f"{', '.join(map(quoted, absent[:4]))}: the upload is unfinished, or they are in another revision"
            )
        headers = extras.collect(_read_headers([files[name] for name in shards], _expected_lengths(weight_map)))
        paths = [files[name].path for name in shards]
        tensors, metadata, remarks = follow_index(snapshot / index, weight_map, paths, headers)
        remarks += unlisted_shards(index, shards)
    if not tensors:
        raise CheckpointError(f"{snapshot}: contains no tensors (searched {', '.join(map(quoted, shards[:4]))})")
    used = set(shards)
    alike = [name for name in names if name.endswith(".safetensors")]
    if is_torch_name(shards[0]):
        alike += torch_files(names)
    ignored = [name for name in alike if name not in used]
    remarks += stray_files(index, ignored) + extras.remarks()
    return HubCheckpoint(
        path=snapshot,
        tensors=tensors,
        config=config,
        metadata=MappingProxyType(metadata),
        files=tuple(files[name].path for name in shards),
        ignored=tuple(files[name].path for name in ignored),
        remarks=tuple(remarks),
        index=None if index is None else snapshot / index,
        views=MappingProxyType(extras.views(tensors)),
        kind=extras.kind,
        repository=repository,
    )


def _choose(repository: Repository, names: Sequence[str]) -> tuple[str | None, list[str]]:
    """Choose the index among the names in a repository's root, or, without an index, the names of its weights.

    The rules are those of `checkpoint._find_weights` for a directory; a test compares the two.
    """
    weights = [name for name in names if name.endswith((".safetensors", INDEX_SUFFIX))]
    if all(name.startswith(SECONDARY) for name in weights):
        index, shards = choose_torch_files(names)
        if index or shards:
            return index, shards
    weights = [name for name in weights if not name.startswith(SECONDARY)] or weights
    indexes = [name for name in weights if name.endswith(INDEX_SUFFIX)]
    if INDEX in indexes:
        return INDEX, []
    if len(indexes) > 1:
        raise CheckpointError(
            f"{repository.location}: has several indexes ({', '.join(map(quoted, indexes[:4]))}) and none is {INDEX}: "
            "download the model and use the path of the right one"
        )
    if indexes:
        return indexes[0], []
    if only := [name for name in ONLY_FILES if name in weights]:
        return None, only[:1]
    if not weights:
        raise CheckpointError(describe_no_weights(Path(repository.repo), names))
    return None, weights


# ------------------------------------------------------------------------------------------------ headers


def _expected_lengths(weight_map: Mapping[str, str]) -> dict[str, int]:
    """Estimate the size in bytes of each shard's header, preferably too large."""
    lengths: dict[str, int] = {}
    for name, shard in weight_map.items():
        lengths[shard] = lengths.get(shard, 1024) + len(name) + _ENTRY
    return {shard: min(length, _LARGEST_GUESS) for shard, length in lengths.items()}


def _read_headers(files: Sequence[HubFile], expected: Mapping[str, int]) -> Sequence[Contents]:
    """Read the headers of files concurrently, from the disk, the cache or the Hub, in the order of the files."""
    limit = _HeaderLimit(MAX_HEADERS_BYTES)
    if is_torch_name(files[0].name):  # each needs many requests, which are concurrent
        from .torch_file import read_hub_torch_file

        return [read_hub_torch_file(file, limit.count) for file in files]
    return in_parallel(
        lambda file, stop: _read_header(file, expected.get(file.name, _FIRST_REQUEST), limit, stop),
        files,
        min(_THREADS, len(files)),
    )


class _HeaderLimit:
    """Limits the total size of downloaded headers, so a malicious server can't exhaust memory."""

    def __init__(self, nbytes: int) -> None:
        self._lock = threading.Lock()
        self._left = nbytes

    def count(self, file: HubFile, nbytes: int) -> None:
        """Count a header. Raises CheckpointError if the total exceeds the limit."""
        with self._lock:
            self._left -= nbytes
            if self._left < 0:
                raise CheckpointError(
                    f"{file.path}: with its header of {nbytes:,} bytes, the model's headers exceed the limit of "
                    f"{MAX_HEADERS_BYTES:,} bytes: the model is damaged or not supported"
                )


def _read_header(file: HubFile, expected: int, limit: _HeaderLimit, stop: threading.Event) -> Header:
    """Read the header of a file: from the downloaded file, from the header cache, or by range requests."""
    if file.present:
        return read_header(file.path)
    cached = header_cache(file)
    with suppress(OSError, CheckpointError):
        raw = cached.read_bytes()
        if len(raw) == data_start(raw[:8], file.nbytes, file=file.path):
            return parse_header(raw, file.nbytes, file=file.path)
    raw = b"".join(read_file(file.location, file.url, 0, min(expected, file.nbytes), file.nbytes, stop))
    start = data_start(raw[:8], file.nbytes, file=file.path)
    limit.count(file, start)
    raw += b"".join(read_file(file.location, file.url, len(raw), start, file.nbytes, stop))
    header = parse_header(raw, file.nbytes, file=file.path)
    write_cache(cached, raw[:start])
    return header
