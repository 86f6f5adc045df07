"""Which tensors of a plan never pass through the process: their blocks are shared, or the kernel copies them.

Whether that can be done depends on where OUT lies, so that a plan without OUT counts every byte as read and written.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ...errors import BudgetError
from ...io.output.clone import BLOCK
from ...io.platform import DISABLED, Mount, copies_in_kernel, mount_of, scratch_file, why_no_clone
from ...io.sizes import format_size
from ..graph.graph import Kind
from ..schedule.schedule import make_schedule
from .plan import Plan
from .transfers import BUFFER_BYTES, TRANSFER_BYTES, plan_transfers, source_of

SHARING = frozenset({"xfs", "btrfs", "bcachefs"})
"""File systems whose files can share blocks; this decides only where they can't be asked."""
EDGES = "at another offset within a disk block than in the input, or less than a block"


def place(plan: Plan, out: Path, *, digests: bool = False) -> Plan:
    """The plan for this OUT: what can be shared with the sources, or copied by the kernel, is taken out of the lanes.

    A tensor that can't share blocks stays in the lanes where it has several destinations, since there it is read once,
    or where its digest is wanted. Which bytes come out where is the same either way.

    Args:
        plan: one that was placed like this already is returned as it is.
        out: the model directory to be, or any directory on its file system.
        digests: whether every tensor needs a digest; what is shared is then read for it, in the end.
    """
    if plan.out == out and plan.digests == digests:
        return plan
    plan = unplaced(plan)
    graph, budget = plan.built.graph, plan.schedule.budget
    destinations = graph.destinations()
    copies = [node for node in graph if graph.operation(node).kind is Kind.COPY and graph.nbytes(node)]
    obstacles = why_not_shared({source_of(graph, node) for node in copies}, out)
    sharing = {file for file, reason in obstacles.items() if not reason}
    home, mounts = mount_of(out).device, _mounts(obstacles)
    beside = {file for file in obstacles if copies_in_kernel() and not digests and mounts[file].device == home}
    nodes = frozenset(
        node
        for node, file in ((node, source_of(graph, node)) for node in copies)
        if file in sharing or (file in beside and len(destinations[node]) == 1)
    )
    transfers = tuple(plan_transfers(graph, plan.layout, nodes, sharing))
    more = len(transfers) * TRANSFER_BYTES + (copy_threads(plan) * BUFFER_BYTES if nodes else 0)
    try:
        beside_lanes = replace(budget, baseline=budget.baseline + more)
        schedule = make_schedule(graph, beside_lanes, done={node: graph.nbytes(node) for node in nodes})
    except BudgetError:  # it fits without the threads that copy
        nodes, transfers = frozenset(), ()
        schedule = make_schedule(graph, budget)
    unshared: Counter[str] = Counter()
    for node in copies:
        reason = obstacles[source_of(graph, node)] or ("" if node in nodes else "no memory is left for it")
        if reason:
            unshared[reason] += graph.nbytes(node) * len(destinations[node])
    unshared[EDGES] += sum(transfer.nbytes - transfer.shared for transfer in transfers if transfer.shares)
    return replace(
        plan,
        schedule=schedule,
        transfers=transfers,
        moved=nodes,
        out=out,
        unshared=tuple((reason, nbytes) for reason, nbytes in unshared.most_common() if nbytes),
        digests=digests,
    )


def unplaced(plan: Plan) -> Plan:
    """The plan as it was before it was placed anywhere."""
    if plan.out is None:
        return plan
    schedule = make_schedule(plan.built.graph, plan.budget)
    return replace(plan, schedule=schedule, transfers=(), moved=frozenset(), out=None, unshared=(), digests=False)


def copy_threads(plan: Plan) -> int:
    """How many threads move bytes."""
    return max(2, min(8, sum(device.threads for device in plan.schedule.budget.devices)))


def why_not_shared(files: Iterable[Path], out: Path) -> Mapping[Path, str]:
    """For each file why its blocks can't be shared with files in `out`; "" where they can, as far as can be told.

    Asks the file systems, changing nothing. Where they can't be asked (`out` can't be written to, or a file isn't there
    yet), their types decide.
    """
    directory = out.absolute()
    while not os.path.isdir(directory) and directory != directory.parent:  # noqa: PTH112  no name makes it fail
        directory = directory.parent
    home = mount_of(directory)
    scratch = scratch_file(directory)
    found = {}
    try:
        for file, mount in _mounts(files).items():
            number = _asked(file, scratch)
            if number is None:
                can = home.kind in SHARING and "clone" not in DISABLED
                number = errno.EXDEV if mount.device != home.device else 0 if can else errno.EOPNOTSUPP
            if number == 0 and BLOCK % os.statvfs(directory).f_bsize:
                found[file] = f"the blocks of this {home.kind} are larger than {format_size(BLOCK)}"
            else:
                found[file] = _words(number, home.kind, mount.device == home.device) if number else ""
    finally:
        if scratch is not None:
            os.close(scratch)
    return found


def _mounts(files: Iterable[Path]) -> dict[Path, Mount]:
    """The mount of each file; many lie in one directory."""
    known: dict[Path, Mount] = {}
    found = {}
    for file in files:
        directory = Path(os.path.realpath(file)).parent
        if directory not in known:
            known[directory] = mount_of(directory)
        found[file] = known[directory]
    return found


def _asked(file: Path, scratch: int | None) -> int | None:
    """The error number with which the file system refuses; None where it can't be asked."""
    if scratch is None:
        return None
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return why_no_clone(descriptor, scratch)
    finally:
        os.close(descriptor)


def _words(number: int, kind: str, same: bool) -> str:
    """What an error number of a refused sharing means."""
    if number == errno.EXDEV:
        if same:
            return "OUT is on another mount of the input's file system, and this kernel doesn't share across mounts"
        return "OUT is on another file system than the input"
    if "clone" in DISABLED:
        return "sharing is switched off"
    if number in (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.ENOTSUP):
        made = " as it was made (mkfs.xfs -m reflink=1)" if kind == "xfs" else ""
        return f"{kind or 'the file system'} doesn't share blocks{made}"
    return f"the file system refuses: {os.strerror(number)}"
