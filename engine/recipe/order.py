"""Sorts the stages of a recipe topologically: each comes after the stages that it uses."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from graphlib import CycleError, TopologicalSorter

from ...errors import RecipeError
from .nodes import Keys
from .types import Stage
from .warnings import WarningKind


def in_order(
    stages: Sequence[Stage], error: Callable[[str, Keys], RecipeError], warn: Callable[[WarningKind, str, Keys], None]
) -> tuple[Stage, ...]:
    """Sort the stages topologically, in the order of the file where possible; the output comes last.

    The output is the stage without a name, or else the only one that no other stage uses and that isn't saved anyway.

    Args:
        stages: the stages in the order of the file.
        error: creates the error for a key path.
        warn: adds a warning for a key path.

    Raises:
        RecipeError: for two stages with the same name or without a name, for stages that use each other, and if it is
            ambiguous which stage is the output.
    """
    places: dict[str | None, int] = {}
    for number, stage in enumerate(stages):
        if stage.name in places:
            what = "a second stage without a `name`" if stage.name is None else f"a second stage named {stage.name!r}"
            raise error(f"{what}: names must be unique, and only the output may have none", stage.place)
        places[stage.name] = number
    if places.keys() == {None}:
        return tuple(stages)
    uses = [
        {places[name.path] for name, _ in stage.references() if name.revision is None and name.path in places}
        for stage in stages
    ]
    order = _sorted(stages, uses, error)
    unused = [number for number in order if not any(number in used for used in uses)]
    output = places.get(None)
    if output is None:
        ends = [number for number in unused if not stages[number].save] or unused
        if len(ends) > 1:
            names = ", ".join(repr(stages[number].name) for number in sorted(ends))
            message = f"no stage uses {names}: remove the `name` of the stage that is the output"
            raise error(message, stages[ends[-1]].place)
        output = ends[0]
    for number in unused:
        if number != output and not stages[number].save:
            message = "no stage uses it and it isn't saved, so it is not computed"
            warn(WarningKind.UNUSED_STAGE, message, stages[number].place)
    order.remove(output)
    return (*(stages[number] for number in order), stages[output])


def _sorted(stages: Sequence[Stage], uses: Sequence[set[int]], error: Callable[[str, Keys], RecipeError]) -> list[int]:
    """The numbers of the stages, each after those that it uses; ties are resolved by the order of the file."""
    sorter = TopologicalSorter(dict(enumerate(uses)))
    try:
        sorter.prepare()
    except CycleError as cyclic:
        cycle: list[int] = cyclic.args[1][::-1]  # graphlib lists each before the one that uses it
        names = " -> ".join(str(stages[number].name) for number in cycle)
        raise error(f"the stages use each other: {names}", (*stages[cycle[0]].place, "name")) from None
    order = []
    ready = list(sorter.get_ready())
    heapq.heapify(ready)
    while ready:
        order.append(heapq.heappop(ready))
        sorter.done(order[-1])
        for number in sorter.get_ready():
            heapq.heappush(ready, number)
    return order
