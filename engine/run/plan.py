"""The dry run: what a recipe makes, and what a merge will read, write, hold and need. Reads headers only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...io.hub.repository import HubFile
from ...io.safetensors.checkpoint import Checkpoint
from ...io.safetensors.tensors import TensorRef
from ...methods import merge_methods
from ..cost.machine import (
    Machine,
    check_address_space,
    find_devices,
    make_budget,
    memory_remark,
    prepare_to_compute,
    usable_cores,
)
from ..files.sources import FileResolver, FileSources
from ..graph.build import BuiltGraph
from ..graph.graph import Kind
from ..graph.layout import Layout, lay_out
from ..graph.stages import build_stages
from ..model.open import is_remote, open_model
from ..recipe.load import load_recipe
from ..recipe.types import ModelReference, Recipe, Stage
from ..schedule.schedule import Budget, Schedule, make_schedule
from .transfers import Transfer

RecipeLike = Recipe | str | os.PathLike[str] | Mapping[str, object]
"""A recipe: the path of a YAML file, a dict that says the same, or a Recipe."""


OTHER_THREADS = 16
"""Threads of a merge that read, write, copy and show progress."""


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
class MadeModel:
    """A model that a merge makes: the output, or a stage's that is saved.

    Args:
        folder: where in OUT; empty for OUT itself.
        stage: the stage that makes it.
        files: where the files beside the weights come from.
        layers: of its main stack.
    """

    folder: str
    stage: Stage
    files: FileSources
    layers: int


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
    saved: tuple[MadeModel, ...] = ()

    @property
    def made(self) -> tuple[MadeModel, ...]:
        """Every model that is made, the output first."""
        return (MadeModel("", self.stage, self.files, self.built.layers), *self.saved)

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

    def output_dict(self, made: MadeModel | None = None) -> dict[str, Any]:
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
        from ..schedule.traffic import traffic_dict

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
            **traffic_dict(self),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        from ...report.plan import plan_text

        return plan_text(self)


def plan(recipe: RecipeLike, options: Options | None = None) -> Plan:
    """Plan a merge: read the recipe and the models' headers, and simulate the whole merge in bytes.

    Args:
        recipe: a path, a dict, or a Recipe.
        options: budgets, device, seed and the like.

    Raises:
        RecipeError: for a mistake in the recipe.
        CheckpointError: for an input that is missing, damaged, or doesn't fit the others.
        BudgetError: where the merge doesn't fit the budget.
    """
    options = options or Options()
    methods = merge_methods(options.methods)
    loaded = load_recipe(recipe, strict=options.strict, methods=methods)
    stage = loaded.output
    opened: dict[ModelReference, Checkpoint] = {}

    def open_once(reference: ModelReference) -> Checkpoint:
        if reference not in opened:
            opened[reference] = open_model(reference)
        return opened[reference]

    files = FileResolver(loaded, open_once)
    built = build_stages(loaded, methods, open_once, files.add, seed=options.seed)
    saved = tuple(MadeModel(each.folder, each.stage, files.of_stage(each.stage), each.layers) for each in built.saved)
    if saved:
        from ..files.folders import check_folders

        check_folders(loaded, [each.stage for each in saved], files.output)
    layout = lay_out(built.graph, options.shard_size)
    computes = any(operation.kind is Kind.MERGE for operation in built.graph.operations)
    budget = budget_of(options, computes, built)
    schedule = make_schedule(built.graph, budget)
    if options.machine is None:
        check_address_space(schedule, sum(device.threads for device in budget.devices) + OTHER_THREADS)
    remarks = tuple(f"{model.name}: {remark}" for model in built.models for remark in model.checkpoint.remarks)
    warnings = [*loaded.warnings, *remarks, *built.warnings, *dict.fromkeys(files.warnings)]
    if remark := memory_remark(options.max_ram, options.machine):
        warnings.append(remark)
    return Plan(loaded, stage, built, files.output, layout, schedule, options, budget, tuple(warnings), saved=saved)


def budget_of(options: Options, computes: bool, built: BuiltGraph) -> Budget:
    """The budget that a merge has to fit, on this machine or on the one that the options name. Measures this process.

    Args:
        options: as given to `plan`.
        computes: whether anything is computed; else no device and no torch is needed.
        built: what is made.
    """
    machine = options.machine
    threads = options.threads or (machine.cores if machine else None) or usable_cores()
    gpus = machine.memory_of_gpus if machine else None
    devices = find_devices(options.device if computes else "cpu", options.max_vram, threads, gpus)
    if computes:
        prepare_to_compute(built.graph)
    steps = sum(built.graph.operation(node).passes for node in built.graph)
    total = machine.ram if machine else None
    return make_budget(options.max_ram, devices, computes, total, steps=steps, outputs=len(built.graph.outputs))
