"""The public entry of a merge: plans it, runs a session, and returns the result."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...io.counters import IoCounters
from ...io.hub.repository import HubFile
from ...io.output.directory import OutputDirectory
from ...io.output.group_commit import GROUP_BYTES
from ...io.output.lock import classify, refuse_occupied
from ...io.units import data_size, duration, memory_size, plural
from ..cost.estimate import Estimate, assumed_rates, estimate
from ..cost.machine import process_memory
from ..execute.check_buffers import check_buffers
from ..execute.measurements import Measured, Progress
from ..execute.survival import SurvivalSums
from ..model.open import is_remote
from ..model.warnings import strict_error
from .destination import refuse_input
from .finished import check_finished
from .manifest import MANIFEST
from .plan import Options, Plan, RecipeLike
from .planning import plan
from .recovery.source_files import SourceFiles
from .run_lanes import run_lanes
from .session import Earlier, MergeSession
from .survival.findings import checked_shares
from .survival.shares import TensorShare, shares_dict


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a merge.

    Args:
        plan: plan of the merge.
        out: model directory; None if nothing was written.
        measured: measurements of this run.
        peak_rss: peak resident memory of the process (VmHWM) in bytes.
        earlier: part of the plan that earlier, interrupted runs have done.
        peak_before: VmHWM before the merge in bytes.
        shares: what rounding keeps of the change of each tensor that was compared with the base; empty if `out` was
            complete before.
    """

    plan: Plan
    out: Path | None
    measured: Measured
    peak_rss: int
    earlier: Earlier = field(default_factory=Earlier)
    peak_before: int = 0
    shares: tuple[TensorShare, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        """One line with what was written where, the time and the peak RAM."""
        where = "rehearsal" if self.out is None else f"merged into {os.fspath(self.out)!r}"
        made = f"{data_size(self.measured.bytes_written)} written in {duration(self.measured.seconds)}"
        return f"<Result: {where}, {made}, peak RAM {memory_size(self.peak_rss, up=True)}>"

    @property
    def estimate(self) -> Estimate | None:
        """The estimated time of the merge, without the start-up, from assumed rates: nothing was measured.

        None if an interrupted run did a part of the merge: the plan's time is then not that of this run.
        """
        if self.earlier != Earlier():
            return None
        work = self.plan.workload
        if self.out is None:
            work = replace(work, bytes_written=0)
        return estimate(work, replace(assumed_rates(work), start=0.0))

    @property
    def excess_ram(self) -> int:
        """Bytes of resident memory beyond the budget; 0 if the merge kept within it, or did not raise the peak."""
        limit = self.plan.schedule.budget.ram
        return self.peak_rss - limit if self.peak_rss > max(limit, self.peak_before) else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the plan and the measurements as plain data, as ``merge --report`` writes them."""
        measured = self.measured
        return {
            **self.plan.to_dict(),
            "measured": {
                "peak_rss": self.peak_rss,
                "excess_ram": self.excess_ram,
                "peak_vram": measured.vram_peak,
                "bytes_read": measured.bytes_read,
                "bytes_written": measured.bytes_written,
                "bytes_shared": measured.bytes_shared,
                "bytes_checked": measured.bytes_checked,
                "refused": {errno.errorcode.get(n, str(n)): nbytes for n, nbytes in measured.io.refused.items()},
                "seconds": measured.seconds,
                "estimated_seconds": None if (estimated := self.estimate) is None else estimated.seconds,
                "lanes": {
                    name: {
                        "threads": lane.threads,
                        "helped": lane.effective_threads,
                        "worked": lane.worked,
                        "waited": lane.waited,
                    }
                    for name, lane in measured.lanes.items()
                },
                "overflowed": measured.overflowed,
                "squeezed": measured.reduced_vram,
                "earlier": asdict(self.earlier),
                "survival": shares_dict(self.shares),
            },
        }


class _NullSink:
    """The sink of a merge that writes nothing."""

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Discard the data."""

    def finished(self, node: int) -> None:
        """Do nothing."""


@dataclass(slots=True)
class _Inputs:
    """The inputs of a merge, before it reads them.

    Args:
        plan: plan of the merge.
        fetch: function that downloads missing files.
        warn: function that is called with warnings.
        counters: counters of the merge, for the bytes that `prepare` reads.
    """

    plan: Plan
    fetch: Callable[[Sequence[HubFile]], None]
    warn: Callable[[str], None]
    counters: IoCounters

    def prepare(self) -> None:
        """Download what is missing, check the data as far as the plan could not, and report what is suspicious.

        Raises:
            CheckpointError: in strict mode, if anything is suspicious.
        """
        self.fetch(missing_files(self.plan))
        names = [model.name for model in self.plan.built.models]
        warnings = check_buffers(self.plan.built.buffers, names, self.counters)
        if self.plan.options.strict and warnings:
            raise strict_error(warnings)
        for warning in warnings:
            self.warn(str(warning))


def merge(
    recipe: RecipeLike | Plan,
    out: str | os.PathLike[str] | None,
    options: Options | None = None,
    *,
    fresh: bool = False,
    digests: bool = False,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
    download: Callable[[Sequence[HubFile]], None] | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Result:
    """Plan a merge and execute it, or resume an interrupted one.

    Args:
        recipe: path of a YAML file, a dict, a Recipe, or a Plan.
        out: model directory to write; None to do everything except writing.
        options: budgets, device, seed and other options; ignored if a Plan is given.
        fresh: whether to discard an unfinished merge in `out`.
        digests: whether every tensor gets a digest; reflinked tensors are then read at the end.
        notify: function that is called at intervals with the progress.
        say: function that is called with messages for the user.
        warn: function that is called with warnings; by default `say`, with "warning: " before the text.
        download: function that is called once with the missing files of the Hub, perhaps none, after `out` was checked
            and locked; `fetch` by default. It is not called if `out` holds the finished merge.
        group_bytes: maximum number of bytes of work that a kill can lose.

    Raises:
        MergeloomError: the merge was stopped. `out` then holds nothing that looks like a model, and the same call
            resumes the merge.
    """
    tell = say or (lambda text: None)
    fetch_files = download or (lambda files: fetch(files, tell))
    path = None if out is None else Path(out)
    if path is not None:
        refuse_occupied(classify(path))  # before planning reads headers from the Hub
    planned = recipe if isinstance(recipe, Plan) else plan(recipe, options)
    before = process_memory().peak
    report = warn or (lambda text: tell(f"warning: {text}"))
    inputs = _Inputs(planned, fetch_files, report, IoCounters())
    if path is None:
        return _rehearse(inputs, notify, before, report)
    refuse_input(planned, path)
    directory = OutputDirectory.open(path, MANIFEST)
    if directory.lock.complete:
        tell(f"{path} is already complete, nothing to do: {_check_complete(planned, directory)}")
        return Result(planned, path, Measured(), process_memory().peak, peak_before=before)
    session = MergeSession(
        planned,
        directory,
        fetch=inputs.prepare,
        counters=inputs.counters,
        notify=notify or (lambda progress: None),
        say=tell,
        warn=report,
        group_bytes=group_bytes,
    )
    measured = session.run(fresh=fresh, digests=digests)
    return Result(session.plan, path, measured, process_memory().peak, session.earlier, before, session.shares)


def _rehearse(
    inputs: _Inputs, notify: Callable[[Progress], None] | None, before: int, warn: Callable[[str], None]
) -> Result:
    """Do everything except writing."""
    inputs.prepare()
    planned = inputs.plan.in_lanes or inputs.plan
    sources, counters = SourceFiles(planned), inputs.counters
    survival = SurvivalSums(planned.built.graph)

    def watch() -> None:
        if notify is not None:
            notify(Progress(counters.bytes_read, counters.bytes_written))

    with sources.blamed_for_errors():
        measured = run_lanes(
            planned, planned.schedule, _NullSink(), counters, watch, stamps=sources.stamps, survival=survival
        )
    watch()
    sources.check()
    shares = checked_shares(planned, survival, warn)
    return Result(planned, None, measured, process_memory().peak, peak_before=before, shares=shares)


def _check_complete(planned: Plan, directory: OutputDirectory) -> str:
    """Check that a complete OUT is the planned merge, and release it. Return what was checked, for the user."""
    try:
        return check_finished(planned, directory.lock.status)
    finally:
        directory.close()


def missing_files(planned: Plan) -> list[HubFile]:
    """Return the files of Hub models that a merge needs and the cache does not have: weights, tokenizers, cards, ..."""
    needed = list(planned.downloads)
    sources = [made.files for made in planned.made]
    donors = [donor for files in sources for donor in (files.others, files.generation, files.tokenizer)]
    remote = [model.checkpoint for model in planned.built.files if is_remote(model.checkpoint)]
    if remote or any(map(is_remote, donors)):
        from ...io.hub.checkpoint import card_of, companions

        needed += [file for donor in donors for file in companions(donor)]
        needed += [card for model in remote if (card := card_of(model)) is not None]  # which states the license
    return [file for file in {file.path: file for file in needed}.values() if not file.present]


def fetch(
    files: Sequence[HubFile], say: Callable[[str], None], notify: Callable[[Progress], None] | None = None
) -> None:
    """Download files of the Hub, or resume an interrupted download.

    Args:
        files: files to download.
        say: function that is called with a message before the download starts.
        notify: function that is called at intervals with the number of bytes downloaded.

    Raises:
        MergeloomError: as for `hub.download.download`.
    """
    if not files:
        return
    from ...io.hub.download import download

    say(f"downloading {plural(len(files), 'file')}, {data_size(sum(file.to_fetch for file in files))}")
    download(files, None if notify is None else lambda done: notify(Progress(bytes_read=done.bytes_done)))
