"""Does a directory hold what its manifest says, byte for byte?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MergeloomError
from .io.digests import BLOCK_BYTES, BlockDigests, bytes_digest, file_digest
from .io.header import Header, read_header
from .io.identity import file_identity
from .io.reading import Reader
from .io.tensors import TensorRef
from .manifest import MANIFEST, read_manifest


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found.

    Args:
        tensors: how many tensors are what the manifest says.
        nbytes: how many bytes were read.
        damaged: what isn't as the manifest says, in words, one sentence each.
        unvouched: tensors that nothing vouches for, with the reason.
    """

    tensors: int
    nbytes: int
    damaged: tuple[str, ...]
    unvouched: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether everything was vouched for, and is as it was."""
        return not self.damaged and not self.unvouched


def verify(
    out: Path, *, sources: bool = False, threads: int = 2, notify: Callable[[int], None] | None = None
) -> Verdict:
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
    damaged: list[str] = []
    headers: dict[str, Header] = {}
    for name, (nbytes, digest) in manifest["shards"].items():
        problem = _check_shard(out / name, nbytes, digest, headers)
        if problem is not None:
            damaged.append(f"{name}: {problem}")
    damaged += _check_files(out, manifest)
    found: dict[str, TensorRef] = {name: ref for header in headers.values() for name, ref in header.tensors.items()}
    jobs: list[tuple[str, TensorRef, str]] = []
    copies: list[tuple[str, TensorRef, dict[str, Any]]] = []
    for name, digest in manifest["tensors"].items():
        ref = found.get(name)
        if ref is None:
            damaged.append(f"tensor {name} is missing")
        elif isinstance(digest, dict):
            copies.append((name, ref, digest))
        else:
            jobs.append((name, ref, digest))
    damaged += [f"tensor {name} is not in the manifest" for name in found if name not in manifest["tensors"]]
    reader = Reader()
    try:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(lambda job: _check_tensor(reader, *job, notify), jobs))
            models = [Path(model).expanduser() for model in manifest["models"]]
            compared = list(pool.map(lambda job: _compare(reader, *job, models, notify), copies))
    finally:
        reader.close()
    damaged += [problem for problem in results if problem is not None]
    if sources:
        damaged += _check_sources(manifest)
    unvouched = [problem for problem, vouched in compared if not vouched]
    damaged += [problem for problem, vouched in compared if vouched and problem]
    good = sum(problem is None for problem in results) + sum(not problem for problem, _ in compared)
    nbytes = sum(ref.nbytes for _, ref, _ in (*jobs, *copies))
    return Verdict(good, nbytes, tuple(damaged), tuple(unvouched))


def _check_shard(file: Path, nbytes: int, digest: str, headers: dict[str, Header]) -> str | None:
    try:
        size = file.stat().st_size
        if size != nbytes:
            return f"has {size} bytes instead of {nbytes}"
        header = read_header(file)
        with file.open("rb") as stream:
            if bytes_digest(stream.read(header.data_start)) != digest:
                return "its header was changed"
    except FileNotFoundError:
        return "is missing"
    except (OSError, MergeloomError) as error:
        return f"can't be read: {error}"
    headers[file.name] = header
    return None


def _check_files(out: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    for name, digest in manifest["files"].items():
        try:
            if file_digest(out / name) != digest:
                yield f"{name}: was changed"
        except OSError as error:
            yield f"{name}: {error.strerror}"
    known = {*manifest["files"], *manifest["shards"], MANIFEST}
    for file in out.glob("*.safetensors"):
        if file.name not in known:
            yield f"{file.name}: is not in the manifest"


def _check_tensor(
    reader: Reader, name: str, ref: TensorRef, digest: str, notify: Callable[[int], None] | None
) -> str | None:
    digests = BlockDigests(ref.nbytes)
    buffer = memoryview(bytearray(min(max(ref.nbytes, 1), BLOCK_BYTES // 4)))
    done = 0
    while done < ref.nbytes:
        view = buffer[: ref.nbytes - done]
        try:
            reader.read(ref.file, ref.offset + done, view)
        except MergeloomError as error:
            return f"tensor {name}: {error}"
        digests.feed(done, view)
        done += len(view)
        if notify is not None:
            notify(len(view))
    return None if digests.digest() == digest else f"tensor {name} in {ref.file.name} was changed"


def _compare(
    reader: Reader,
    name: str,
    ref: TensorRef,
    origin: Mapping[str, Any],
    models: Sequence[Path],
    notify: Callable[[int], None] | None,
) -> tuple[str, bool]:
    """Compare a tensor that was copied unread with its source: what is wrong, and whether anything vouches for it."""
    model = models[int(origin["model"])]
    source = model / str(origin["file"]) if model.is_dir() else model
    if not source.exists():
        return f"tensor {name}: was copied without being read, and its source {source} is gone", False
    buffers = [memoryview(bytearray(min(max(ref.nbytes, 1), BLOCK_BYTES // 4))) for _ in range(2)]
    done = 0
    while done < ref.nbytes:
        ours, theirs = (buffer[: ref.nbytes - done] for buffer in buffers)
        try:
            reader.read(ref.file, ref.offset + done, ours)
        except MergeloomError as error:
            return f"tensor {name}: {error}", True
        try:
            reader.read(source, int(origin["offset"]) + done, theirs)
        except MergeloomError as error:
            return f"tensor {name}: its source can't be read: {error}", False
        if bytes(ours) != bytes(theirs):
            return f"tensor {name} in {ref.file.name} differs from its source {source}", True
        done += len(ours)
        if notify is not None:
            notify(len(ours))
    return "", True


def _check_sources(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Whether the source files are still what they were when the merge was made."""
    for number, files in manifest["sources"].items():
        model = Path(manifest["models"][int(number)]).expanduser()
        for name, identity in files.items():
            file = model / name if model.is_dir() else model
            try:
                if file_identity(file) != identity:
                    yield f"source {file} is not what it was"
            except (OSError, MergeloomError) as error:
                yield f"source {file} can't be read: {error}"
