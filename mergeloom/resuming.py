"""What of an unfinished merge is durable: what its journal says, held against the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .engine.graph import Kind, MergeGraph
from .engine.layout import Layout
from .engine.transfer import Transfer
from .errors import MergeloomError
from .io.digests import BLOCK_BYTES, BlockDigests
from .io.journal import Found
from .io.reading import Reader

CHECKED_BYTES = 1 << 30
"""How much of what became durable last is read again before a merge goes on with it."""

_CHUNK = 4 << 20
_DIGEST_BYTES = 16

Range = tuple[int, int]


@dataclass(slots=True)
class Durable:
    """What needs not be made again.

    Args:
        whole: the digests of the blocks of each node that is whole and came through the process.
        begun: nodes of which the first bytes are written, with these digested.
        copied: ranges of shards that were copied beside the lanes, by shard, in ascending order and apart.
        checked: bytes that were read again and found to be what the journal says.
        damaged: how many blocks were found not to be.
    """

    whole: dict[int, list[bytes]] = field(default_factory=dict)
    begun: dict[int, BlockDigests] = field(default_factory=dict)
    copied: dict[int, list[Range]] = field(default_factory=dict)
    checked: int = 0
    damaged: int = 0

    def done(self, graph: MergeGraph, layout: Layout) -> dict[int, int]:
        """For each node that is whole or begun, how many of its bytes are durable."""
        done = {node: digests.position for node, digests in self.begun.items()}
        done |= {node: graph.nbytes(node) for node in self.whole}
        destinations = graph.destinations() if self.copied else []
        for node, places in enumerate(destinations):
            if node not in self.whole and graph.operation(node).kind is Kind.COPY and graph.nbytes(node):
                ranges = ((layout.shard_of[output], layout.offset_of[output]) for output in places)
                if all(self._has_copy(shard, start, start + graph.nbytes(node)) for shard, start in ranges):
                    done[node] = graph.nbytes(node)
        return done

    def _has_copy(self, shard: int, start: int, end: int) -> bool:
        return any(low <= start and end <= high for low, high in self.copied.get(shard, ()))

    def uncopied(self, transfers: Iterable[Transfer]) -> list[Transfer]:
        """What is left of these transfers."""
        left = []
        for transfer in transfers:
            position, end = transfer.target, transfer.target + transfer.nbytes
            for low, high in [*self.copied.get(transfer.shard, ()), (end, end)]:
                if low > position and position < end:
                    left.append(_part(transfer, position, min(low, end)))
                position = max(position, high)
        return left


def _part(transfer: Transfer, start: int, end: int) -> Transfer:
    offset = transfer.offset + start - transfer.target
    return replace(transfer, offset=offset, target=start, nbytes=end - start)


@dataclass(slots=True)
class _Claims:
    """What a journal says of one node."""

    blocks: dict[int, bytes] = field(default_factory=dict)
    tail: tuple[int, int, bytes] = (0, 0, b"")  # the block's number, bytes of it, their digest


def durable_of(found: Found | None, graph: MergeGraph, layout: Layout, shard_path: Callable[[int], Path]) -> Durable:
    """What an earlier run has left that can be built on.

    Begun blocks, and the blocks that became durable last, are read again. Where one of these isn't what the journal
    says, the disk has lost what it said was durable, and all of it is read.

    Args:
        found: the journal; None for a new merge.
        graph: what is made: the same as then.
        layout: where it lies.
        shard_path: where each shard is.
    """
    if found is None:
        return Durable()
    claims, order = _claims(found, graph)
    durable = Durable(copied=_copied(found, layout))
    destinations = graph.destinations()

    def places(node: int) -> list[tuple[Path, int]]:
        return [(shard_path(layout.shard_of[output]), layout.offset_of[output]) for output in destinations[node]]

    reader = Reader()
    try:
        checker = _Checker(graph, claims, places, reader)
        checker.check_newest(reversed(order))
        tails = {node: tail for node in claims if (tail := checker.tail(node)) is not None}
        if checker.damaged:
            checker.check_all()
            durable.copied = {}  # nothing tells whether these are still what they were
    finally:
        reader.close()
    durable.checked, durable.damaged = checker.checked, len(checker.damaged)
    for node, claim in claims.items():
        blocks = [claim.blocks[number] for number in range(checker.contiguous(node))]
        if len(blocks) == _count(graph.nbytes(node)):
            durable.whole[node] = blocks
        elif node in tails and len(tails[node].blocks) == len(blocks):
            durable.begun[node] = tails[node]
        elif blocks:
            durable.begun[node] = BlockDigests(graph.nbytes(node), blocks)
    return durable


class _Checker:
    """Holds blocks against what the journal says of them."""

    def __init__(
        self,
        graph: MergeGraph,
        claims: Mapping[int, _Claims],
        places: Callable[[int], Sequence[tuple[Path, int]]],
        reader: Reader,
    ) -> None:
        self._graph = graph
        self._claims = claims
        self._places = places
        self._reader = reader
        self._seen: set[tuple[int, int]] = set()
        self.damaged: set[tuple[int, int]] = set()
        self.checked = 0

    def contiguous(self, node: int) -> int:
        """How many of a node's first blocks are as they should be."""
        number, blocks = 0, self._claims[node].blocks
        while number in blocks and (node, number) not in self.damaged:
            number += 1
        return number

    def check_newest(self, newest: Iterable[tuple[int, int]]) -> None:
        """Check blocks, the newest first, up to CHECKED_BYTES."""
        begun = self.checked
        for node, number in newest:
            if self.checked - begun >= CHECKED_BYTES:
                return
            self._check(node, number)

    def check_all(self) -> None:
        """Check every block."""
        for node, claim in self._claims.items():
            for number in claim.blocks:
                self._check(node, number)

    def _check(self, node: int, number: int) -> None:
        if (node, number) in self._seen:
            return
        self._seen.add((node, number))
        start = number * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self._graph.nbytes(node))
        for file, offset in self._places(node):
            digests = BlockDigests(end - start)
            self._read(file, offset + start, digests, end - start, 0)
            if digests.blocks != [self._claims[node].blocks[number]]:
                self.damaged.add((node, number))

    def tail(self, node: int) -> BlockDigests | None:
        """The digests of a begun node with those bytes of its last block that are durable; None where none are."""
        number, nbytes, digest = self._claims[node].tail
        whole = self.contiguous(node)
        if not nbytes or number != whole:
            return None
        blocks = [self._claims[node].blocks[each] for each in range(whole)]
        digests = None
        for file, offset in self._places(node):
            digests = BlockDigests(self._graph.nbytes(node), blocks)
            start = whole * BLOCK_BYTES
            if not self._read(file, offset + start, digests, nbytes, start) or digests.tail() != digest:
                self.damaged.add((node, number))
                return None
        return digests

    def _read(self, file: Path, offset: int, digests: BlockDigests, nbytes: int, position: int) -> bool:
        """Feed a range of a file; whether it could be read."""
        buffer = memoryview(bytearray(min(_CHUNK, nbytes)))
        for done in range(0, nbytes, _CHUNK):
            view = buffer[: nbytes - done]
            try:
                self._reader.read(file, offset + done, view)
            except MergeloomError:
                return False
            digests.feed(position + done, view)
        self.checked += nbytes
        return True


def _count(nbytes: int) -> int:
    """How many blocks a tensor has."""
    return -(-nbytes // BLOCK_BYTES)


def _claims(found: Found, graph: MergeGraph) -> tuple[dict[int, _Claims], list[tuple[int, int]]]:
    """What a journal says of each node; and all blocks, in the order in which they became durable."""
    claims: dict[int, _Claims] = {}
    order: list[tuple[int, int]] = []
    for record in found.records:
        node, first = record.get("node"), record.get("first")
        if not (isinstance(node, int) and isinstance(first, int) and 0 <= node < len(graph.node_sources)):
            continue
        count, nbytes = _count(graph.nbytes(node)), graph.nbytes(node)
        claim = claims.setdefault(node, _Claims())
        for number, digest in enumerate(_digests(record.get("blocks")), first):
            if 0 <= number < count:
                claim.blocks[number] = digest
                order.append((node, number))
        number = first + len(_listed(record.get("blocks")))
        size, digest = _tail(record.get("tail"))
        if 0 < size < min(BLOCK_BYTES, nbytes - number * BLOCK_BYTES):
            claim.tail = max(claim.tail, (number, size, digest))
    return claims, order


def _copied(found: Found, layout: Layout) -> dict[int, list[Range]]:
    """The ranges of each shard that a journal says were copied, those put together that touch."""
    ranges: dict[int, list[Range]] = {}
    for record in found.records:
        given = _listed(record.get("copied"))
        if len(given) == 3 and all(isinstance(value, int) for value in given) and 0 <= given[0] < len(layout.shards):
            ranges.setdefault(given[0], []).append((given[1], given[2]))
    united: dict[int, list[Range]] = {}
    for shard, unsorted in ranges.items():
        merged: list[Range] = []
        for low, high in sorted(unsorted):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], high))
            else:
                merged.append((low, high))
        united[shard] = merged
    return united


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _digests(value: Any) -> Iterator[bytes]:
    """Digests in hexadecimal, up to one that is none."""
    for text in _listed(value):
        digest = _digest(text)
        if digest is None:
            return
        yield digest


def _digest(text: Any) -> bytes | None:
    try:
        digest = bytes.fromhex(text)
    except (TypeError, ValueError):
        return None
    return digest if len(digest) == _DIGEST_BYTES else None


def _tail(value: Any) -> tuple[int, bytes]:
    """Bytes of a block and their digest; 0 where there are none."""
    given = _listed(value)
    digest = _digest(given[1]) if len(given) == 2 else None
    return (given[0], digest) if digest is not None and isinstance(given[0], int) else (0, b"")
