"""The public functions: keywords as people write them become Options."""

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
from .io.sizes import parse_size

if TYPE_CHECKING:
    from .engine.execute.tasks import Progress
    from .engine.run.merge import Result

Size = int | str
"""Bytes, or a text such as ``32GiB``."""


class Plan(engine_plan.Plan):
    """A plan whose text is the dry run: ``print(plan)`` shows what ``mergeloom plan`` shows."""

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
    """Plan a merge: what it will read, write and hold, from the models' headers alone. Printed, it is the dry run.

    Args:
        recipe: the path of a YAML file, a dict that says the same, or a Recipe.
        max_ram: the bound on the process's resident memory; by default a share of the machine's.
        max_vram: what may be held on each GPU; by default a share of its memory.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, or several with commas.
        seed: of the random methods.
        shard_size: the most bytes of an output file.
        threads: compute threads of the CPU; by default the cores that the process may use.
        strict: make unknown keys and parameters in the recipe errors.
        machine: another machine to plan for, such as ``"ram=64GiB,vram=24GiB,cores=16"``.
        methods: Python files with merge methods of your own.

    Raises:
        RecipeError: for a mistake in the recipe.
        CheckpointError: for an input that is missing, damaged, or doesn't fit the others.
        BudgetError: where the merge doesn't fit the budget.
        UsageError: for an argument that is none.
    """
    options = _options(max_ram, max_vram, device, seed, shard_size, threads, strict, methods)
    made = make_plan(recipe, options if machine is None else replace(options, machine=parse_machine(machine)))
    return Plan(**{field.name: getattr(made, field.name) for field in fields(made)})


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
    fresh: bool = False,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Merge models into a new model directory, or go on with a merge that was interrupted there.

    Args:
        recipe: as `plan` takes it, or a Plan, which is performed as it is: the options were given to `plan` then.
        out: the directory to make, new or empty, or with an unfinished merge of the same recipe; None for a rehearsal
            that does all of it and writes nothing.
        max_ram, max_vram, device, seed, shard_size, threads, strict, methods: as for `plan`.
        digests: ``written``, or ``full``: note the digests of those tensors, too, that are only shared or copied.
        fresh: discard an unfinished merge in `out`, and begin anew.
        notify: called now and then, from this thread, with how far it is.
        say: called with what is worth knowing before the work begins, such as what of it is there already.

    Raises:
        MergeloomError: whatever stops it; `out` then holds nothing that looks like a model, and the same call goes on.
    """
    from .engine.run.merge import merge as perform

    options = _options(max_ram, max_vram, device, seed, shard_size, threads, strict, methods)
    if isinstance(recipe, engine_plan.Plan) and options not in (Options(), recipe.options):
        raise UsageError("a Plan is performed with the options that it was made with: give these to `plan` instead")
    if digests not in ("written", "full"):
        raise UsageError(f"digests is {digests!r}: give 'written' or 'full'")
    return perform(recipe, out, options, fresh=fresh, digests=digests == "full", notify=notify, say=say)


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
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}: give 1 or more")
    return Options(
        max_ram=None if max_ram is None else _bytes("max_ram", max_ram),
        max_vram=None if max_vram is None else _bytes("max_vram", max_vram),
        device=device,
        seed=seed,
        shard_size=_bytes("shard_size", shard_size),
        threads=threads,
        strict=strict,
        methods=tuple(os.fspath(file) for file in methods),
    )


def _bytes(name: str, size: Size) -> int:
    if isinstance(size, str):
        return parse_size(size)
    if size <= 0:
        raise UsageError(f"{name} is {size}: give a number of bytes above 0, or a text such as '32GiB'")
    return size
