"""Stages an adapter's weights in OUT, job by job, with a journal; resumes after a kill; publishes the finished adapter.

Jobs are executed one after another, and the tensors of each are appended to the file. So the file is always a prefix of
the finished one. Each record says that the bytes of a job are durable:

    job       number of the job
    nbytes    number of bytes that it has appended; 0 if nothing has changed
    digest    XXH3-128 of these bytes
    tensors   [name, dtype, shape] of each tensor
    digests   digest of each tensor, as in a manifest
    matrix    result of a matrix that has changed
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from xxhash import xxh3_128

from ....errors import DiskSpaceError, MergeloomError, UsageError
from ....io.os_errors import translating_os_errors
from ....io.output.digests import BlockDigests
from ....io.output.directory import OutputDirectory
from ....io.output.journal import Journal, JournalContent
from ....io.output.lock import EXTRACTION
from ....io.output.publish import publish_files, unpublish_files
from ....io.output.shards import validate_shard
from ....io.platform import create_file, read_at, sync_data, sync_directory, truncate, write_at
from ....io.sizes import format_size
from .adapter_files import CONFIG, WEIGHTS

COMMIT_SECONDS = 1.0
"""The time after which finished jobs are made durable. Jobs of small matrices take milliseconds."""
_CHECK_BYTES = 1 << 20


class AdapterStaging:
    """The weights of an unfinished adapter in OUT.

    Args:
        out: the locked output directory.
        facts: everything that determines the bytes.
        stamps: stamps of the source files, by name. If they have changed, an unfinished adapter is not resumed: parts
            could come from two versions of a file.
        start: position of the first tensor in the file in bytes.
    """

    def __init__(
        self, out: OutputDirectory, facts: Mapping[str, Any], stamps: Mapping[str, list[int]], start: int
    ) -> None:
        self.out = out
        self.records: list[dict[str, Any]] = []
        self.facts = facts
        self._stamps = stamps
        self._start = self._end = start
        self._path = out.stage / WEIGHTS
        self._descriptor = -1
        self._journal: Journal | None = None
        self._pending: list[dict[str, Any]] = []
        self._committed = time.monotonic()

    @property
    def nbytes(self) -> int:
        """Size of the file with the tensors of all finished jobs, in bytes."""
        return self._end

    def begin(self, nbytes: int, say: Callable[[str], None], *, restart: bool) -> int:
        """Create the file, or recover the jobs of an earlier run. Return the number of finished jobs.

        Args:
            nbytes: size of the largest possible file in bytes.
            say: function that is called with messages.
            restart: whether to discard the jobs of an earlier run.

        Raises:
            UsageError: the earlier run was another one.
            DiskSpaceError: the disk is too small.
            EnvironmentFailure: the file system failed.
        """
        out, found = self.out, self.out.lock.journal
        if found is not None and restart:
            out.start_over()
            found = None
        if found is not None:
            self._refuse_other(found)
            if found.facts.get("stamps") != self._stamps:
                say("source files were written to or replaced since the extraction began: it starts over")
                out.start_over()
                found = None
        with translating_os_errors(out.path, "preparing the output"):
            if found is not None:
                unpublish_files(out.lock)
            flags = os.O_RDWR | os.O_CLOEXEC
            exists = found is not None and self._path.is_file()
            self._descriptor = os.open(self._path, flags) if exists else create_file(self._path)
            if found is not None:
                self._recover(found)
            free = shutil.disk_usage(out.path).free
            if free < nbytes - self._end:
                raise DiskSpaceError(
                    f"{out.path}: the adapter needs up to {format_size(nbytes - self._end, up=True)}, but only "
                    f"{format_size(free)} are free; make room and run the same command again"
                )
            for directory in (out.stage, out.work, out.path):
                sync_directory(directory)
            out.sync_parents()
            facts = {**self.facts, "stamps": self._stamps}
            self._journal = Journal(out.lock.journal_path, facts, self.records)
        return len(self.records)

    def _refuse_other(self, found: JournalContent) -> None:
        """Raise UsageError if OUT holds an unfinished run with other facts."""
        same = found.facts.get("extract") is not None
        if not same:
            what = "an unfinished merge, not an extraction"
        elif differs := differences(found.facts, self.facts):
            what = f"an unfinished extraction with {differs}"
        else:
            return
        raise UsageError(f"{self.out.path}: holds {what}; choose another OUT, or discard it with --restart")

    def _recover(self, found: JournalContent) -> None:
        """Keep the jobs of an earlier run whose bytes are those that the journal says."""
        for number, record in enumerate(found.records):
            if record.get("job") != number or len(record.get("digests", ())) != len(record["tensors"]):
                break
            if self._digest(record["nbytes"]) != record["digest"]:
                break
            self.records.append(dict(record))
            self._end += record["nbytes"]

    def _digest(self, nbytes: int) -> str:
        """Return the digest of the next bytes of the file; another one if there are fewer."""
        digest, position = xxh3_128(), self._end
        buffer = memoryview(bytearray(min(nbytes, _CHECK_BYTES)))
        while position < self._end + nbytes:
            part = buffer[: self._end + nbytes - position]
            count = read_at(self._descriptor, part, position)
            if count == 0:
                break
            digest.update(part[:count])
            position += count
        return digest.hexdigest()

    def append(self, write: Callable[[Callable[[memoryview], None]], dict[str, Any]], sizes: Sequence[int]) -> None:
        """Execute the next job.

        Args:
            write: function that is called with a function that appends bytes, and returns the entries of its record;
                without ``tensors`` among them, nothing has changed, and what was appended is discarded.
            sizes: sizes of the tensors that the job writes if anything has changed, in bytes.

        Raises:
            EnvironmentFailure: the file system failed.
        """
        position, digest, tensors = self._end, xxh3_128(), TensorDigests(sizes)

        def append(data: memoryview) -> None:
            nonlocal position
            with translating_os_errors(self.out.path, f"writing {len(data)} bytes to {WEIGHTS}"):
                write_at(self._descriptor, data, position)
            digest.update(data)
            tensors.feed(data)
            position += len(data)

        entries = write(append)
        if entries.get("tensors"):
            entries = {**entries, "digests": tensors.digests()}
        else:
            position, digest = self._end, xxh3_128()
        record = {
            "job": len(self.records),
            "nbytes": position - self._end,
            "digest": digest.hexdigest(),
            **entries,
        }
        self.records.append(record)
        self._pending.append(record)
        self._end = position
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def append_zeros(self, nbytes: int) -> None:
        """Extend the file, after its last job. The zeros take no space on most file systems."""
        self._end += nbytes

    def commit(self) -> None:
        """Make all finished jobs durable: first their bytes, then their records."""
        if self._pending and self._journal is not None:
            with translating_os_errors(self.out.path, "syncing the adapter"):
                sync_data(self._descriptor)
                self._journal.append(self._pending)
        self._pending.clear()
        self._committed = time.monotonic()

    def publish(self, header: bytes, config: bytes, manifest: Iterable[bytes]) -> None:
        """Complete the file, and give all files their final names.

        Args:
            header: first bytes of the weights.
            config: content of adapter_config.json.
            manifest: pieces of the manifest, which is the completion marker.

        Raises:
            EnvironmentFailure: the safetensors library rejects the weights, a name is taken, or the file system failed.
        """
        self.commit()
        journal = self._journal
        assert journal is not None
        with translating_os_errors(self.out.path, "writing the adapter"):
            write_at(self._descriptor, header, 0)
            truncate(self._descriptor, self._end)
            sync_data(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            validate_shard(self._path, WEIGHTS)
            self.out.write_file(CONFIG, config)
            self.out.write_file(EXTRACTION, manifest)
            last = (CONFIG, EXTRACTION)
            publish_files(self.out.lock, last, lambda names: journal.append([{"publish": list(names)}]))

    def end(self) -> bool:
        """End a run that has failed, and release OUT. Return whether OUT keeps anything."""
        try:
            with contextlib.suppress(MergeloomError):  # the error that ended the run counts
                self.commit()
            kept = any(record["nbytes"] for record in self.records)
            if self._journal is None:  # the run has changed nothing
                kept = self.out.lock.journal is not None
            if not kept:
                self.out.abandon()
            return kept
        finally:
            self.close()

    def close(self) -> None:
        """Close all files, and release OUT."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._journal is not None:
            self._journal.close()
        self.out.close()


class TensorDigests:
    """Computes the digests of tensors whose bytes are fed one after another.

    Args:
        sizes: sizes of the tensors in bytes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._tensors = [BlockDigests(nbytes) for nbytes in sizes]
        self._number = 0

    def feed(self, data: memoryview) -> None:
        """Feed the next bytes, which can belong to several tensors."""
        while data:
            tensor = self._tensors[self._number]
            part = data[: tensor.nbytes - tensor.position]
            tensor.feed(tensor.position, part)
            data = data[len(part) :]
            self._number += tensor.complete

    def digests(self) -> list[str]:
        """Return the digest of each tensor. Raises ValueError unless all bytes were fed."""
        return [tensor.digest() for tensor in self._tensors]


def zeros_digest(nbytes: int) -> str:
    """Return the digest of a tensor of zeros with a size in bytes."""
    digests, zeros = TensorDigests([nbytes]), memoryview(bytes(min(nbytes, _CHECK_BYTES)))
    for position in range(0, nbytes, _CHECK_BYTES):
        digests.feed(zeros[: nbytes - position])
    return digests.digests()[0]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describe what differs between the facts of two extractions; empty if nothing that determines the bytes does."""
    found = []
    for option, value in new["options"].items():
        before = old.get("options", {}).get(option)
        if before != value:
            found.append(f"--{option.replace('_', '-')} {_shown(before)} instead of {_shown(value)}")
    for key, text in _DIFFERENCES.items():
        if old.get(key) != new[key]:
            found.append(text)
    return " and ".join(found[:3])


_DIFFERENCES = {
    "extract": "another version of the algorithm",
    "model": "another MODEL, or other contents",
    "base": "another BASE, or other contents",
    "libraries": "another numpy, BLAS or kind of processor, whose results differ in the last bits",
}


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
