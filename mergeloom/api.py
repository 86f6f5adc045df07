"""The public functions: check and convert the arguments, and call the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .arguments import (
    Size,
    checked_bytes,
    checked_limit,
    checked_number,
    checked_numbers,
    checked_overrides,
    checked_path,
    checked_text,
    checked_threads,
)
from .engine.cost.machine import parse_machine
from .engine.run import plan as engine_plan
from .engine.run.plan import Options, RecipeLike
from .engine.run.planning import plan as make_plan
from .errors import UsageError
from .methods import merge_methods, one_or_several
from .planned import Plan, public_plan

if TYPE_CHECKING:
    from .engine.execute.measurements import Progress
    from .engine.model.inspect import Inspection
    from .engine.recipe.types import Recipe
    from .engine.run.diff.result import Diff
    from .engine.run.verify import Verdict
    from .result import Result


def plan(
    recipe: RecipeLike,
    *,
    max_ram: Size | None = None,
    max_vram: Size | None = None,
    device: str = "auto",
    seed: int = 0,
    shard_size: Size = "5GB",
    threads: int | None = None,
    strict: bool = False,
    machine: str | None = None,
    methods: Iterable[str | os.PathLike[str]] = (),
    overrides: Mapping[str, object] = {},
    survival: bool = False,
) -> Plan:
    """Plan a merge: what it reads, writes and holds in memory. Reads only the recipe and the models' headers.

    Args:
        recipe: path of a YAML file, a dict with the same content, a list of dicts for several stages, or a Recipe.
        max_ram: limit of the process's resident memory; a percentage such as ``50%`` is a share of the machine's RAM,
            and so is the default.
        max_vram: limit of the memory used on each GPU; a percentage is a share of its VRAM, and so is the default.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, or several separated by commas.
        seed: seed for methods that sample.
        shard_size: maximum size of an output shard.
        threads: number of CPU compute threads; by default the cores available to the process.
        strict: whether warnings are errors.
        machine: description of another machine to plan for, such as ``"ram=64GiB,vram=24GiB,cores=16"``.
        methods: paths of Python files with additional merge methods.
        overrides: values of the recipe to change, by key, such as ``{"models.0.parameters.weight": 0.3}``; messages
            about them name ``--set``, the option of the command line.
        survival: whether the merge also measures what rounding to bfloat16 and float16 keeps of the change from the
            base model; for FP8, it always does.

    Raises:
        RecipeError: the recipe is invalid.
        CheckpointError: an input is missing, damaged or inconsistent with the others.
        BudgetError: the merge exceeds the budget.
        UsageError: an argument is invalid.
    """
    options = _options(max_ram, max_vram, device, seed, shard_size, threads, strict, methods, overrides, survival)
    if machine is not None:
        options = replace(options, machine=parse_machine(checked_text("machine", machine)))
    return public_plan(make_plan(recipe, options))


def merge(
    recipe: RecipeLike | Plan,
    out: str | os.PathLike[str] | None,
    *,
    max_ram: Size | None = None,
    max_vram: Size | None = None,
    device: str = "auto",
    seed: int = 0,
    shard_size: Size = "5GB",
    threads: int | None = None,
    strict: bool = False,
    methods: Iterable[str | os.PathLike[str]] = (),
    overrides: Mapping[str, object] = {},
    survival: bool = False,
    digests: str = "written",
    restart: bool = False,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
    keep_paths: bool = False,
    fresh: bool = False,
) -> Result:
    """Merge models into a new model directory, or resume an interrupted merge there.

    Args:
        recipe: recipe as for `plan`, or a Plan, which is executed with the options that were passed to `plan`.
        out: output directory: new, empty, or with an unfinished merge of the same recipe; None for a rehearsal that
            runs the complete merge without writing.
        max_ram, max_vram, device, seed, shard_size, threads, strict, methods, overrides, survival: as for `plan`.
        digests: ``written``, or ``full`` to also read and digest tensors that are only reflinked or copied.
        restart: whether to discard an unfinished merge in `out` and start over.
        notify: callback for progress, called regularly on this thread.
        say: callback for messages before the work starts, such as how much of the output is already written.
        warn: callback for warnings about an unfinished merge; by default `say`, with ``warning:`` before the text.
        keep_paths: whether local paths stay in the model card, in mergekit_config.yml and in the manifest.
        fresh: former name of `restart`.

    Raises:
        MergeloomError: the merge failed. `out` then holds no files that look like a model; the same call resumes.
    """
    from .engine.run.merge import merge as run_merge
    from .result import public_result

    options = _options(max_ram, max_vram, device, seed, shard_size, threads, strict, methods, overrides, survival)
    if isinstance(recipe, engine_plan.Plan):
        if options not in (Options(), recipe.options):
            raise UsageError("a Plan is executed with the options of `plan`: pass these to `plan` instead")
        recipe = replace(recipe, options=replace(recipe.options, keep_paths=keep_paths))
    result = run_merge(
        recipe,
        None if out is None else checked_path("out", out),
        replace(options, keep_paths=keep_paths),
        fresh=restart or fresh,
        digests=_is_full(digests),
        notify=notify,
        say=say,
        warn=warn,
    )
    return public_result(result)


def inspect(model: str | os.PathLike[str]) -> Inspection:
    """Inspect a checkpoint: tensors, layers, dtypes, sizes and files. Reads only headers.

    Args:
        model: a directory, a .safetensors or PyTorch file, an index, or a Hub id.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        EnvironmentFailure: the disk or the Hub failed.
        UsageError: the name is invalid.
    """
    from .engine.model.inspect import inspect_model

    return inspect_model(checked_path("model", model))


def verify(
    out: str | os.PathLike[str],
    *,
    sources: bool = False,
    threads: int | None = None,
    notify: Callable[[Progress], None] | None = None,
) -> Verdict:
    """Compare a merged model or an extracted adapter with its manifest. Reads all that has a digest, and no inputs.

    Args:
        out: directory of the merged model or the extracted adapter.
        sources: whether to also compare tensors without a digest with their source files, and check that all source
            files are unchanged. The verdict lists source files that are not available.
        threads: number of tensors that are read at a time; by default 4.
        notify: callback for progress, called with the bytes read so far, from any thread.

    Returns:
        The verdict: damage is not an exception.

    Raises:
        CheckpointError: the manifest is missing or was modified.
        EnvironmentFailure: reading failed.
        UsageError: `out` is not the directory of a merge or an extracted adapter, or an argument is invalid.
    """
    from .engine.run.verify import THREADS
    from .engine.run.verify import verify as run_verify

    number = checked_threads(threads) or THREADS
    return run_verify(checked_path("out", out), sources=sources, threads=number, notify=notify)


def stack(
    model: str | os.PathLike[str],
    *,
    window: int | Sequence[int],
    step: int | Sequence[int] | None = None,
    repeat: int | None = None,
    dtype: str | None = None,
    exact: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Recipe:
    """Write the recipe of a self-merge by overlapping windows of a model's layers. Reads only headers.

    Args:
        model: a directory, a .safetensors or PyTorch file, an index, or a Hub id.
        window: number of layers in each window, for all passes or for each.
        step: number of layers from the start of one window to the next, for all passes or for each; by default half a
            window.
        repeat: number of passes, each over the result of the previous one; by default one for each window or step.
        dtype: dtype of the output, such as ``bfloat16``; by default that of the model.
        exact: whether to extend the last window of each pass to the last layer.
        warn: callback for warnings, such as layers that no window contains.

    Returns:
        The recipe, for `plan` and `merge`; its `text` is the YAML that ``mergeloom stack`` prints.

    Raises:
        CheckpointError: the model is missing or damaged, or its layers can't be determined.
        EnvironmentFailure: the disk or the Hub failed.
        UsageError: a number is invalid for the model, or an argument is invalid.
    """
    from .engine.model.open import open_named
    from .engine.model.self_merge import stack_recipe
    from .engine.recipe.load import parse_recipe

    windows = checked_numbers("window", window)
    steps = None if step is None else checked_numbers("step", step)
    passes = None if repeat is None else checked_number("repeat", repeat)
    name = None if dtype is None else checked_text("dtype", dtype)
    reference, checkpoint = open_named(checked_path("model", model))
    text, summary = stack_recipe(
        reference, checkpoint, window=windows, step=steps, repeat=passes, dtype=name, exact=exact
    )
    if warn is not None:
        for warning in summary.warnings:
            warn(warning)
    return parse_recipe(text, methods=merge_methods())


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    max_ram: Size | None = None,
    threads: int | None = None,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Diff:
    """Compare the values of two models, tensor by tensor. Reads every byte once.

    Args:
        a: first model: a directory, a .safetensors or PyTorch file, an index, or a Hub id, whose missing files are
            downloaded.
        b: second model.
        max_ram: limit of the process's resident memory; by default a share of the machine's RAM.
        threads: maximum number of threads; by default the cores available to the process.
        notify: callback for progress, called with the bytes read so far, from any thread.
        say: callback for messages, such as how much is downloaded.

    Raises:
        CheckpointError: a model is missing, damaged, quantized in an unknown format or an adapter, or they have no
            tensor name in common.
        BudgetError: the comparison exceeds the budget.
        EnvironmentFailure: reading or downloading failed.
        UsageError: an argument is invalid.
    """
    from .engine.run.diff.compare import Comparison
    from .engine.run.merge import fetch

    comparison = Comparison(
        checked_path("a", a),
        checked_path("b", b),
        max_ram=checked_limit("max_ram", max_ram),
        threads=checked_threads(threads),
    )
    fetch(comparison.downloads, say or (lambda text: None))
    return comparison.run(notify)


def _options(
    max_ram: Size | None,
    max_vram: Size | None,
    device: str,
    seed: int,
    shard_size: Size,
    threads: int | None,
    strict: bool,
    methods: Iterable[str | os.PathLike[str]],
    overrides: Mapping[str, object],
    survival: bool,
) -> Options:
    """Convert the keyword arguments that `plan` and `merge` share."""
    return Options(
        max_ram=checked_limit("max_ram", max_ram),
        max_vram=checked_limit("max_vram", max_vram),
        device=checked_text("device", device),
        seed=checked_number("seed", seed),
        shard_size=checked_bytes("shard_size", shard_size),
        threads=checked_threads(threads),
        strict=strict,
        methods=tuple(checked_path("methods", file) for file in one_or_several(methods)),
        overrides=checked_overrides(overrides),
        survival=survival,
    )


def _is_full(digests: str) -> bool:
    """Return whether every tensor gets a digest."""
    if digests not in ("written", "full"):
        raise UsageError(f"invalid digests {digests!r}: use 'written' or 'full'")
    return digests == "full"
