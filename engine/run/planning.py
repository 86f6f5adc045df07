"""Plans a merge: reads the recipe and the models' headers, and simulates the complete merge in bytes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import astuple, replace

from ...errors import BudgetError, MergeloomError
from ...io.checkpoint.checkpoint import Checkpoint
from ...io.platform import return_large_blocks
from ...io.reading import check_descriptors
from ...methods import merge_methods
from ...methods.kernel.method import Method
from ..cost.devices import find_devices, torch_remark
from ..cost.machine import check_address_space, make_budget, memory_remark, usable_cores
from ..cost.prepare import prepare_to_compute
from ..cost.process_size import GraphSize, size_key
from ..files.folders import check_folders
from ..files.sources import FileResolver, FileSources, OutputModel
from ..files.weights_file import output_metadata, weights_stem
from ..graph.build import BuiltGraph
from ..graph.graph import Kind
from ..graph.layout import Layout, lay_out
from ..graph.stages import build_stages
from ..model.open import open_input
from ..model.paths import check_paths, ignored_revisions
from ..model.warnings import ModelWarning, ModelWarningKind, strict_error
from ..recipe.load import load_recipe
from ..recipe.types import ModelReference, Recipe
from ..recipe.warnings import RecipeWarning
from ..schedule.budget import Budget
from ..schedule.schedule import Schedule, make_schedule
from .plan import Options, Plan, RecipeLike

OTHER_THREADS = 16
"""Maximum number of threads of a merge that do not compute: they read, write, copy and show progress."""

_MERGE_MODULES = ("mergeloom.engine.run.merge", "mergeloom.engine.execute.executor")
"""Modules that are imported before the process is measured, so the plan sees the memory that the merge will have."""


def plan(recipe: RecipeLike, options: Options | None = None) -> Plan:
    """Plan a merge: read the recipe and the models' headers, and simulate the complete merge in bytes.

    Args:
        recipe: path of a YAML file, a dict with the same content, or a Recipe.
        options: budgets, device, seed and other options.

    Raises:
        RecipeError: the recipe has a mistake.
        CheckpointError: an input is missing or damaged, or does not fit the others.
        BudgetError: the merge does not fit the budget.
        EnvironmentFailure: the process may open too few files.
    """
    options = options or Options()
    methods = merge_methods(options.methods)
    loaded = load_recipe(recipe, strict=options.strict, methods=methods, overrides=options.overrides)
    try:
        return _plan(loaded, options, methods)
    except MergeloomError as error:
        error.add_warnings(loaded.warnings)
        raise


def _plan(loaded: Recipe, options: Options, methods: Mapping[str, Method]) -> Plan:
    """Plan the merge of a recipe; an error has the warnings about the models that were found before it."""
    check_descriptors()
    return_large_blocks()  # before checkpoints are opened, whose indexes take much memory for a moment
    check_paths(loaded)
    stage = loaded.output
    opened: dict[ModelReference, Checkpoint] = {}

    def open_once(reference: ModelReference) -> Checkpoint:
        if reference not in opened:
            opened[reference] = open_input(loaded, reference)
        return opened[reference]

    files = FileResolver(loaded, open_once)
    try:
        built = build_stages(loaded, methods, open_once, files.add, seed=options.seed, compares=options.survival)
    except MergeloomError as error:
        error.add_warnings(files.warnings)
        raise
    saved = tuple(OutputModel(each.folder, each.stage, files.of_stage(each.stage), each.layers) for each in built.saved)
    if saved:
        check_folders(loaded, [each.stage for each in saved], files.output)
    layout = _lay_out(built, files.output, options)
    computes = any(operation.kind is Kind.MERGE for operation in built.graph.operations)
    built, schedule = _scheduled(built, computes, options, loaded)
    budget = schedule.budget
    if options.machine is None:
        check_address_space(schedule, sum(device.threads for device in budget.devices) + OTHER_THREADS)
    remarks = [
        ModelWarning(ModelWarningKind.FILES, f"{model.name}: {remark}")
        for model in built.files
        for remark in model.checkpoint.remarks
    ]
    found = [*ignored_revisions(loaded), *remarks, *built.warnings, *dict.fromkeys(files.warnings)]
    if remark := memory_remark(options.max_ram, options.machine):
        found.append(ModelWarning(ModelWarningKind.MACHINE, remark))
    gpus = options.machine.memory_of_gpus if options.machine else None
    if computes and (remark := torch_remark(options.device, gpus)):
        found.append(ModelWarning(ModelWarningKind.MACHINE, remark))
    if options.strict and found:
        raise strict_error(found)
    findings: tuple[RecipeWarning | ModelWarning, ...] = (*loaded.warnings, *found)
    return Plan(loaded, stage, built, files.output, layout, schedule, options, findings, saved=saved)


def _lay_out(built: BuiltGraph, files: FileSources, options: Options) -> Layout:
    """Lay out the output. A merge of single files without config.json writes one file, as programs expect of them.

    Only a shard size other than the default splits it.
    """
    donor = built.models[built.donor].checkpoint
    if files.config is not None or not donor.bare:
        return lay_out(built.graph, options.shard_size, stem=weights_stem(files.config))
    shard_size = sys.maxsize if options.shard_size == Options().shard_size else options.shard_size
    return lay_out(built.graph, shard_size, output_metadata(donor))


def _scheduled(built: BuiltGraph, computes: bool, options: Options, loaded: Recipe) -> tuple[BuiltGraph, Schedule]:
    """Return the schedule, and the graph that it is of: if RAM cannot hold intermediate tensors, one without them."""
    try:
        return built, make_schedule(built.graph, budget_of(options, computes, built, loaded))
    except BudgetError:
        if not any(value < 0 for sources in built.graph.node_sources for value in sources):
            raise
    built = replace(built, graph=built.inlined)
    return built, make_schedule(built.graph, budget_of(options, computes, built, loaded))


def budget_of(options: Options, computes: bool, built: BuiltGraph, recipe: Recipe) -> Budget:
    """Return the budget for a merge, on this machine or on the one that the options name. Measures this process.

    Args:
        options: options as given to `plan`.
        computes: whether anything is computed; otherwise no device is needed.
        built: the graph with its models.
        recipe: the recipe that it was built from.
    """
    machine = options.machine
    threads = options.threads or (machine.cores if machine else None) or usable_cores()
    gpus = machine.memory_of_gpus if machine else None
    devices = find_devices(options.device if computes else "cpu", options.max_vram, threads, gpus)
    compiling = prepare_to_compute(built.graph, devices, _MERGE_MODULES) if computes else 0
    total = machine.ram if machine else None
    size = GraphSize.of(built.graph)
    key = size_key(recipe.text, computes, astuple(size), [device.name for device in devices])
    return make_budget(options.max_ram, devices, computes, total, size=size, key=key, compiling=compiling)
