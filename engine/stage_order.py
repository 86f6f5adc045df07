"""The stages of a recipe in an order in which each comes after those that it uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import RecipeError
from .recipe import Stage
from .yaml_source import Keys

if TYPE_CHECKING:
    import networkx


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
    import networkx

    graph = _uses(stages, places, error)

    order: list[int] = list(networkx.lexicographical_topological_sort(graph))
    unused = [number for number in order if graph.out_degree(number) == 0]
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


def _uses(
    stages: Sequence[Stage], places: dict[str | None, int], error: Callable[[str, Keys], RecipeError]
) -> networkx.DiGraph[int]:
    """A graph with an edge from each stage to those that use it, without cycles."""
    import networkx  # it costs as much as all the rest of reading a recipe

    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from(range(len(stages)))
    for number, stage in enumerate(stages):
        for reference, _ in stage.references():
            if reference.revision is None and reference.path in places:
                graph.add_edge(places[reference.path], number)
    if not networkx.is_directed_acyclic_graph(graph):
        edges = networkx.find_cycle(graph.reverse(copy=False))
        names = " -> ".join(str(stages[number].name) for number in (edges[0][0], *(edge[1] for edge in edges)))
        raise error(f"the stages use each other: {names}", (*stages[edges[0][0]].place, "name"))
    return graph
