"""The merge: performs a plan, and leaves a model directory that other tools load."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import EnvironmentFailure
from ...io.hub.repository import HubFile
from ...io.output.directory import OutputDirectory
from ...io.output.group_commit import GROUP_BYTES
from ...io.output.lock import classify, refuse_occupied
from ...io.reading import Observe, Reader, Stamps
from ...io.wording import data_size, plural
from ..cost.machine import CACHED_SHARE, available_ram, process_memory
from ..execute.devices import open_devices
from ..execute.replan import run_graph
from ..execute.tasks import Measured, Progress, Sink
from ..model.open import is_remote
from ..schedule.schedule import Schedule
from .destination import refuse_input
from .finished import check_finished
from .manifest import MANIFEST
from .placement import unplaced
from .plan import Options, Plan, RecipeLike
from .planning import plan
from .session import Earlier, Run


@dataclass(frozen=True, slots=True)
class Result:
    """What a merge did.

    Args:
        plan: what was foretold.
        out: the model directory; None where nothing was to be written.
        measured: what was measured by the engine.
        peak_rss: the most resident memory of the process (VmHWM), in bytes.
        earlier: what earlier, interrupted runs had done of it.
        peak_before: the VmHWM before the merge began, in bytes.
    """

    plan: Plan
    out: Path | None
    measured: Measured
    peak_rss: int
    earlier: Earlier = field(default_factory=Earlier)
    peak_before: int = 0

    @property
    def excess_ram(self) -> int:
        """Bytes of resident memory beyond the budget; 0 where the merge kept within it, or did not raise the peak."""
        limit = self.plan.schedule.budget.ram
        return self.peak_rss - limit if self.peak_rss > max(limit, self.peak_before) else 0

    def to_dict(self) -> dict[str, Any]:
        """Foretold and measured side by side, as ``merge --report`` writes it."""
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
                "refused": {errno.errorcode.get(n, str(n)): nbytes for n, nbytes in measured.refused.items()},
                "seconds": measured.seconds,
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
            },
        }


_DEVICE_ERRORS = {"AcceleratorError", "OutOfMemoryError"}  # torch's, by name, so that it need not be imported


class _Nowhere:
    """The sink of a rehearsal."""

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Drop it."""

    def finished(self, node: int) -> None:
        """Nothing is left to do."""


def merge(
    recipe: RecipeLike | Plan,
    out: str | os.PathLike[str] | None,
    options: Options | None = None,
    *,
    fresh: bool = False,
    digests: bool = False,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
    download: Callable[[Sequence[HubFile]], None] | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Result:
    """Plan a merge and perform it, or go on with one that was interrupted.

    Args:
        recipe: a path, a dict, a Recipe, or a Plan that was made before.
        out: the model directory to make; None for a rehearsal that does all of it and writes nothing.
        options: budgets, device, seed and the like; those of the plan where a Plan is given.
        fresh: discard an unfinished merge in `out`, and begin anew.
        digests: whether every tensor gets a digest; what is shared, and not written, is then read for it in the end.
        notify: called now and then with how far it is.
        say: called with what the user should know before the work begins.
        download: called once with the files of the Hub that are missing, perhaps none, after `out` was checked and
            locked; `fetch` by default. It is not called where `out` holds the finished merge.
        group_bytes: the most bytes of work that a kill can cost.

    Raises:
        MergeloomError: whatever stops it; `out` then holds nothing that looks like a model, and the same call goes on.
    """
    tell = say or (lambda text: None)
    download = download or (lambda files: fetch(files, tell))
    path = None if out is None else Path(out)
    if path is not None:
        refuse_occupied(classify(path))  # before planning reads headers from the Hub
    planned = recipe if isinstance(recipe, Plan) else plan(recipe, options)
    before = process_memory().peak
    if path is None:
        download(missing_files(planned))
        planned = unplaced(planned)
        measured = _perform(planned, planned.schedule, _Nowhere(), notify)
        return Result(planned, None, measured, process_memory().peak, peak_before=before)
    refuse_input(planned, path)
    directory = OutputDirectory(path, MANIFEST)
    if directory.whole:
        try:
            checked = check_finished(planned, directory.status)
        finally:
            directory.close()
        tell(f"{directory.path} is already complete, nothing to do: {checked}")
        return Result(planned, directory.path, Measured(), process_memory().peak, peak_before=before)

    def fetch_missing() -> None:
        download(missing_files(planned))

    def engine(
        schedule: Schedule,
        sink: Sink,
        stamps: Stamps,
        watch: Callable[[Progress], None],
        done: Mapping[int, int],
        observe: Observe,
    ) -> Measured:
        return _perform(planned, schedule, sink, watch, stamps, done, observe)

    run = Run(planned, directory, engine, fetch_missing, notify or (lambda progress: None), tell, group_bytes)
    measured = run.perform(fresh, digests)
    return Result(run.plan, directory.path, measured, process_memory().peak, run.earlier, before)


def missing_files(planned: Plan) -> list[HubFile]:
    """What a merge needs of the Hub's models and isn't here: weights, and the files beside them that it takes over."""
    needed = list(planned.downloads)
    donors = [donor for donor in (planned.files.others, planned.files.tokenizer) if is_remote(donor)]
    if donors:
        from ...io.hub.checkpoint import companions

        needed += [file for donor in donors for file in companions(donor)]
    return [file for file in {file.path: file for file in needed}.values() if not file.present]


def fetch(
    files: Sequence[HubFile], say: Callable[[str], None], notify: Callable[[Progress], None] | None = None
) -> None:
    """Download files of the Hub; an interrupted download goes on where it was.

    Args:
        files: which.
        say: called with what is about to be done.
        notify: called now and then with the bytes that are here.

    Raises:
        MergeloomError: as `hub_download.download`.
    """
    if not files:
        return
    from ...io.hub.download import download

    say(f"downloading {plural(len(files), 'file')}, {data_size(sum(file.to_fetch for file in files))}")
    download(files, None if notify is None else lambda done: notify(Progress(bytes_read=done.bytes_done)))


def _perform(
    planned: Plan,
    schedule: Schedule,
    sink: Sink,
    notify: Callable[[Progress], None] | None,
    stamps: Stamps | None = None,
    done: Mapping[int, int] | None = None,
    observe: Observe | None = None,
) -> Measured:
    """Run the engine over what is left."""
    inputs = sum(ref.nbytes for ref in planned.built.graph.reads)
    reader = Reader(keep_cached=inputs < CACHED_SHARE * available_ram(), stamps=stamps, observe=observe)
    try:
        return run_graph(
            planned.built.graph,
            schedule,
            open_devices,
            reader,
            sink,
            done=done,
            allow_nonfinite=planned.stage.allow_nonfinite,
            notify=notify,
        )
    except MemoryError as error:
        raise EnvironmentFailure(
            f"there is less memory than was promised ({error or 'allocation failed'}): close other programs, or give a "
            "smaller --max-ram, and run the same command again"
        ) from error
    except RuntimeError as error:
        if type(error).__name__ not in _DEVICE_ERRORS and "CUDA" not in str(error):
            raise
        names = ", ".join(device.name for device in schedule.budget.devices)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvironmentFailure(
            f"{names}: the device failed ({reason}): see what nvidia-smi and dmesg say, then run the same command "
            "again, or with --device cpu"
        ) from error
    finally:
        reader.close()
