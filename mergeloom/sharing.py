"""Which tensors of a plan never pass through the process: their blocks are shared, or the kernel copies them.

Whether that can be done depends on where OUT lies, so that a plan without OUT counts every byte as read and written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .engine.graph import Kind
from .engine.schedule import make_schedule
from .engine.transfer import BUFFER_BYTES, plan_transfers
from .io.platform import DISABLED, file_system
from .planning import Plan

SHARING = frozenset({"xfs", "btrfs", "bcachefs", "zfs", "ocfs2", "apfs"})
"""File systems whose files can share blocks (XFS only where it was made so, which the merge finds out)."""


def place(plan: Plan, out: Path) -> Plan:
    """The plan for this OUT: what can be shared with the sources, or copied by the kernel, is taken out of the lanes.

    A tensor with several destinations that can't share blocks stays in the lanes, where it is read once. Which bytes
    come out where is the same either way.
    """
    graph = plan.built.graph
    device = _device(out)
    shares = file_system(out) in SHARING and "clone" not in DISABLED
    destinations = graph.destinations()
    nodes = set()
    for node in graph:
        if graph.operation(node).kind is not Kind.COPY or not graph.nbytes(node):
            continue
        file = graph.reads[graph.node_sources[node][0]].file
        if _device(file) == device and (shares or len(destinations[node]) == 1):
            nodes.add(node)
    if not nodes:
        return plan
    transfers = tuple(plan_transfers(graph, plan.layout, nodes))
    budget = replace(plan.schedule.budget, baseline=plan.schedule.budget.baseline + copy_threads(plan) * BUFFER_BYTES)
    schedule = make_schedule(graph, budget, done={node: graph.nbytes(node) for node in nodes})
    return replace(plan, schedule=schedule, transfers=transfers, shares=shares)


def copy_threads(plan: Plan) -> int:
    """How many threads move bytes."""
    return max(2, min(8, sum(device.threads for device in plan.schedule.budget.devices)))


def _device(path: Path) -> int:
    """The device that holds a path, or its nearest parent that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.stat().st_dev
