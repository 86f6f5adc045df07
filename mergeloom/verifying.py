"""Does a directory hold what its manifest says, byte for byte?"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine.work import Progress
from .errors import MergeloomError
from .io.checkpoint import Checkpoint
from .io.digests import BLOCK_BYTES, BlockDigests, bytes_digest, file_digest
from .io.header import Header, parse_header, read_data_start
from .io.reading import Reader
from .io.source_files import open_source, read_range
from .io.tensors import TensorRef
from .manifest import MANIFEST, identity_of, read_manifest

THREADS = 4
"""How many tensors are read at a time."""

_BUFFER_BYTES = 4 << 20
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")

Notify = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found.

    Args:
        tensors: how many tensors are what the manifest says.
        nbytes: how many bytes these have.
        damaged: what isn't as the manifest says, in words.
        unvouched: what nothing vouches for, with the reason.
    """

    tensors: int
    nbytes: int
    damaged: tuple[str, ...]
    unvouched: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether everything was vouched for, and is as it was."""
        return not self.damaged and not self.unvouched


def bytes_to_read(out: Path) -> int:
    """How many bytes `verify` will read, about. Raises CheckpointError where there is no manifest."""
    return sum(nbytes for nbytes, _ in read_manifest(out)["shards"].values())


def verify(out: Path, *, sources: bool = False, threads: int = THREADS, notify: Notify | None = None) -> Verdict:
    """Read every byte of a merged model and compare it with the manifest.

    Args:
        out: the model's directory.
        sources: whether to look, too, if the source files are still what they were.
        threads: how many tensors are read at a time.
        notify: called with bytes read, now and then, from any thread.

    Raises:
        CheckpointError: where there is no manifest, or it was changed.
    """
    manifest = read_manifest(out)
    check = _Verification(out, manifest, notify)
    try:
        check.shards()
        check.files()
        check.tensors(threads)
        if sources:
            check.sources()
    finally:
        check.reader.close()
    return Verdict(check.good, check.nbytes, tuple(check.damaged), tuple(check.unvouched))


class _Verification:
    """What was found so far."""

    def __init__(self, out: Path, manifest: Mapping[str, Any], notify: Notify | None) -> None:
        self.out = out
        self.manifest = manifest
        self.reader = Reader(keep_cached=False)
        self.damaged: list[str] = []
        self.unvouched: list[str] = []
        self.good = 0
        self.nbytes = 0
        self._notify = notify or (lambda progress: None)
        self._progress = Progress()
        self._lock = threading.Lock()
        self._found: dict[str, TensorRef] = {}
        self._models: dict[int, Checkpoint | str] = {}

    def shards(self) -> None:
        """Size and header of every shard."""
        for name, (nbytes, digest) in self.manifest["shards"].items():
            try:
                problem, header = _read_shard(self.out / name, nbytes, digest)
            except MergeloomError as error:
                problem, header = str(error), None
            if problem:
                self.damaged.append(f"{name}: {problem}")
            if header is not None:
                folder = name.rpartition("/")[0]
                self._found.update((f"{folder}/{key}" if folder else key, ref) for key, ref in header.tensors.items())

    def files(self) -> None:
        """Every file beside the shards."""
        for name, digest in self.manifest["files"].items():
            file = self.out / name
            try:
                if not file.is_file():
                    self.damaged.append(f"{name}: is missing")
                elif file_digest(file) != digest:
                    self.damaged.append(f"{name}: was changed")
            except OSError as error:
                self.damaged.append(f"{name}: {error.strerror}")
        known = {*self.manifest["files"], *self.manifest["shards"], MANIFEST}
        for folder in sorted({(self.out / name).parent for name in self.manifest["shards"]}):
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                name = str(file.relative_to(self.out))
                if name not in known and name.endswith(_WEIGHTS):
                    self.unvouched.append(f"{name} is not in the manifest")

    def tensors(self, threads: int) -> None:
        """Every byte of every tensor."""
        named = self.manifest["tensors"]
        jobs = []
        for name, digest in named.items():
            ref = self._found.get(name)
            if ref is not None:
                jobs.append((name, ref, digest))
            else:
                self.damaged.append(f"tensor {name} is missing")
        self.damaged += [f"tensor {name} is not in the manifest" for name in self._found if name not in named]
        jobs.sort(key=lambda job: (job[1].file, job[1].offset))
        with ThreadPoolExecutor(threads) as pool:
            for (_, ref, _), (damaged, unvouched) in zip(jobs, pool.map(self._check, jobs), strict=True):
                self.damaged += [damaged] if damaged else []
                self.unvouched += [unvouched] if unvouched else []
                if not damaged and not unvouched:
                    self.good += 1
                    self.nbytes += ref.nbytes

    def _check(self, job: tuple[str, TensorRef, str | Mapping[str, Any]]) -> tuple[str, str]:
        """What is wrong with a tensor, and why nothing vouches for it; both empty where all is well."""
        name, ref, digest = job
        try:
            if isinstance(digest, str):
                digests = BlockDigests(ref.nbytes)
                for position, data in self._pieces(ref.file, ref.offset, ref.nbytes):
                    digests.feed(position, data)
                return "" if digests.digest() == digest else f"tensor {name} in {ref.file.name} was changed", ""
            return self._compare(name, ref, digest)
        except MergeloomError as error:
            return f"tensor {name}: {error}", ""

    def _compare(self, name: str, ref: TensorRef, origin: Mapping[str, Any]) -> tuple[str, str]:
        """Compare a tensor that was copied unread with its source."""
        unread = f"tensor {name} was copied without being read"
        try:
            with _blaming_the_source():
                source = self._source(origin["model"], origin["file"])
            theirs = self._source_pieces(source, origin["offset"], ref.nbytes)
            for (_, ours), (_, other) in zip(self._pieces(ref.file, ref.offset, ref.nbytes), theirs, strict=True):
                if ours != other:
                    with _blaming_the_source():
                        now = identity_of(self._model(origin["model"]), source)
                    if now != self._identity(origin):
                        return "", f"{unread}, and {source} was changed since"
                    return f"tensor {name} in {ref.file.name} differs from its source {source}", ""
        except _SourceError as error:
            return "", f"{unread}, and can't be compared with its source: {error}"
        return "", ""

    def _source_pieces(self, file: Path, offset: int, nbytes: int) -> Iterator[tuple[int, memoryview]]:
        """As `_pieces`, of a source file."""
        with _blaming_the_source():
            yield from self._pieces(file, offset, nbytes)

    def _identity(self, origin: Mapping[str, Any]) -> str | None:
        """What the source file of a tensor was when it was copied."""
        return self.manifest["sources"].get(str(origin["model"]), {}).get(origin["file"])  # type: ignore[no-any-return]

    def _pieces(self, file: Path, offset: int, nbytes: int) -> Iterator[tuple[int, memoryview]]:
        """A range of a file, piece by piece, with where each begins in it."""
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, nbytes, BLOCK_BYTES)))
        for position in range(0, nbytes, _BUFFER_BYTES):
            view = buffer[: nbytes - position]
            self.reader.read(file, offset + position, view)
            with self._lock:
                self._progress.bytes_read += len(view)
                self._notify(self._progress)
            yield position, view

    def sources(self) -> None:
        """Whether the source files are still what they were when the merge was made."""
        for number, files in self.manifest["sources"].items():
            for name, identity in files.items():
                try:
                    file = self._source(int(number), name)
                    if identity_of(self._model(int(number)), file) != identity:
                        self.damaged.append(f"source {file} is not what it was")
                except MergeloomError as error:
                    self.unvouched.append(f"source {name} of model {int(number) + 1}: {error}")

    def _source(self, model: int, name: str) -> Path:
        path = self._model(model).path
        return path / name if path.is_dir() or not path.exists() else path

    def _model(self, number: int) -> Checkpoint:
        """An input model, opened once. Raises MergeloomError."""
        from .opening import open_model, reference_of

        with self._lock:
            if number not in self._models:
                try:
                    self._models[number] = open_model(reference_of(self.manifest["models"][number]))
                except MergeloomError as error:
                    self._models[number] = str(error)
            found = self._models[number]
        if isinstance(found, str):
            raise MergeloomError(found)
        return found


class _SourceError(Exception):
    """A source that a tensor was copied from can't be read."""


@contextlib.contextmanager
def _blaming_the_source() -> Iterator[None]:
    """Whatever goes wrong within is the source's fault, not the merged model's."""
    try:
        yield
    except MergeloomError as error:
        raise _SourceError(str(error)) from error


def _read_shard(file: Path, nbytes: int, digest: str) -> tuple[str, Header | None]:
    """What is wrong with a shard's size or header, and its header where that can be told. Raises MergeloomError."""
    with open_source(file) as (descriptor, size):
        if size != nbytes:
            return f"has {size} bytes instead of {nbytes}", None
        raw = read_range(descriptor, 0, read_data_start(descriptor, size, file=file), file=file)
        if bytes_digest(raw) != digest:
            return "its header was changed", None
        return "", parse_header(raw, size, file=file)
