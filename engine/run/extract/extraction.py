"""Extracts an adapter: opens and plans, decomposes one matrix at a time within the budget, and publishes the result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ....errors import CheckpointError, Interrupted, UsageError
from ....io.counters import IoCounters
from ....io.output.digests import bytes_digest
from ....io.output.directory import OutputDirectory
from ....io.output.lock import EXTRACTION, Content, classify, refuse_occupied
from ....io.output.manifest_file import read_manifest, signed_pieces
from ....io.reading import Reader, stat_fingerprints
from ....io.sizes import Limit
from ....io.tensors.assembled import files_of
from ....io.units import listed, plural
from ....version import __version__
from ...cost.machine import CACHED_SHARE, available_ram, make_budget, memory_remark, process_memory, usable_cores
from ...cost.process_size import size_key
from ...execute.ledger import Ledger
from ...execute.measurements import Progress
from .adapter_files import (
    CONFIG,
    WEIGHTS,
    AdapterTensor,
    adapter_config,
    final_names,
    header_bytes,
    missing_experts,
    reserved_header,
    tensors_of_job,
)
from .execution import JobRunner, start_workers
from .memory import divide_memory
from .opening import OpenedModels, missing_in_model, open_models
from .options import ExtractOptions
from .result import ExtractedAdapter, matrices_of
from .staging import AdapterStaging, differences, zeros_digest
from .targets import FullJob, Job, MatrixJob

EXTRACT_VERSION = 1
"""Raised with every change of the algorithm that changes bytes."""
TENSOR_BYTES = 4096
"""RAM for each tensor: its job, its record and its part of the report, in bytes."""

Notify = Callable[[Progress], None]


class Extraction:
    """One extraction. Creating it opens the models, finds the matrices, and plans the memory.

    Args:
        model: model that was fine-tuned: a directory, a .safetensors file, an index, or a Hub repository.
        base: model that it was fine-tuned from.
        out: directory of the adapter: new, empty, or with an unfinished extraction of the same models and options.
        options: rank and other options.
        max_ram: limit of the process's resident memory in bytes or as a share of the machine's memory; a share by
            default.
        threads: maximum number of threads; by default the cores that the process may use.

    Attributes:
        jobs: matrices to decompose, and tensors to save in full.
        bytes_to_read: size of what is to be read of the tensors, in bytes.
        downloads: files of Hub models that `run` needs and the cache does not have.
        complete: whether `out` holds a finished extraction, which `run` compares with this one.
        max_ram: limit of the process's resident memory in bytes.
        memory: plan of the memory.

    Raises:
        UsageError: an option is invalid, or `out` has other files.
        CheckpointError: a model is missing, damaged or quantized in an unknown format, or the models are not of one
            architecture.
        BudgetError: the extraction exceeds the budget.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        base: str | os.PathLike[str],
        out: str | os.PathLike[str],
        options: ExtractOptions,
        *,
        max_ram: Limit | None = None,
        threads: int | None = None,
    ) -> None:
        self.out = Path(out)
        status = classify(self.out, EXTRACTION)
        refuse_occupied(status)
        self.complete = status.content is Content.FINISHED
        self.options = options
        self.models: OpenedModels = open_models(model, base, options)
        targets = self.models.targets
        self.jobs = targets.jobs
        _check_rank(options.rank, self.jobs)
        self.downloads = self.models.downloads()
        computed = self.models.pairing.computed
        compiling = computed.prepare()
        np.linalg.svd(np.eye(2))  # loads LAPACK before the process is measured
        key = size_key("extract-lora", self.models.base.name, self.models.model.name)
        budget = make_budget(max_ram, (), True, key=key, compiling=compiling)
        tensors = len(self.models.pairing.pairs)
        budget = replace(budget, baseline=budget.baseline + tensors * TENSOR_BYTES)
        decoding = (computed.scratch, computed.allocated) if computed.decodes else (0, 0)
        self.memory = divide_memory(self.jobs, targets.left_out, budget, threads or usable_cores(), decoding)
        self.max_ram = budget.ram
        self._remark = memory_remark(max_ram, None)
        self._job_bytes = [self.memory.bytes_read(job) for job in self.jobs]
        self.bytes_to_read = sum(self._job_bytes) + sum(map(self.memory.bytes_read, targets.left_out))
        self._start = reserved_header(self.jobs, self.models.described.prefix)
        self._earlier = 0
        self._counters = IoCounters()
        self._notify: Notify = lambda progress: None
        self._ledger = Ledger()

    # --- the plan ----------------------------------------------------------------------------------------------

    @property
    def matrices(self) -> list[MatrixJob]:
        """The matrices to decompose."""
        return [job for job in self.jobs if isinstance(job, MatrixJob)]

    @property
    def tensors_in_full(self) -> int:
        """Number of tensors that are saved in full if they have changed."""
        return sum(len(job.pairs) for job in self.jobs if isinstance(job, FullJob))

    @property
    def bytes_read_once(self) -> int:
        """Size of what would be read if every matrix fitted into memory, in bytes."""
        unlimited = replace(self.memory, room=1 << 62)
        return sum(unlimited.bytes_read(each) for each in (*self.jobs, *self.models.targets.left_out))

    @property
    def max_nbytes(self) -> int:
        """Size of the weights if everything has changed, in bytes."""
        tensors = (tensor for job in self.jobs for tensor in tensors_of_job(job, self.models.described.prefix))
        return self._start + sum(tensor.nbytes for tensor in tensors)

    # --- the run -----------------------------------------------------------------------------------------------

    def run(
        self, notify: Notify | None = None, say: Callable[[str], None] | None = None, *, restart: bool = False
    ) -> ExtractedAdapter:
        """Extract the adapter, or resume an interrupted extraction. To be called once.

        Args:
            notify: function that is called with the progress, from any thread.
            say: function that is called with messages.
            restart: whether to discard an unfinished extraction in `out`.

        Raises:
            CheckpointError: a file is missing, truncated or was changed, or values are not finite.
            UsageError: `out` holds another extraction.
            EnvironmentFailure: reading or writing failed.
            Interrupted: the user stopped the extraction. Finished matrices are kept, and the same call resumes.
        """
        self._notify = notify or self._notify
        say = say or (lambda text: None)
        with one_blas_thread() as libraries:
            facts = self._facts(libraries)
            directory = OutputDirectory.open(self.out, EXTRACTION)
            if directory.lock.complete:
                directory.close()
                finished = self._finished(facts)
                say(f"{self.out} is already complete, nothing to do")
                return finished
            staging = AdapterStaging(directory, facts, self.models.current_stamps(), self._start)
            try:
                return self._run(staging, say, restart=restart)
            except BaseException as error:
                kept = staging.end()
                if isinstance(error, KeyboardInterrupt):
                    raise Interrupted(_interrupted(self.out, kept=kept)) from error
                raise

    def _run(self, staging: AdapterStaging, say: Callable[[str], None], *, restart: bool) -> ExtractedAdapter:
        done = staging.begin(self.max_nbytes, say, restart=restart)
        if done:
            self._earlier = sum(self._job_bytes[:done])
            say(f"resuming: {done} of {len(self.jobs)} parts already extracted and checked")
        keep = self.bytes_to_read < CACHED_SHARE * available_ram()
        reader = Reader(keep_cached=keep, stamps=self.models.stamps)
        memory, ledger = self.memory, self._ledger
        try:
            with (
                ledger.allow(memory.peak - memory.baseline),
                start_workers(self.models, memory, reader, ledger, self._count) as workers,
            ):
                runner = JobRunner(self.models, self.options, memory, workers, ledger)
                for job in self.jobs[done:]:
                    sizes = [each.nbytes for each in tensors_of_job(job, self.models.described.prefix)]
                    staging.append(partial(runner.run, job), sizes)
                left_out = tuple(runner.left_out())
        finally:
            reader.close()
        self._check_unchanged()
        return self._publish(staging, left_out)

    def _count(self, nbytes: int) -> None:
        self._counters.add(read=nbytes)
        self._notify(Progress(self._earlier + self._counters.bytes_read, bytes_earlier=self._earlier))

    def _check_unchanged(self) -> None:
        """Check that no source file has changed since its header was read."""
        stamps = self.models.stamps
        read = {file for ref in self.models.refs for file in files_of(ref)}
        for file, stamp in stat_fingerprints(read & stamps.keys()).items():
            if stamp != stamps[file]:
                raise CheckpointError(f"{file} was changed during the extraction: run the same command again")

    # --- the result --------------------------------------------------------------------------------------------

    def _facts(self, libraries: Sequence[str]) -> dict[str, Any]:
        """Everything that determines the adapter's bytes."""
        return {
            "extract": EXTRACT_VERSION,
            "mergeloom": __version__,
            "options": self.options.to_dict(),
            **self.models.identities(),
            "libraries": [f"numpy {np.__version__}", *libraries],
        }

    def _publish(self, staging: AdapterStaging, left_out: tuple[tuple[str, str], ...]) -> ExtractedAdapter:
        """Write the header and the other files, and publish the adapter."""
        records = staging.records
        stored = [[AdapterTensor.from_json(entry) for entry in record["tensors"]] for record in records]
        if not any(stored):
            raise CheckpointError(
                f"{self.models.model.name} and {self.models.base.name} are equal in everything that the options "
                "select: there is nothing to extract"
            )
        changed = list(map(bool, stored))
        config = adapter_config(self.models.described, self.options.rank, self.jobs, changed)
        prefix = self.models.described.prefix
        zeros = [each for n in missing_experts(self.jobs, changed) for each in tensors_of_job(self.jobs[n], prefix)]
        tensors = [*final_names(self.jobs, stored), *zeros]
        header, described = header_bytes(tensors, self._start), _json(config)
        digests = [digest for record in records for digest in record.get("digests", ())]
        digests += [zeros_digest(each.nbytes) for each in zeros]
        staging.append_zeros(sum(each.nbytes for each in zeros))
        parts = zip(self.jobs, changed, strict=True)
        result = ExtractedAdapter(
            self.out,
            matrices_of(records),
            tuple(name for record in records for name in record.get("saved", ())),
            sum(len(job.pairs) for job, each in parts if not each),
            self.models.targets.excluded,
            left_out,
            staging.nbytes,
            self.options.rank,
        )
        manifest = {
            **result.described(),
            "facts": staging.facts,
            **self.models.named_sources(),
            "files": {CONFIG: bytes_digest(described)},
            "shards": {WEIGHTS: [staging.nbytes, bytes_digest(header)]},
            "tensors": {tensor.name: digest for tensor, digest in zip(tensors, digests, strict=True)},
        }
        staging.publish(header, described, signed_pieces(manifest))
        staging.close()
        return self._measured(result)

    def _finished(self, facts: Mapping[str, Any]) -> ExtractedAdapter:
        """Return what a finished extraction says about itself, after a check of its files; the tensors are not read.

        Raises:
            UsageError: it is another extraction.
            CheckpointError: its files were changed.
        """
        from ..verify import Verification  # needed here only

        found = read_manifest(self.out)
        if differs := differences(found.get("facts", {}), facts):
            raise UsageError(
                f"{self.out}: holds a finished extraction with {differs}; choose another OUT, or remove it"
            )
        if damaged := Verification(self.out).run_without_tensors().damaged:
            raise CheckpointError(
                f"{self.out} holds this extraction, finished and then damaged or edited: {damaged[0]}; restore that "
                "file, or choose another OUT, or remove it and run the same command again"
            )
        return self._measured(ExtractedAdapter.from_described(self.out, found))

    def _measured(self, result: ExtractedAdapter) -> ExtractedAdapter:
        """Add the measurements and the warnings of this run."""
        return replace(
            result,
            bytes_read=self._counters.bytes_read,
            max_ram=self.max_ram,
            peak_ram=self.memory.peak,
            peak_rss=process_memory().peak,
            warnings=tuple(filter(None, (result.energy_warning, *self._warnings(result.left_out)))),
        )

    def _warnings(self, left_out: Sequence[tuple[str, str]]) -> Iterator[str]:
        yield from self.models.remarks
        if self._remark:
            yield self._remark
        if missing := missing_in_model(self.models.pairing):
            yield missing
        if self.models.tie is not None and self.models.tie.embedding in {job.pair.name for job in self.matrices}:
            yield (
                "BASE ties its head to the embedding: PEFT applies the factors to both, but its merge_and_unload adds "
                "them twice; to merge with PEFT, extract without --embed"
            )
        for reason in dict.fromkeys(reason for _, reason in left_out):
            names = [name for name, each in left_out if each == reason]
            yield f"changed, but not in the adapter ({reason}): {plural(len(names), 'tensor')}, {listed(names)}"


def _check_rank(rank: int, jobs: Sequence[Job]) -> None:
    """Raise UsageError if no matrix has this rank."""
    sides = [min(job.rows, job.columns) for job in jobs if isinstance(job, MatrixJob)]
    if sides and rank > max(sides):
        raise UsageError(f"--rank {rank} exceeds the shorter side of every matrix: use {max(sides)} or less")


@contextmanager
def one_blas_thread() -> Iterator[list[str]]:
    """Let each call of the BLAS use one thread: its results depend on their number.

    Yields:
        The name, the version and the kind of processor of each BLAS that numpy uses.
    """
    controller = ThreadpoolController().select(user_api="blas")
    names = {
        " ".join(str(each.get(key)) for key in ("internal_api", "version", "architecture"))
        for each in controller.info()
    }
    with controller.limit(limits=1):
        yield sorted(names)


def _interrupted(out: Path, *, kept: bool) -> str:
    """The message for a user who has interrupted the extraction."""
    if not kept:
        return "stopped before anything was finished; nothing is left behind"
    return f"stopped: finished work is kept in {out}; run the same command again to resume"


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
