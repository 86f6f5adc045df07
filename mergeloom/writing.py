"""The executor's sink: output tensors become ranges of shards, digested on the way, and journaled once durable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from .engine.transfer import BUFFER_BYTES, Transfer
from .io.commit import GROUP_BYTES, GroupCommit
from .io.copying import Moved
from .io.digests import BLOCK_BYTES, BlockDigests
from .io.journal import Found, Journal

if TYPE_CHECKING:
    from .io.output import OutputDirectory
    from .planning import Plan


class _Tensor:
    """One node's output on its way."""

    __slots__ = ("digests", "journaled", "lock", "turn", "written")

    def __init__(self, nbytes: int, known: list[bytes]) -> None:
        self.digests = BlockDigests(nbytes, known)
        self.journaled = len(known)
        self.lock = threading.Lock()
        self.turn = threading.Condition()
        self.written: dict[int, int] = {}  # ranges that are written and not yet journaled: first byte -> end


def copied_nodes(found: Found | None) -> set[int]:
    """The nodes that a journal names as copied and durable."""
    return {int(record["copied"]) for record in found.records if "copied" in record} if found is not None else set()


def known_blocks(found: Found | None) -> dict[int, list[bytes]]:
    """The digests of the blocks of each node that a journal names as durable."""
    known: dict[int, list[bytes]] = {}
    for record in found.records if found is not None else ():
        if "node" in record:
            blocks = known.setdefault(int(record["node"]), [])
            if int(record["first"]) == len(blocks):
                blocks += [bytes.fromhex(text) for text in record["blocks"]]
    return known


class Shards:
    """Writes a plan's output tensors to their places.

    Args:
        plan: what is made.
        out: where.
        journal: to which durable blocks are added.
        known: the blocks of each node that are durable already.
        failed: called with what goes wrong when data is synced.
        group_bytes: the most bytes that are written and not yet durable.
    """

    def __init__(
        self,
        plan: Plan,
        out: OutputDirectory,
        journal: Journal,
        known: Mapping[int, list[bytes]],
        failed: Callable[[BaseException], None],
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        self._graph = plan.built.graph
        self._layout = plan.layout
        self._destinations = self._graph.destinations()
        self._out = out
        self._lock = threading.Lock()
        self._tensors: dict[int, _Tensor] = {}
        self._known = dict(known)
        self.commits = GroupCommit(out.sync, journal.append, failed, group_bytes=group_bytes)
        self.digests: dict[int, list[bytes]] = dict(known)
        self.copied: set[int] = set()
        self.moved = Moved()
        self._uncopied: dict[int, int] = {}
        self._buffers: list[memoryview] = []

    def _tensor(self, node: int) -> _Tensor:
        with self._lock:
            found = self._tensors.get(node)
            if found is None:
                found = _Tensor(self._graph.nbytes(node), list(self._known.get(node, [])))
                if found.journaled * BLOCK_BYTES >= found.digests.nbytes and found.journaled:
                    found.journaled = len(found.digests.blocks)
                self._tensors[node] = found
            return found

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Put a piece of a node's output in all its places. Pieces begin in order, and may overlap in time."""
        tensor = self._tensor(node)
        with tensor.turn:
            while not tensor.digests.reached(offset):
                tensor.turn.wait()
            tensor.digests.feed(offset, data)
            tensor.turn.notify_all()
        places = self._destinations[node]
        for output in places:
            self._out.write(self._layout.shard_of[output], self._layout.offset_of[output] + offset, data)
        records = self._note(node, tensor, offset, offset + len(data))
        shards = {self._layout.shard_of[output] for output in places}
        self.commits.add(shards, len(data) * len(places), records)

    def _note(self, node: int, tensor: _Tensor, start: int, end: int) -> Collection[Mapping[str, Any]]:
        """The record of the blocks that are whole now that this range is written, if any are."""
        with tensor.lock:
            tensor.written[start] = end
            first = tensor.journaled
            position = first * BLOCK_BYTES
            while (place := next((s for s, e in tensor.written.items() if s <= position < e), None)) is not None:
                position = tensor.written.pop(place)
            whole = position >= tensor.digests.nbytes
            blocks = len(tensor.digests.blocks) if whole else position // BLOCK_BYTES
            if position > blocks * BLOCK_BYTES and not whole:
                tensor.written[blocks * BLOCK_BYTES] = position
            if blocks <= first:
                return ()
            tensor.journaled = blocks
            found = [digest.hex() for digest in tensor.digests.blocks[first:blocks]]
            return ({"node": node, "first": first, "blocks": found},)

    def begin_copies(self, transfers: Collection[Transfer], threads: int) -> None:
        """Expect these transfers, by so many threads."""
        self._buffers = [memoryview(bytearray(0)) for _ in range(threads)]
        for transfer in transfers:
            for output, nbytes in transfer.outputs:
                node = self._graph.outputs[output].node
                self._uncopied[node] = self._uncopied.get(node, 0) + nbytes

    def copy(self, thread: int, transfer: Transfer, share: bool) -> None:
        """Perform a transfer; a node of which all copies are made is journaled."""
        if not self._buffers[thread]:
            self._buffers[thread] = memoryview(bytearray(BUFFER_BYTES))
        moved = self._out.receive(
            transfer.shard,
            transfer.target,
            transfer.file,
            transfer.offset,
            transfer.nbytes,
            self._buffers[thread],
            share=share,
        )
        records = []
        with self._lock:
            self.moved.add(moved)
            for output, nbytes in transfer.outputs:
                node = self._graph.outputs[output].node
                self._uncopied[node] -= nbytes
                if self._uncopied[node] == 0:
                    records.append({"copied": node})
                    self.copied.add(node)
        self.commits.add({transfer.shard}, moved.copied + moved.carried + 1, records)

    def finished(self, node: int) -> None:
        """Keep the digests of a node that is whole."""
        tensor = self._tensor(node)
        with self._lock:
            self.digests[node] = tensor.digests.blocks
            del self._tensors[node]
