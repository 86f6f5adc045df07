"""Where every output tensor lies: which shard, which offset. Decided before the first byte is computed.

A pure function of the graph (which follows from the recipe and the source headers) and the shard size; version 1.

Tensors that are only copied can share their disk blocks with the source where both lie at the same offset within a
block of 4096 bytes. So a run of them that is contiguous in its source stays contiguous here and keeps its offset modulo
4096: spaces after a shard's header set where its data begins, and what follows a run must continue at that offset. Runs
that are too short to be worth it lie behind longer ones, or with the computed tensors, whose shards' data begins at a
multiple of 4096.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import UsageError
from ...io.safetensors.dtypes import DType
from ...io.safetensors.header import build_header
from .graph import Kind, MergeGraph

LAYOUT_VERSION = 1
"""Raised with every change of which tensor lies where, or of a shard's header."""
BLOCK = 4096
SHORTEST_RUN = 1 << 20
"""Runs of fewer bytes are laid out like computed tensors."""
_HEADER_SLACK = 8 + BLOCK + 64  # the length, the padding, and the metadata


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output.

    Args:
        name: its final name in OUT, with the folder that it lies in.
        header: its first bytes, final.
        outputs: the numbers of the output tensors in it, as they lie.
        nbytes: its size, the header included.
        computed: ranges (offset, bytes) that will be computed rather than copied.
    """

    name: str
    header: bytes
    outputs: tuple[int, ...]
    nbytes: int
    computed: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Every shard, and the place of every output.

    Args:
        shards: in the order of their names, those of OUT itself first, then those of each folder.
        shard_of: for each output, the number of its shard.
        offset_of: for each output, the offset of its first byte in the shard.
    """

    shards: tuple[Shard, ...]
    shard_of: list[int]
    offset_of: list[int]

    def shards_in(self, folder: str) -> list[Shard]:
        """The shards in a folder of OUT, or in OUT itself."""
        return [shard for shard in self.shards if shard.name.rpartition("/")[0] == folder]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)


@dataclass(slots=True)
class _Open:
    """A shard that is being filled."""

    residue: int  # where its data begins, modulo BLOCK
    outputs: list[int] = field(default_factory=list)
    data: int = 0
    header: int = _HEADER_SLACK  # an upper bound

    @property
    def end(self) -> int:
        """Where the next tensor would begin, modulo BLOCK."""
        return (self.residue + self.data) % BLOCK


def lay_out(graph: MergeGraph, shard_size: int, metadata: dict[str, str] | None = None) -> Layout:
    """The layout of a graph's outputs.

    Args:
        graph: the outputs are laid out in its order, but for runs, which keep the order of their source.
        shard_size: the most bytes of a shard; a tensor that is larger has a shard to itself.
        metadata: of every shard's header.

    Raises:
        UsageError: for a shard size that no header fits.
    """
    if shard_size < 2 * BLOCK:
        raise UsageError(f"--shard-size {shard_size} is too small for a shard's header: give at least 64KB")
    sizes = [graph.nbytes(output.node) for output in graph.outputs]
    layout = Layout((), [0] * len(sizes), [0] * len(sizes))
    for folder in dict.fromkeys(output.folder for output in graph.outputs):
        runs, loose = _runs(graph, graph.outputs_in(folder))
        packer = _Packer(graph, sizes, shard_size)
        for run in runs:
            packer.place_run(run)
        packer.place_loose(loose)
        shards = sorted((shard for shard in packer.shards if shard.outputs), key=lambda shard: min(shard.outputs))
        built = _build(graph, shards, sizes, metadata or {"format": "pt"}, folder, layout)
        layout = replace(layout, shards=(*layout.shards, *built))
    return layout


def _runs(graph: MergeGraph, numbers: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Outputs that are contiguous in one source file, in the source's order; and all other outputs."""
    files: dict[Path, int] = {}
    copies: list[tuple[int, int, int, int, int]] = []
    loose: list[int] = []
    for number in numbers:
        output = graph.outputs[number]
        if graph.operation(output.node).kind is not Kind.COPY:
            loose.append(number)
            continue
        ref = graph.reads[graph.node_sources[output.node][0]]
        copies.append((output.group, files.setdefault(ref.file, len(files)), ref.offset, ref.nbytes, number))
    runs: list[list[int]] = []
    end: tuple[int, int] | None = None
    for _, file, offset, nbytes, number in sorted(copies):
        if end != (file, offset):
            runs.append([])
        runs[-1].append(number)
        end = (file, offset + nbytes)
    long = []
    for run in runs:
        if sum(graph.nbytes(graph.outputs[number].node) for number in run) >= SHORTEST_RUN:
            long.append(run)
        else:
            loose += run
    return long, sorted(loose)


class _Packer:
    """Fills shards."""

    def __init__(self, graph: MergeGraph, sizes: Sequence[int], shard_size: int) -> None:
        self._graph = graph
        self._sizes = sizes
        self._limit = shard_size
        self.shards: list[_Open] = []
        self._by_end: dict[int, list[_Open]] = {}

    def _add(self, shard: _Open, number: int) -> None:
        shard.outputs.append(number)
        shard.data += self._sizes[number]
        shard.header += self._entry(number)

    def _entry(self, number: int) -> int:
        """An upper bound on the bytes that the output's entry takes in a header."""
        output = self._graph.outputs[number]
        name = json.encoder.encode_basestring(output.name).encode()
        # keys and punctuation; two offsets; each dimension
        return len(name) + 120 + 20 * len(self._graph.shape(output.node))

    def _fits(self, shard: _Open, number: int) -> bool:
        return not shard.outputs or shard.data + self._sizes[number] + shard.header + self._entry(number) <= self._limit

    def place_run(self, run: Sequence[int]) -> None:
        """Put a run where its offsets modulo BLOCK are its source's; it goes on in a new shard where one is full."""
        reads, nodes = self._graph.reads, self._graph.node_sources
        shard: _Open | None = None
        for number in run:
            if shard is not None and self._fits(shard, number):
                self._add(shard, number)
                continue
            if shard is not None:
                self._by_end.setdefault(shard.end, []).append(shard)
            residue = reads[nodes[self._graph.outputs[number].node][0]].offset % BLOCK
            shard = self._take_open(residue, number)
            self._add(shard, number)
        if shard is not None:
            self._by_end.setdefault(shard.end, []).append(shard)

    def _take_open(self, residue: int, number: int) -> _Open:
        """An open shard that goes on at `residue` and has room for the output, or a new one."""
        candidates = self._by_end.get(residue, [])
        for place, shard in enumerate(candidates):
            if self._fits(shard, number):
                del candidates[place]
                return shard
        shard = _Open(residue)
        self.shards.append(shard)
        return shard

    def place_loose(self, numbers: Sequence[int]) -> None:
        """Fill shards with computed tensors and short copies, in the order of the model.

        In a shard the widest elements come first, so that every tensor begins at a multiple of its element's width.
        Short copies go behind runs where they can, so that they don't make a shard of a few kilobytes.
        """
        roomy = list(self.shards)
        loose: list[_Open] = []
        shard: _Open | None = None
        for number in numbers:
            if self._graph.operation(self._graph.outputs[number].node).kind is Kind.COPY:
                roomy = [found for found in roomy if self._fits(found, number)]
                width = max(8, self._graph.node_dtype[self._graph.outputs[number].node].bits) // 8
                behind = next((found for found in roomy if found.end % width == 0), None)
                if behind is not None:
                    self._add(behind, number)
                    continue
            if shard is None or not self._fits(shard, number):
                shard = _Open(0)
                self.shards.append(shard)
                loose.append(shard)
            self._add(shard, number)
        for shard in loose:
            shard.outputs.sort(key=lambda number: -self._graph.node_dtype[self._graph.outputs[number].node].bits)


def _build(
    graph: MergeGraph,
    shards: Sequence[_Open],
    sizes: Sequence[int],
    metadata: dict[str, str],
    folder: str,
    layout: Layout,
) -> list[Shard]:
    """The shards of one folder, which come after those of `layout`; the places of their outputs are put into it."""
    built = []
    for index, shard in enumerate(shards):
        entries: list[tuple[str, DType, Sequence[int]]] = [
            (graph.outputs[n].name, graph.node_dtype[graph.outputs[n].node], graph.shape(graph.outputs[n].node))
            for n in shard.outputs
        ]
        header = build_header(entries, metadata, data_offset_modulo=shard.residue)
        offset = len(header)
        computed: list[tuple[int, int]] = []
        for number in shard.outputs:
            layout.shard_of[number], layout.offset_of[number] = len(layout.shards) + index, offset
            if graph.operation(graph.outputs[number].node).kind is not Kind.COPY and sizes[number]:
                if computed and sum(computed[-1]) == offset:
                    computed[-1] = (computed[-1][0], computed[-1][1] + sizes[number])
                else:
                    computed.append((offset, sizes[number]))
            offset += sizes[number]
        name = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        path = f"{folder}/{name}" if folder else name
        built.append(Shard(path, header, tuple(shard.outputs), offset, tuple(computed)))
    return built
