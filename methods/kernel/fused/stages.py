"""Divides a pass into stages: loops over a range of rows, with Python between them.

Most passes have one stage. A reduction over a row, its rank, a Python function of such reductions or the maximum of a
block ends a stage: the next one uses the result. Values with one number per element are computed again in each stage
that uses them. Those with one number per block are computed between two stages, in lines: see `staging.lines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..expression import Extent, Node, reachable

REDUCED_ROWS = frozenset(("row_sum", "row_max"))
_COMPUTED_BETWEEN = frozenset(("host", "item"))


@dataclass(slots=True)
class Stage:
    """What one stage computes, besides values for itself.

    Args:
        reduced: reductions over rows.
        ranked: ranks in rows; the stage writes the keys that are then sorted.
        exported: values with one number per row that Python functions need.
        called: Python functions of rows, and their items, to evaluate before the stage.
        blocked: maxima of blocks that the stage finds.
        lined: other values with one number per block, to compute before the stage because its loop, a later one or an
            output needs them.
        targets: numbers of the targets of the pass: all of them in the last stage, none in the others.
    """

    reduced: list[Node] = field(default_factory=list)
    ranked: list[Node] = field(default_factory=list)
    exported: list[Node] = field(default_factory=list)
    called: list[Node] = field(default_factory=list)
    blocked: list[Node] = field(default_factory=list)
    lined: list[Node] = field(default_factory=list)
    targets: bool = False

    @property
    def by_row(self) -> bool:
        """Whether the stage computes or uses what is computed for a range of rows between two stages."""
        return self.of_rows or bool(self.blocked or self.lined)

    @property
    def of_rows(self) -> bool:
        """Whether the stage computes or uses values of which there is one for each row: segments are complete rows."""
        return bool(self.reduced or self.ranked or self.exported or self.called)

    @property
    def wanted(self) -> list[Node]:
        """The nodes whose values the stage's loop computes, apart from the targets."""
        return [node.args[0] for node in (*self.reduced, *self.ranked, *self.blocked)] + self.exported


def stages_of(wanted: Sequence[Node]) -> list[Stage]:
    """The stages that compute some nodes of a tile."""
    available: dict[int, int] = {}
    exported: dict[int, Node] = {}
    lined = {id(node) for node in wanted if node.extent is Extent.BLOCK}
    order = [node for node in reachable(*wanted, in_tile=True) if node.in_tile]
    for node in order:
        args = [arg for arg in node.args if arg.in_tile]
        lined.update(id(arg) for arg in args if arg.extent is Extent.BLOCK and node.extent is not Extent.BLOCK)
        if node.op in _COMPUTED_BETWEEN:
            available[id(node)] = max((available[id(arg)] + _is_exported(arg) for arg in args), default=0)
            exported.update((id(arg), arg) for arg in args if _is_exported(arg))
        else:
            later = node.op in REDUCED_ROWS or node.op in ("row_rank", "block_max")
            available[id(node)] = max((available[id(arg)] for arg in args), default=0) + later
    stages = [Stage() for _ in range(1 + max((available[id(node)] for node in wanted if node.in_tile), default=0))]
    for node in order:
        first = available[id(node)]
        if node.op in REDUCED_ROWS:
            stages[first - 1].reduced.append(node)
        elif node.op == "row_rank":
            stages[first - 1].ranked.append(node)
        elif node.op == "block_max":
            stages[first - 1].blocked.append(node)
        elif node.extent is Extent.BLOCK:
            stages[first].lined += [node] * (id(node) in lined)
        elif node.op in _COMPUTED_BETWEEN:
            stages[first].called.append(node)
        elif id(node) in exported:
            stages[first].exported.append(node)
    stages[-1].targets = True
    return stages


def _is_exported(node: Node) -> bool:
    """Whether a stage computes a value per row in its loop: then Python has it only after the stage."""
    return node.op not in REDUCED_ROWS and node.op not in _COMPUTED_BETWEEN


def given(node: Node) -> bool:
    """Whether a loop is given the value of a node: it is computed between stages or in an earlier one."""
    between = node.op in REDUCED_ROWS or node.op == "row_rank" or node.op in _COMPUTED_BETWEEN
    return between or node.extent is Extent.BLOCK


def in_loop(wanted: Sequence[Node]) -> list[Node]:
    """The nodes that a loop evaluates or is given for the wanted ones, operands first."""
    return reachable(*wanted, in_tile=True, given=given)


def has_columns(nodes: Sequence[Node]) -> bool:
    """Whether a loop uses values with one number per column."""
    return any(arg.extent is Extent.COLUMN and not arg.constant for node in nodes for arg in node.args)
