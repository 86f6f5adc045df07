"""Runs a schedule in the executor's lanes, and explains failures of memory and devices to the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ...errors import EnvironmentFailure
from ...io import platform
from ...io.counters import IoCounters
from ...io.reading import FileStamps, Observe, Reader
from ..cost.machine import CACHED_SHARE, available_ram, resident_memory
from ..execute.compute.runner import DamagedInput
from ..execute.devices import open_devices
from ..execute.ledger import Ledger
from ..execute.measurements import Measured
from ..execute.replan import run_graph
from ..execute.survival import SurvivalSums
from ..execute.tasks import Sink
from ..model.paths import located
from ..schedule.schedule import Schedule
from .plan import Plan

_DEVICE_ERRORS = {"AcceleratorError", "OutOfMemoryError"}  # torch's classes, by name: torch may not be imported


def run_lanes(
    plan: Plan,
    schedule: Schedule,
    sink: Sink,
    counters: IoCounters,
    notify: Callable[[], None],
    *,
    stamps: FileStamps | None = None,
    done: Mapping[int, int] | None = None,
    observe: Observe | None = None,
    ledger: Ledger | None = None,
    survival: SurvivalSums | None = None,
) -> Measured:
    """Run a schedule of a plan.

    Args:
        plan: plan of the merge.
        schedule: the plan's schedule, or one of the part that is left to do.
        sink: sink that receives the output.
        counters: counters of the bytes read and written.
        notify: function that is called at intervals; if it raises, the run ends.
        stamps: expected stamps of the source files; None to accept any.
        done: number of bytes of each node that need not be written, as the schedule was made with.
        observe: function that is called with every range of a source file that is read.
        ledger: ledger in which the buffers are reserved; one of its own if None.
        survival: receives the by-products of kernels; None to drop them.

    Raises:
        MergeloomError: an error in any lane.
    """
    inputs = sum(ref.nbytes for ref in plan.built.graph.reads)
    reader = Reader(keep_cached=inputs < CACHED_SHARE * available_ram(), stamps=stamps, observe=observe)
    try:
        with _located(plan), _explained(schedule):
            return run_graph(
                plan.built.graph,
                schedule,
                open_devices,
                reader,
                sink,
                done=done,
                allow_nonfinite=plan.stage.allow_nonfinite,
                notify=notify,
                counters=counters,
                ledger=ledger,
                # inside another program, its memory would be measured too, which the budget does not limit
                resident=resident_memory if platform.OWN_PROCESS else None,
                survival=survival,
            )
    finally:
        reader.close()


@contextmanager
def _located(plan: Plan) -> Iterator[None]:
    """Begin the message of an error about a model's values with the line of the recipe that names the model."""
    try:
        yield
    except DamagedInput as error:
        with located(plan.recipe, plan.built.models[error.model].reference):
            raise


@contextmanager
def _explained(schedule: Schedule) -> Iterator[None]:
    """Turn failed allocations and device errors into an EnvironmentFailure that says what to do."""
    try:
        yield
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
