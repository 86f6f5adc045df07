"""Decides which tensors bypass the process: they are reflinked, or the kernel copies them.

What is possible depends on the file system of OUT, so a plan without OUT counts every byte as read and written.
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
from ..schedule.schedule import make_schedule
from .plan import Plan
from .transfers import BUFFER_BYTES, TRANSFER_BYTES, plan_transfers, source_of

SHARING = frozenset({"xfs", "btrfs", "bcachefs"})
"""File systems with reflinks; used only if the file system can't be asked."""
EDGES = "at another offset within a disk block than in the input, or less than a block"


def with_reflinks(plan: Plan, out: Path, *, digests: bool = False) -> Plan:
    """Plan for this OUT: remove the tensors from the lanes that can be reflinked, or copied by the kernel.

    A tensor that can't be reflinked stays in the lanes if it has several destinations, since the lanes read it once,
    or if its digest is needed. The output has the same bytes either way.

    Args:
        plan: plan of the merge. One for the same OUT is returned unchanged.
        out: output directory, or any directory on its file system.
        digests: whether every tensor needs a digest; reflinked tensors are then read at the end.
    """
    if plan.out == out and plan.digests == digests:
        return plan
    plan = plan.in_lanes or plan
    graph, budget = plan.built.graph, plan.schedule.budget
    destinations = graph.destinations()
    copies = [node for node in graph if graph.operation(node).copies_tensor and graph.nbytes(node)]
    obstacles = why_not_shared({source_of(graph, node) for node in copies}, out)
    sharing = {file for file, reason in obstacles.items() if not reason}
    device, mounts = mount_of(out).device, _mounts(obstacles)
    kernel_copied = {file for file in obstacles if copies_in_kernel() and not digests and mounts[file].device == device}
    nodes = frozenset(
        node
        for node, file in ((node, source_of(graph, node)) for node in copies)
        if file in sharing or (file in kernel_copied and len(destinations[node]) == 1)
    )
    transfers = tuple(plan_transfers(graph, plan.layout, nodes, sharing))
    nbytes = len(transfers) * TRANSFER_BYTES + (copy_threads(plan) * BUFFER_BYTES if nodes else 0)
    try:
        reduced = replace(budget, baseline=budget.baseline + nbytes)
        # without transfers the schedule is the same, and a second one would take as much memory again
        done = {node: graph.nbytes(node) for node in nodes}
        schedule = make_schedule(graph, reduced, done=done) if nodes else plan.schedule
    except BudgetError:  # the merge fits only without the threads that copy
        nodes, transfers, schedule = frozenset(), (), plan.schedule
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
        in_lanes=plan,
    )


def copy_buffer_bytes(plan: Plan) -> int:
    """RAM that a plan sets aside for the buffers of bulk copies, in bytes."""
    return copy_threads(plan) * BUFFER_BYTES if plan.moved else 0


def copy_threads(plan: Plan) -> int:
    """Number of threads for bulk copies and checks."""
    return max(2, min(8, sum(device.threads for device in plan.schedule.budget.devices)))


def why_not_shared(files: Iterable[Path], out: Path) -> Mapping[Path, str]:
    """Return for each file why it can't be reflinked into `out`; "" if it can, as far as is known.

    Asks the file systems, and changes nothing. If they can't be asked (`out` is not writable, or a file does not exist
    yet), the types of the file systems decide.
    """
    directory = out.absolute()
    while not os.path.isdir(directory) and directory != directory.parent:  # noqa: PTH112  accepts any name
        directory = directory.parent
    target = mount_of(directory)
    scratch = scratch_file(directory)
    reasons = {}
    try:
        for file, mount in _mounts(files).items():
            number = _try_clone(file, scratch)
            if number is None:
                can = target.kind in SHARING and "clone" not in DISABLED
                number = errno.EXDEV if mount.device != target.device else 0 if can else errno.EOPNOTSUPP
            if number == 0 and BLOCK % os.statvfs(directory).f_bsize:
                reasons[file] = f"the blocks of this {target.kind} are larger than {format_size(BLOCK)}"
            else:
                reasons[file] = _reason(number, target.kind, mount.device == target.device) if number else ""
    finally:
        if scratch is not None:
            os.close(scratch)
    return reasons


def _mounts(files: Iterable[Path]) -> dict[Path, Mount]:
    """Return the mount of each file. Each directory is looked up once."""
    known: dict[Path, Mount] = {}
    mounts = {}
    for file in files:
        directory = Path(os.path.realpath(file)).parent
        if directory not in known:
            known[directory] = mount_of(directory)
        mounts[file] = known[directory]
    return mounts


def _try_clone(file: Path, scratch: int | None) -> int | None:
    """Return the error number with which the file system refuses a clone, 0 if it does not; None if it can't be asked.

    Args:
        file: source file.
        scratch: descriptor of an unnamed file in the output directory; None if there is none.
    """
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


def _reason(number: int, kind: str, same: bool) -> str:
    """Explain why a clone is refused.

    Args:
        number: error number of the refused clone.
        kind: type of OUT's file system.
        same: whether the input is on the same file system.
    """
    if number == errno.EXDEV:
        if same:
            return "OUT is on another mount of the input's file system, and this kernel doesn't share across mounts"
        return "OUT is on another file system than the input"
    if "clone" in DISABLED:
        return "sharing is switched off"
    if number in (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.ENOTSUP):
        option = " as it was made (mkfs.xfs -m reflink=1)" if kind == "xfs" else ""
        return f"{kind or 'the file system'} doesn't share blocks{option}"
    return f"the file system refuses: {os.strerror(number)}"
