"""The stages of a recipe in an order in which each comes after those that it uses."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from graphlib import CycleError, TopologicalSorter

from ...errors import RecipeError
from .types import Stage
from .yaml import Keys


def in_order(
    stages: Sequence[Stage], error: Callable[[str, Keys], RecipeError], warn: Callable[[str, Keys], None]
) -> tuple[Stage, ...]:
    """The stages in the order of the file, as far as each comes after those that it uses; the output's is the last.

    The output is the stage without a name, or else the only one that no other uses and that isn't saved anyway.

    Args:
        stages: as they stand in the file.
        error: makes the error for a place.
        warn: notes a warning for a place.

    Raises:
        RecipeError: for two stages of one name or without one, for stages that use each other, and where it isn't clear
            which one is the output.
    """
    places: dict[str | None, int] = {}
    for number, stage in enumerate(stages):
        if stage.name in places:
            what = "a second stage without a `name`" if stage.name is None else f"a second stage named {stage.name!r}"
            raise error(f"{what}: each needs its own, and one at most, the output, goes without", stage.place)
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
            message = f"no stage uses {names}: leave out the `name` of the one that is the output"
            raise error(message, stages[ends[-1]].place)
        output = ends[0]
    for number in unused:
        if number != output and not stages[number].save:
            warn("no stage uses it and it isn't saved, so that it is not computed", stages[number].place)
    order.remove(output)
    return (*(stages[number] for number in order), stages[output])


def _sorted(stages: Sequence[Stage], uses: Sequence[set[int]], error: Callable[[str, Keys], RecipeError]) -> list[int]:
    """The numbers of the stages, each after those that it uses, and the first of the file first where that is open."""
    sorter = TopologicalSorter(dict(enumerate(uses)))
    try:
        sorter.prepare()
    except CycleError as found:
        cycle: list[int] = found.args[1][::-1]  # as graphlib gives it, each is used by the next
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
