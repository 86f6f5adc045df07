"""The executor's lanes, and which of them does the work of which state of a task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .devices.base import Device
from .lanes import Lane, Lanes, LaneTime
from .tasks import ChunkTask, ReadTask, TaskState

ChunkWork = Callable[[int, ChunkTask], None]
"""Function that does the work of a task's state, called as ``work(thread, task)``."""


@dataclass(frozen=True, slots=True)
class LaneWork:
    """The functions that the lanes call.

    Args:
        read: reads a chunk from a file, called as ``read(thread, read_task)``.
        upload: starts to copy a task's source chunks to its device.
        settle_uploads: ends the uploads to a device, called with its number when there is nothing more to upload.
        compute: computes a task.
        download: waits until a task's output chunk is in RAM.
        write: writes a task's output chunk.
    """

    read: Callable[[int, ReadTask], None]
    upload: ChunkWork
    settle_uploads: Callable[[int], None]
    compute: ChunkWork
    download: ChunkWork
    write: ChunkWork


class TaskLanes:
    """The lanes of one run.

    Args:
        failed: function that receives what a lane's work raises.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._lanes = Lanes(failed)
        self._read: Lane[ReadTask]
        self._by_state: Mapping[TaskState, Mapping[int, Lane[ChunkTask]]] = {}  # by state and number of the device

    def start(self, devices: Sequence[Device], readers: int, writers: int, work: LaneWork) -> None:
        """Start all lanes, in the order in which a chunk passes through them.

        Args:
            devices: devices of the schedule's budget, in its order.
            readers: number of read threads.
            writers: number of write threads.
            work: functions that the lanes call.

        Raises:
            EnvironmentFailure: if the system has no more threads; `stop` ends those that have started.
        """
        start = self._lanes.start
        separate = [number for number, device in enumerate(devices) if device.separate]
        self._read = start("read", readers, work.read)
        upload = {
            number: start("upload", 1, work.upload, functools.partial(work.settle_uploads, number))
            for number in separate
        }
        compute = {number: start("compute", device.threads, work.compute) for number, device in enumerate(devices)}
        download = {number: start("download", 1, work.download) for number in separate}
        self._by_state = {
            TaskState.UPLOADING: upload,
            TaskState.COMPUTING: compute,
            TaskState.DOWNLOADING: download,
            TaskState.WRITING: dict.fromkeys(compute, start("write", writers, work.write)),
        }

    def put(self, task: ChunkTask) -> None:
        """Put a task into the lane of its state, if there is one: in other states, a task waits for other tasks."""
        lanes = self._by_state.get(task.state)
        if lanes is not None:
            lanes[task.device].put(task.order, task)

    def put_read(self, order: int, read_task: ReadTask) -> None:
        """Put a chunk to read into the read lane; several tasks may wait for it."""
        self._read.put(order, read_task)

    def stop(self) -> None:
        """Discard all queued tasks and wait until every thread has ended."""
        self._lanes.stop()

    def times(self, until: float) -> dict[str, LaneTime]:
        """Return what the lanes of each name did, up to `until` (``time.perf_counter``)."""
        return self._lanes.times(until)
