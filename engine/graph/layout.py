"""Assigns every output tensor to a shard and an offset, before the first byte is computed.

The layout is a pure function of the graph (which depends on the recipe and the source headers) and the shard size.

Copied tensors can be reflinked if source and output have the same offset within a block of 4096 bytes. Therefore, a run
of copied tensors that is contiguous in its source stays contiguous and keeps its offset modulo 4096: spaces after a
shard's header determine where the data starts, and a following run must continue at that offset. Short runs, which are
not worth it, go after longer ones or among the computed tensors, in shards whose data starts at a multiple of 4096.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from ...errors import UsageError
from ...io.checkpoint.torch_names import is_torch_name
from ...io.safetensors.header import build_header
from .graph import MergeGraph

LAYOUT_VERSION = 1
"""Version of the layout; increase it with every change of tensor offsets or shard headers."""
BLOCK = 4096
SHORTEST_RUN = 1 << 20
"""The minimum size of a run that keeps its source's offset modulo 4096."""
_HEADER_SLACK = 8 + BLOCK + 64  # length field, padding and the default metadata
_DEFAULT_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output.

    Args:
        name: final path of the file in OUT.
        data_start: size of the header in bytes.
        outputs: numbers of the output tensors in the file, by offset.
        nbytes: size of the file in bytes, including the header.
        computed: ranges (offset, bytes) that are computed rather than copied.
        build: function that builds the final header. The headers of 250,000 tensors have 34 MB, so they aren't kept.
    """

    name: str
    data_start: int
    outputs: array[int] = field(repr=False)
    nbytes: int
    computed: tuple[tuple[int, int], ...] = field(repr=False)
    build: Callable[[], bytes] = field(repr=False, compare=False)

    @property
    def header(self) -> bytes:
        """The final header, which is built at every use."""
        return self.build()


@dataclass(frozen=True, slots=True)
class Layout:
    """All shards, and the location of every output.

    Args:
        shards: the shards in the order of their names, first those in OUT itself, then those of each folder.
        shard_of: for each output, the index of its shard.
        offset_of: for each output, its offset in the shard in bytes.
    """

    shards: tuple[Shard, ...]
    shard_of: array[int]
    offset_of: array[int]

    def __repr__(self) -> str:
        """One line with the number of shards and outputs."""
        return f"<Layout: {len(self.shard_of):,} tensors in {len(self.shards):,} shards, {self.nbytes:,} bytes>"

    def shards_in(self, folder: str) -> list[Shard]:
        """The shards in a folder of OUT, or in OUT itself."""
        return [shard for shard in self.shards if shard.name.rpartition("/")[0] == folder]

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes, including headers."""
        return sum(shard.nbytes for shard in self.shards)


@dataclass(slots=True)
class _OpenShard:
    """A shard that is being filled."""

    residue: int  # offset of the data, modulo BLOCK
    outputs: list[int] = field(default_factory=list)
    data: int = 0
    header: int = _HEADER_SLACK  # an upper bound

    @property
    def end(self) -> int:
        """Offset of the next tensor, modulo BLOCK."""
        return (self.residue + self.data) % BLOCK


def lay_out(
    graph: MergeGraph, shard_size: int, metadata: dict[str, str] | None = None, *, stem: str = "model"
) -> Layout:
    """Lay out the outputs of a graph, in its order except for runs, which keep the order of their source.

    Args:
        graph: the graph with the outputs.
        shard_size: maximum size of a shard in bytes; a larger tensor gets a shard of its own.
        metadata: metadata for the header of every shard; by default, the format.
        stem: beginning of the shards' names, under which loaders look for them.

    Raises:
        UsageError: for a shard size that is too small for a header.
    """
    if shard_size < 2 * BLOCK:
        raise UsageError(f"--shard-size {shard_size} is too small for a shard's header: use at least 64KB")
    sizes = array("Q", graph.outputs.of_nodes(graph.by_class(graph.nbytes)))
    copied = bytearray(graph.outputs.of_nodes(graph.by_class(lambda node: graph.operation(node).copies_tensor)))
    layout = Layout((), array("I", bytes(4 * len(sizes))), array("Q", bytes(8 * len(sizes))))
    for folder in graph.outputs.folders:
        runs, loose = _runs(graph, graph.outputs_in(folder), copied)
        packer = _Packer(graph, sizes, copied, shard_size - _metadata_bound(metadata))
        for run in runs:
            packer.place_run(run)
        packer.place_loose(loose)
        shards = sorted((shard for shard in packer.shards if shard.outputs), key=lambda shard: min(shard.outputs))
        built = _build(graph, shards, sizes, copied, metadata or _DEFAULT_METADATA, (folder, stem), layout)
        layout = replace(layout, shards=(*layout.shards, *built))
    return layout


def _runs(graph: MergeGraph, numbers: Sequence[int], copied: bytearray) -> tuple[list[list[int]], list[int]]:
    """Split outputs into runs that are contiguous in a source file, in the source's order, and all others."""
    if not any(copied):
        return [], list(numbers)
    files: dict[Path, int] = {}
    copies: list[tuple[int, int, int, int, int]] = []
    loose: list[int] = []
    for number in numbers:
        output = graph.outputs[number]
        if not copied[number]:
            loose.append(number)
            continue
        ref = graph.reads[graph.node_sources[output.node][0]]
        if is_torch_name(ref.file.name):  # its tensors have gaps between them: nearly all would get their own shards
            loose.append(number)
            continue
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
    """Assigns outputs to shards."""

    def __init__(self, graph: MergeGraph, sizes: Sequence[int], copied: bytearray, shard_size: int) -> None:
        self._graph = graph
        self._sizes = sizes
        self._copied = copied
        self._entries = array("Q", map(_entry_bound, graph.outputs.names, graph.outputs.of_nodes(graph.node_shape)))
        self._limit = shard_size
        self.shards: list[_OpenShard] = []
        self._by_end: dict[int, list[_OpenShard]] = {}

    def _add(self, shard: _OpenShard, number: int) -> None:
        shard.outputs.append(number)
        shard.data += self._sizes[number]
        shard.header += self._entries[number]

    def _fits(self, shard: _OpenShard, number: int) -> bool:
        needed = shard.data + self._sizes[number] + shard.header + self._entries[number]
        return needed <= self._limit or not shard.outputs

    def place_run(self, run: Sequence[int]) -> None:
        """Place a run at its source's offset modulo BLOCK; it continues in another shard if one is full."""
        reads, nodes = self._graph.reads, self._graph.node_sources
        shard: _OpenShard | None = None
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

    def _take_open(self, residue: int, number: int) -> _OpenShard:
        """An open shard that continues at `residue` and has room for the output, or a new one."""
        candidates = self._by_end.get(residue, [])
        for index, shard in enumerate(candidates):
            if self._fits(shard, number):
                del candidates[index]
                return shard
        shard = _OpenShard(residue)
        self.shards.append(shard)
        return shard

    def place_loose(self, numbers: Sequence[int]) -> None:
        """Place computed tensors and short runs, in the order of the model.

        In a shard, the widest elements come first, to align every tensor to the width of its elements. Short runs go
        after long ones if possible, to avoid a shard of a few kilobytes.
        """
        roomy = list(self.shards)
        loose: list[_OpenShard] = []
        shard = _OpenShard(0)
        sizes, entries, copied, limit = self._sizes, self._entries, self._copied, self._limit
        for number in numbers:
            if copied[number]:
                roomy = [each for each in roomy if self._fits(each, number)]
                width = max(8, self._bits(number)) // 8
                previous = next((each for each in roomy if each.end % width == 0), None)
                if previous is not None:
                    self._add(previous, number)
                    continue
            size, entry = sizes[number], entries[number]
            if not shard.outputs or shard.data + shard.header + size + entry > limit:  # see `_fits`
                shard = _OpenShard(0)
                self.shards.append(shard)
                loose.append(shard)
            shard.outputs.append(number)
            shard.data += size
            shard.header += entry
        for shard in loose:
            if len(set(map(self._bits, shard.outputs))) > 1:
                shard.outputs.sort(key=lambda number: -self._bits(number))

    def _bits(self, number: int) -> int:
        """Width of an output's elements."""
        return self._graph.node_dtype[self._graph.outputs.nodes[number]].bits


def _metadata_bound(metadata: dict[str, str] | None) -> int:
    """An upper bound for the size of metadata in a header beyond that of the default, in bytes."""
    quoted = map(json.encoder.encode_basestring, chain.from_iterable((metadata or _DEFAULT_METADATA).items()))
    return sum(len(text.encode()) + 2 for text in quoted) - len('"format":"pt",  ') if metadata else 0


def _entry_bound(name: str, shape: Sequence[int]) -> int:
    """An upper bound for the size of a tensor's entry in a header, in bytes."""
    quoted = json.encoder.encode_basestring(name).encode()
    # keys and punctuation; two offsets; each dimension
    return len(quoted) + 120 + 20 * len(shape)


def _build(
    graph: MergeGraph,
    shards: Sequence[_OpenShard],
    sizes: Sequence[int],
    copied: bytearray,
    metadata: dict[str, str],
    place: tuple[str, str],
    layout: Layout,
) -> list[Shard]:
    """Build the shards of one folder, which follow those of `layout`, and add their outputs' locations to it.

    `place` is the folder and the beginning of the shards' names.
    """
    folder, stem = place
    built = []
    shard_of, offset_of = layout.shard_of, layout.offset_of
    for index, shard in enumerate(shards):
        outputs = array("I", shard.outputs)
        build = partial(_build_header, graph, outputs, metadata, shard.residue)
        data_start = offset = len(build())
        at = len(layout.shards) + index
        for number in outputs:
            shard_of[number] = at
            offset_of[number] = offset
            offset += sizes[number]
        computed = _computed_ranges(outputs, sizes, copied, data_start)
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        path = f"{folder}/{name}" if folder else name
        built.append(Shard(path, data_start, outputs, offset, computed, build))
    return built


def _computed_ranges(
    outputs: Sequence[int], sizes: Sequence[int], copied: bytearray, offset: int
) -> tuple[tuple[int, int], ...]:
    """The ranges (offset, bytes) of a shard that are computed; its data starts at `offset`."""
    if not any(map(copied.__getitem__, outputs)):
        nbytes = sum(map(sizes.__getitem__, outputs))
        return ((offset, nbytes),) if nbytes else ()
    ranges: list[tuple[int, int]] = []
    for number in outputs:
        if sizes[number] and not copied[number]:
            if ranges and sum(ranges[-1]) == offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + sizes[number])
            else:
                ranges.append((offset, sizes[number]))
        offset += sizes[number]
    return tuple(ranges)


def _build_header(graph: MergeGraph, outputs: Sequence[int], metadata: dict[str, str], residue: int) -> bytes:
    """Build the header of a shard with these outputs, whose data starts at an offset modulo BLOCK."""
    names, nodes = graph.outputs.names, graph.outputs.nodes
    entries = ((names[n], graph.node_dtype[nodes[n]], graph.node_shape[nodes[n]]) for n in outputs)
    return build_header(entries, metadata, data_offset_modulo=residue)
