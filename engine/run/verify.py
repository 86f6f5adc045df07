"""Verifies a merged model or an extracted adapter: compares every file of OUT with the digests in its manifest."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import MergeloomError, UsageError
from ...io.checkpoint.checkpoint import Checkpoint
from ...io.counters import IoCounters
from ...io.open_source import open_source, read_range
from ...io.output.clone import BLOCK
from ...io.output.digests import BLOCK_BYTES, BlockDigests, bytes_digest, file_digest
from ...io.output.manifest_file import added_files, made_by, read_manifest
from ...io.reading import Reader
from ...io.safetensors.header import Header, parse_header, read_data_start
from ...io.tensors.refs import TensorRef
from ...io.units import data_size, plural
from ..execute.measurements import Progress
from .manifest import identity_of

THREADS = 4
"""Default number of tensors that are read at a time."""

_BUFFER_BYTES = 4 << 20

Notify = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Unverified:
    """A tensor without a digest: the merge reflinked it, or let the kernel copy it, and never read its bytes.

    Args:
        tensor: name of the tensor in OUT, with the folder of its model.
        nbytes: size of the tensor in bytes.
        model: source model, as the recipe names it.
        file: source file, relative to that model.
        offset: offset of the tensor in the source file.
        shared: whether it was to share the source's disk blocks; otherwise the kernel copied it.
        reason: why it could not be compared with its source; empty where that was not asked for.
    """

    tensor: str
    nbytes: int
    model: str
    file: str
    offset: int
    shared: bool
    reason: str = ""

    @property
    def origin(self) -> str:
        """The relation to the source model, such as ``shared with base``."""
        return f"{'shared with' if self.shared else 'copied from'} {self.model}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of `verify`.

    Args:
        tensors: number of tensors that match their digest or, with ``sources=True``, their source.
        nbytes: size of these tensors in bytes.
        files: number of files that match: shards by size and header, all others by their digest.
        damaged: one text for each part of OUT that does not match the manifest.
        added: names of files that loaders would use and mergeloom did not write.
        unverified: tensors that nothing was compared with.
        changed_sources: with ``sources=True``, source files that are not the ones that were used.
        missing_sources: with ``sources=True``, source files that could not be checked, with the reason.
    """

    tensors: int
    nbytes: int
    files: int
    damaged: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    unverified: tuple[Unverified, ...] = ()
    changed_sources: tuple[str, ...] = ()
    missing_sources: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """One line with what matches, and the number of each kind of problem."""
        lists = {
            "damaged": self.damaged,
            "added": self.added,
            "unverified": self.unverified,
            "changed sources": self.changed_sources,
            "missing sources": self.missing_sources,
        }
        matching = (
            f"{plural(self.tensors, 'tensor')} of {data_size(self.nbytes)} and {plural(self.files, 'file')} match"
        )
        problems = "".join(f", {len(found):,} {name}" for name, found in lists.items() if found)
        return f"<Verdict {'OK' if self.whole else 'not OK'}: {matching}{problems}>"

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged and nothing was added. Unverified tensors and the sources do not count."""
        return not self.damaged and not self.added

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, as ``verify --json`` prints it. Sizes are in bytes."""
        return {
            "verified": {"tensors": self.tensors, "bytes": self.nbytes, "files": self.files},
            "damaged": list(self.damaged),
            "added": list(self.added),
            "unverified": [asdict(tensor) for tensor in self.unverified],
            "changed_sources": list(self.changed_sources),
            "missing_sources": list(self.missing_sources),
        }


def verify(
    out: str | os.PathLike[str],
    *,
    sources: bool = False,
    models: Mapping[str, str] | None = None,
    threads: int = THREADS,
    notify: Notify | None = None,
) -> Verdict:
    """Compare everything in OUT that has a digest with its manifest. Needs no source files and no network.

    Args:
        out: directory of the merged model or the extracted adapter.
        sources: also compare the tensors without a digest with their source files, and check that all source files
            are unchanged. Source files that are not available are reported, and are not an error.
        models: with ``sources=True``, directory of a source model by its name in the manifest. Others are looked for
            under that name: in the current directory, or on the Hub if they came from there.
        threads: number of tensors that are read at a time.
        notify: called with the bytes read so far, from any thread.

    Raises:
        CheckpointError: the manifest is missing or was modified.
        UsageError: the manifest has no model of a name in `models`.
    """
    return Verification(Path(out), sources=sources, models=models).run(threads, notify)


class Verification:
    """One verification of OUT. Creating it reads the manifest and checks the size and header of every shard.

    Args:
        out: directory of the merged model or the extracted adapter.
        sources: as for `verify`.
        models: as for `verify`.

    Attributes:
        manifest: content of the manifest.
        made_by: what wrote OUT: ``merge`` or ``extraction``.
        bytes_to_read: size of the tensors that `run` will read from OUT.

    Raises:
        CheckpointError: the manifest is missing or was modified.
    """

    def __init__(self, out: Path, *, sources: bool = False, models: Mapping[str, str] | None = None) -> None:
        self.out = out
        self.manifest = read_manifest(out)
        self.made_by = made_by(out)
        self._paths = dict(models or {})
        if unknown := self._paths.keys() - set(self.manifest["models"]):
            known = ", ".join(self.manifest["models"])
            raise UsageError(f"{out} was not made from a model named {min(unknown)}: its manifest names {known}")
        self._compares = sources
        self._damaged: list[str] = []
        self._files = 0
        self._tensors: dict[str, TensorRef] = {}
        self._models: dict[int, Checkpoint | str] = {}
        self._lock = threading.Lock()
        self._counters = IoCounters()
        self._notify: Notify = lambda progress: None
        self._reader = Reader(keep_cached=False)
        self._check_shards()
        digests = self.manifest["tensors"]
        self.bytes_to_read = sum(
            ref.nbytes for name, ref in self._tensors.items() if sources or isinstance(digests.get(name), str)
        )

    def run(self, threads: int = THREADS, notify: Notify | None = None) -> Verdict:
        """Check the files and read the tensors. For the arguments, see `verify`. To be called once."""
        self._notify = notify or self._notify
        self._check_files()
        try:
            tensors, nbytes, unverified = self._check_tensors(threads)
            changed, missing = self._check_sources() if self._compares else ([], [])
        finally:
            self._reader.close()
        return Verdict(
            tensors,
            nbytes,
            self._files,
            tuple(self._damaged),
            tuple(added_files(self.out, self.manifest)),
            tuple(unverified),
            tuple(changed),
            tuple(missing),
        )

    def run_without_tensors(self) -> Verdict:
        """Check the size and header of every shard and all other files, and read no tensors. To be called once."""
        self._check_files()
        return Verdict(0, 0, self._files, tuple(self._damaged), tuple(added_files(self.out, self.manifest)))

    # --- files -------------------------------------------------------------------------------------------------

    def _check_shards(self) -> None:
        """Check the size and header of every shard, and collect the tensors in it."""
        for name, (nbytes, digest) in self.manifest["shards"].items():
            try:
                problem, header = _read_shard(self.out / name, nbytes, digest)
            except MergeloomError as error:
                problem, header = str(error), None
            if problem:
                self._damaged.append(f"{name}: {problem}")
            if header is not None:
                self._files += 1
                folder = name.rpartition("/")[0]
                self._tensors.update((f"{folder}/{key}" if folder else key, ref) for key, ref in header.tensors.items())

    def _check_files(self) -> None:
        """Compare every other file with its digest."""
        for name, digest in self.manifest["files"].items():
            file = self.out / name
            try:
                if not file.is_file():
                    self._damaged.append(f"{name}: is missing")
                elif file_digest(file) != digest:
                    self._damaged.append(f"{name}: was changed")
                else:
                    self._files += 1
            except OSError as error:
                self._damaged.append(f"{name}: {error.strerror}")

    # --- tensors -----------------------------------------------------------------------------------------------

    def _check_tensors(self, threads: int) -> tuple[int, int, list[Unverified]]:
        """Check every tensor: number and size of those that match, and those without anything to compare with."""
        digests = self.manifest["tensors"]
        self._damaged += [f"tensor {name} is missing" for name in digests if name not in self._tensors]
        self._damaged += [f"tensor {name} is not in the manifest" for name in self._tensors if name not in digests]
        names = [name for name in self._tensors if name in digests]
        names.sort(key=lambda name: (self._tensors[name].file, self._tensors[name].offset))
        tensors = nbytes = 0
        unverified = []
        with ThreadPoolExecutor(threads) as pool:
            for name, found in zip(names, pool.map(self._check_tensor, names), strict=True):
                if isinstance(found, Unverified):
                    unverified.append(found)
                elif found:
                    self._damaged.append(found)
                else:
                    tensors += 1
                    nbytes += self._tensors[name].nbytes
        return tensors, nbytes, unverified

    def _check_tensor(self, name: str) -> str | Unverified:
        """Check one tensor: the damage as a text, empty where it matches."""
        ref, digest = self._tensors[name], self.manifest["tensors"][name]
        try:
            if not isinstance(digest, str):
                return self._compare(name, ref, digest)
            digests = BlockDigests(ref.nbytes)
            for position, data in self._chunks(ref):
                digests.feed(position, data)
            return "" if digests.digest() == digest else f"tensor {name} in {ref.file.name} was changed"
        except MergeloomError as error:
            return f"tensor {name}: {error}"

    def _compare(self, name: str, ref: TensorRef, origin: Mapping[str, Any]) -> str | Unverified:
        """Compare a tensor without a digest with its source, where that is asked for and the source is available."""
        if not self._compares:
            return self._unverified(name, ref, origin)
        number = origin["model"]
        try:
            with _source_errors():
                source = self._source(number, origin["file"])
            theirs = self._source_chunks(replace(ref, file=source, offset=origin["offset"]))
            for (_, our_bytes), (_, their_bytes) in zip(self._chunks(ref), theirs, strict=True):
                if our_bytes != their_bytes:
                    with _source_errors():
                        identity = identity_of(self._model(number), source)
                    if identity != self.manifest["sources"].get(str(number), {}).get(origin["file"]):
                        return self._unverified(name, ref, origin, f"{source} has changed since the merge")
                    return f"tensor {name} in {ref.file.name} differs from its source {source}"
        except _SourceError as error:
            return self._unverified(name, ref, origin, str(error))
        return ""

    def _unverified(self, name: str, ref: TensorRef, origin: Mapping[str, Any], reason: str = "") -> Unverified:
        offset = origin["offset"]
        # blocks can be shared only at equal offsets within a block
        shared = not origin.get("copied", False) and (offset - ref.offset) % BLOCK == 0
        model = self.manifest["models"][origin["model"]]
        return Unverified(name, ref.nbytes, model, origin["file"], offset, shared, reason)

    def _chunks(self, ref: TensorRef, *, counts: bool = True) -> Iterator[tuple[int, memoryview]]:
        """The bytes of a tensor in chunks, each with its position in the tensor; the next chunk overwrites the last."""
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, ref.nbytes, BLOCK_BYTES)))
        for position in range(0, ref.nbytes, _BUFFER_BYTES):
            view = buffer[: ref.nbytes - position]
            self._reader.read(ref.file, ref.offset + position, view)
            if counts:
                self._counters.add(read=len(view))
                with self._lock:  # one call at a time, and its numbers only grow
                    self._notify(Progress(self._counters.bytes_read))
            yield position, view

    # --- sources -----------------------------------------------------------------------------------------------

    def _check_sources(self) -> tuple[list[str], list[str]]:
        """The source files that have changed since the merge, and those that could not be checked."""
        changed, missing = [], []
        for number, files in self.manifest["sources"].items():
            for name, identity in files.items():
                try:
                    file = self._source(int(number), name)
                    if identity_of(self._model(int(number)), file) != identity:
                        changed.append(str(file))
                except MergeloomError as error:
                    missing.append(f"{name} of {self.manifest['models'][int(number)]}: {error}")
        return changed, missing

    def _source_chunks(self, ref: TensorRef) -> Iterator[tuple[int, memoryview]]:
        """As `_chunks`, for a tensor of a source file. Raises _SourceError."""
        with _source_errors():
            yield from self._chunks(ref, counts=False)

    def _source(self, model: int, name: str) -> Path:
        path = self._model(model).path
        return path / name if path.is_dir() or not path.exists() else path

    def _model(self, number: int) -> Checkpoint:
        """A source model, opened once. Raises MergeloomError."""
        from ..model.open import open_source_model

        with self._lock:
            if number not in self._models:
                name = self.manifest["models"][number]
                was_local = name not in self._paths and number in self.manifest.get("local_models", ())
                try:
                    self._models[number] = open_source_model(self._paths.get(name, name), was_local=was_local)
                except MergeloomError as error:
                    command = f"mergeloom verify {self.out} --sources --model {name}=PATH"
                    self._models[number] = f"{error}; say where it is: {command}"
            found = self._models[number]
        if isinstance(found, str):
            raise MergeloomError(found)
        return found


class _SourceError(Exception):
    """The source of a tensor can't be read."""


@contextlib.contextmanager
def _source_errors() -> Iterator[None]:
    """Turn an error of mergeloom's inside the block into a _SourceError: OUT itself is not at fault."""
    try:
        yield
    except MergeloomError as error:
        raise _SourceError(str(error)) from error


def _read_shard(file: Path, nbytes: int, digest: str) -> tuple[str, Header | None]:
    """Check a shard's size and header: the damage as a text, and the header where it matches. Raises MergeloomError."""
    with open_source(file) as (descriptor, size):
        if size != nbytes:
            return f"has {size} bytes instead of {nbytes}", None
        raw = read_range(descriptor, 0, read_data_start(descriptor, size, file=file), file=file)
        if bytes_digest(raw) != digest:
            return "its header was changed", None
        return "", parse_header(raw, size, file=file)
