"""The public functions: convert keyword arguments, and plan, merge or compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from .engine.cost.machine import parse_machine
from .engine.run import plan as engine_plan
from .engine.run.plan import Options, RecipeLike
from .engine.run.planning import plan as make_plan
from .errors import UsageError
from .io.sizes import Limit, parse_limit, parse_size

if TYPE_CHECKING:
    from .engine.execute.tasks import Progress
    from .engine.run.diff.result import Diff
    from .engine.run.merge import Result

Size = int | str
"""A number of bytes, or a string such as ``32GiB``."""


class Plan(engine_plan.Plan):
    """A plan that prints as the dry run: ``print(plan)`` shows what ``mergeloom plan`` shows."""

    __slots__ = ()

    def __str__(self) -> str:
        from .report.plan import plan_text

        return plan_text(self)


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
) -> Plan:
    """Plan a merge: what it reads, writes and holds in memory. Reads only the recipe and the models' headers.

    Args:
        recipe: path of a YAML file, a dict with the same content, or a Recipe.
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

    Raises:
        RecipeError: the recipe is invalid.
        CheckpointError: an input is missing, damaged or inconsistent with the others.
        BudgetError: the merge exceeds the budget.
        UsageError: an argument is invalid.
    """
    options = _options(max_ram, max_vram, device, seed, shard_size, threads, strict, methods)
    planned = make_plan(recipe, options if machine is None else replace(options, machine=parse_machine(machine)))
    return Plan(**{field.name: getattr(planned, field.name) for field in fields(planned)})


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
    digests: str = "written",
    restart: bool = False,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
    fresh: bool = False,
) -> Result:
    """Merge models into a new model directory, or resume an interrupted merge there.

    Args:
        recipe: recipe as for `plan`, or a Plan, which is executed with the options that were passed to `plan`.
        out: output directory: new, empty, or with an unfinished merge of the same recipe; None for a rehearsal that
            runs the complete merge without writing.
        max_ram, max_vram, device, seed, shard_size, threads, strict, methods: options as for `plan`.
        digests: ``written``, or ``full`` to also read tensors that are only reflinked or copied, and record their
            digests.
        restart: whether to discard an unfinished merge in `out` and start over.
        notify: callback for progress, called regularly on this thread.
        say: callback for messages before the work starts, such as how much of the output is already written.
        warn: callback for warnings about an unfinished merge; by default `say`, with ``warning:`` before the text.
        fresh: former name of `restart`.

    Raises:
        MergeloomError: the merge failed. `out` then holds no files that look like a model; the same call resumes.
    """
    from .engine.run.merge import merge as run_merge

    options = _options(max_ram, max_vram, device, seed, shard_size, threads, strict, methods)
    if isinstance(recipe, engine_plan.Plan) and options not in (Options(), recipe.options):
        raise UsageError("a Plan is executed with the options that were passed to `plan`: pass these to `plan` instead")
    if digests not in ("written", "full"):
        raise UsageError(f"invalid digests {digests!r}: use 'written' or 'full'")
    return run_merge(
        recipe,
        out,
        options,
        fresh=restart or fresh,
        digests=digests == "full",
        notify=notify,
        say=say,
        warn=warn,
    )


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
        a: first model: a directory, a .safetensors file, an index, or a Hub id, whose missing files are downloaded.
        b: second model.
        max_ram: limit of the process's resident memory; by default a share of the machine's RAM.
        threads: maximum number of threads; by default the cores available to the process.
        notify: callback for progress, called with the bytes read so far, from any thread.
        say: callback for messages, such as how much is downloaded.

    Raises:
        CheckpointError: a model is missing, damaged, quantized or an adapter, or they have no tensor name in common.
        BudgetError: the comparison exceeds the budget.
        EnvironmentFailure: reading or downloading failed.
        UsageError: an argument is invalid.
    """
    from .engine.run.diff.compare import Comparison
    from .engine.run.merge import fetch

    comparison = Comparison(a, b, max_ram=_limit("max_ram", max_ram), threads=_checked_threads(threads))
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
) -> Options:
    """Convert the keyword arguments that `plan` and `merge` share."""
    return Options(
        max_ram=_limit("max_ram", max_ram),
        max_vram=_limit("max_vram", max_vram),
        device=device,
        seed=seed,
        shard_size=_bytes("shard_size", shard_size),
        threads=_checked_threads(threads),
        strict=strict,
        methods=tuple(os.fspath(file) for file in methods),
    )


def _checked_threads(threads: int | None) -> int | None:
    """Return a number of threads. Raises UsageError if it is less than 1."""
    if threads is not None and threads < 1:
        raise UsageError(f"invalid threads {threads}: use 1 or more")
    return threads


def _limit(name: str, size: Size | None) -> Limit | None:
    """Convert a memory limit, which may also be a percentage."""
    if size is None:
        return None
    return parse_limit(size) if isinstance(size, str) else _bytes(name, size)


def _bytes(name: str, size: Size) -> int:
    """Convert the size that was passed as `name` to bytes."""
    if isinstance(size, str):
        return parse_size(size)
    if size <= 0:
        raise UsageError(f"invalid {name} {size}: use a positive number of bytes, or a string such as '32GiB'")
    return size
