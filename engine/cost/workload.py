"""The work of a merge: the input of every time estimate and measurement."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.graph import Kind, MergeGraph
from ..schedule.schedule import Schedule
from .machine import Machine, usable_cores


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a merge.

    Args:
        graph: the nodes and their sources.
        schedule: the steps in which they are executed.
        bytes_read: bytes that the process or the kernel's copy reads, re-reads included.
        bytes_written: bytes that the process or the kernel's copy writes.
        machine: the machine that the merge is planned for; None for this one.
    """

    graph: MergeGraph
    schedule: Schedule
    bytes_read: int
    bytes_written: int
    machine: Machine | None = None

    @property
    def cores(self) -> int:
        """Number of cores that the process may use, on the machine that the merge is planned for."""
        return (self.machine and self.machine.cores) or usable_cores()

    @property
    def computes(self) -> bool:
        """Whether any node computes; otherwise bytes are only copied."""
        return any(operation.kind is Kind.MERGE for operation in self.graph.operations)
