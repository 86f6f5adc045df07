"""The plan of a merge: the schedule that the merge executes and the dry run prints, and what it will need."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...io.hub.repository import HubFile
from ...io.safetensors.tensors import TensorRef
from ..cost.machine import Machine
from ..cost.workload import Workload
from ..files.sources import FileSources, OutputModel
from ..files.write import OutputContent
from ..graph.build import BuiltGraph
from ..graph.graph import Kind
from ..graph.layout import Layout
from ..model.open import is_remote
from ..recipe.types import Recipe, Stage
from ..schedule.schedule import Budget, Schedule
from ..schedule.traffic import bytes_of_models, bytes_of_reads, downloaded, peak_of, read_again
from .transfers import Transfer

RecipeLike = Recipe | str | os.PathLike[str] | Mapping[str, object]
"""A recipe: the path of a YAML file, a dict that says the same, or a Recipe."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `plan` and `merge` can be told beside the recipe.

    Args:
        max_ram: the bound on the process's resident memory, in bytes; by default a share of the machine's.
        max_vram: what may be held on each GPU, in bytes; by default a share of its memory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, or several with commas.
        seed: of the random methods.
        shard_size: the most bytes of an output file.
        threads: compute threads of the CPU; by default the cores that the process may use.
        strict: make unknown keys and parameters in the recipe errors.
        machine: the machine to plan for; this one where None.
        methods: Python files with merge methods of the user's.
    """

    max_ram: int | None = None
    max_vram: int | None = None
    device: str = "auto"
    seed: int = 0
    shard_size: int = 5 * 10**9
    threads: int | None = None
    strict: bool = False
    machine: Machine | None = None
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a merge will do: the very schedule that it performs, and what the dry run prints.

    Args:
        recipe: what the user wrote.
        stage: the stage that is made.
        built: the graph, and what the output's other files need.
        files: where the files beside the weights come from.
        layout: where every output tensor lies.
        schedule: the steps, with what they hold.
        options: what it was made with.
        budget: of the merge before OUT is known.
        warnings: what the user should know.
        transfers: ranges that never pass through the lanes (see `sharing.place`).
        moved: the nodes that are made so.
        out: the model directory that it was placed for; None where it isn't known yet.
        unshared: bytes that are passed through without sharing the inputs' blocks, by the reason why.
        digests: whether every tensor gets a digest; what is shared is then read for it.
        saved: what is made beside the output.
    """

    recipe: Recipe
    stage: Stage
    built: BuiltGraph
    files: FileSources
    layout: Layout
    schedule: Schedule
    options: Options
    budget: Budget
    warnings: tuple[str, ...] = field(default=())
    transfers: tuple[Transfer, ...] = ()
    moved: frozenset[int] = frozenset()
    out: Path | None = None
    unshared: tuple[tuple[str, int], ...] = ()
    digests: bool = False
    saved: tuple[OutputModel, ...] = ()

    @property
    def made(self) -> tuple[OutputModel, ...]:
        """Every model that is made, the output first."""
        return (OutputModel("", self.stage, self.files, self.built.layers), *self.saved)

    @property
    def downloads(self) -> tuple[HubFile, ...]:
        """The files of Hub models that hold what is read, with what is still to be fetched of each."""
        graph = self.built.graph
        if not any(is_remote(model.checkpoint) for model in self.built.models):
            return ()
        from ...io.hub.checkpoint import needed_files

        used: list[list[TensorRef]] = [[] for _ in self.built.models]
        for ref, model in zip(graph.reads, graph.read_models, strict=True):
            used[model].append(ref)
        return tuple(
            file
            for model, refs in zip(self.built.models, used, strict=True)
            for file in needed_files(model.checkpoint, refs)
        )

    @property
    def bytes_shared(self) -> int:
        """Bytes of the output whose blocks are the sources' own."""
        return sum(transfer.shared for transfer in self.transfers)

    @property
    def bytes_copied(self) -> int:
        """Bytes that the kernel copies from source files to shards."""
        return sum(transfer.nbytes - transfer.shared for transfer in self.transfers)

    @property
    def bytes_computed(self) -> int:
        """Bytes of the output that aren't an input's own."""
        graph = self.built.graph
        nodes = (output.node for output in graph.outputs)
        return sum(graph.nbytes(node) for node in nodes if graph.operation(node).kind is not Kind.COPY)

    @property
    def bytes_digested(self) -> int:
        """Bytes that are read only for their digests."""
        return sum(map(self.built.graph.nbytes, self.moved)) if self.digests else 0

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that pass through the process or the kernel's copy on their way in, re-reads included."""
        return self.schedule.bytes_read + self.bytes_copied + self.bytes_digested

    @property
    def bytes_written(self) -> int:
        """Tensor bytes that pass through the process or the kernel's copy on their way out."""
        return self.schedule.bytes_written + self.bytes_copied

    @property
    def disk(self) -> int:
        """Bytes that the shards take on the disk."""
        return self.layout.nbytes - self.bytes_shared

    @property
    def computes(self) -> bool:
        """Whether anything is computed; else bytes are only copied, and torch isn't needed."""
        return any(operation.kind is Kind.MERGE for operation in self.built.graph.operations)

    @property
    def bypassed(self) -> dict[int, int]:
        """The nodes whose bytes never enter the lanes, with their size in bytes: what `make_schedule` takes as done."""
        return {node: self.built.graph.nbytes(node) for node in self.moved}

    @property
    def content(self) -> OutputContent:
        """What the model card and the index say about the weights."""
        built = self.built
        return OutputContent(self.recipe, built.graph, self.layout, built.models, built.dtype)

    @property
    def workload(self) -> Workload:
        """What the merge moves and computes, for time estimates."""
        machine = self.options.machine
        return Workload(self.built.graph, self.schedule, self.bytes_read, self.bytes_written, machine)

    def bytes_read_by_model(self, read: Sequence[int]) -> list[tuple[int, int]]:
        """For each model the bytes of its tensors that are used, and the bytes read of them, kernel copies included."""
        graph = self.built.graph
        found = bytes_of_models(graph, read)
        owners = {ref.file: model for model, ref in zip(graph.read_models, graph.reads, strict=True)}
        for transfer in self.transfers:
            used, total = found[owners[transfer.file]]
            found[owners[transfer.file]] = used, total + transfer.nbytes - transfer.shared
        return found

    def output_dict(self, made: OutputModel | None = None) -> dict[str, Any]:
        """One of the models that are made, by default the output, as plain data. Sizes are in bytes."""
        graph, made = self.built.graph, made or self.made[0]
        nodes = [graph.outputs[number].node for number in graph.outputs_in(made.folder)]
        return {
            "tensors": len(nodes),
            "parameters": sum(map(graph.elements, nodes)),
            "bytes": sum(map(graph.nbytes, nodes)),
            "layers": made.layers,
            "shards": len(self.layout.shards_in(made.folder)),
            "dtypes": sorted({graph.node_dtype[node].name for node in nodes}),
        }

    def to_dict(self) -> dict[str, Any]:
        """The dry run as plain data, as ``plan --json`` prints it. Sizes are in bytes."""
        schedule = self.schedule
        return {
            "output": self.output_dict(),
            "saved": [{"folder": made.folder, **self.output_dict(made)} for made in self.saved],
            "inputs": {
                "models": [model.name for model in self.built.models],
                "tensors": sum(len(model.checkpoint.tensors) for model in self.built.models),
                "bytes": sum(ref.nbytes for model in self.built.models for ref in model.checkpoint.tensors.values()),
                "unused": [
                    {"model": unused.model, "reason": unused.reason, "tensors": list(unused.tensors)}
                    for unused in self.built.unused
                ],
            },
            "method": self.stage.merge_method,
            "bytes_read": self.bytes_read,
            "bytes_reread": schedule.bytes_reread,
            "bytes_written": self.bytes_written,
            "download": {
                "files": sum(not file.present for file in self.downloads),
                "bytes": sum(file.to_fetch for file in self.downloads),
            },
            "bytes_shared": self.bytes_shared,
            "bytes_copied": self.bytes_copied,
            "bytes_computed": self.bytes_computed,
            "bytes_digested": self.bytes_digested,
            "not_shared": [{"reason": reason, "bytes": nbytes} for reason, nbytes in self.unshared],
            "bytes_uploaded": schedule.uploaded,
            "disk": self.disk,
            "peak_ram": schedule.peak_ram,
            "peak_vram": schedule.peak_vram,
            "baseline_ram": schedule.budget.baseline,
            "minimum_ram": schedule.minimum_ram,
            "minimum_vram": schedule.minimum_vram,
            "max_ram": schedule.budget.ram,
            "max_vram": max((device.vram or 0 for device in schedule.budget.devices), default=0),
            "device": ",".join(device.name for device in schedule.budget.devices),
            "threads": sum(device.threads for device in schedule.budget.devices),
            "steps": len(schedule.steps),
            **self._traffic_dict(),
            "warnings": list(self.warnings),
        }

    def _traffic_dict(self) -> dict[str, Any]:
        """All of it as plain data, for ``plan --json``. Sizes are in bytes."""
        graph, schedule = self.built.graph, self.schedule
        read = bytes_of_reads(graph, schedule)
        peaks = peak_of(graph, schedule), peak_of(graph, schedule, vram=True)
        node = schedule.minimum_ram_node
        return {
            "bytes_downloaded": downloaded(graph, schedule),
            "peak_ram_at": peaks[0] and asdict(peaks[0]),
            "peak_vram_at": peaks[1] and asdict(peaks[1]),
            "minimum_ram_at": None if node is None else graph.label(node),
            "bytes_by_model": [
                {"model": name, "used": used, "read": total}
                for name, (used, total) in zip(graph.models, self.bytes_read_by_model(read), strict=True)
            ],
            "read_again": [asdict(group) for group in read_again(graph, schedule, read)],
        }
