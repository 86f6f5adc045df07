"""Draws a comparison as heat maps: a row for each kind of tensor, a column for each layer, darker for larger distances.

The size is bounded: at most `_MAX_ROWS` rows and `_MAX_COLUMNS` columns for each stack, and `_MAX_STACKS` stacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...engine.run.diff.result import Diff, Similarity, TensorDiff
from ...engine.schedule.traffic import pattern_of
from ...io.units import plural
from ..diff import distance_text, measures
from .svg import figure, is_narrow, nice_number, text_at, text_of

_MAX_STACKS = 4
_MAX_ROWS = 40
_MAX_COLUMNS = 160
_LEFT, _RIGHT = 330.0, 70.0  # for the names and the values of the rows
_ROW = 20.0  # height of the cells
_NARROW_ROW = 42.0
_MAX_CELL = 40.0
_LETTERS = 42  # of a row's name
_FAINTEST = 0.1  # opacity of the smallest distance


@dataclass(frozen=True, slots=True)
class HeatMap:
    """The heat map of one stack of layers, or of the tensors outside of layers.

    Args:
        stack: prefix of the layers; empty outside of layers.
        rows: names of the kinds of tensors, shortened to the part within a layer.
        columns: first and last layer of each column; one column of (0, 0) outside of layers.
        cells: similarity by row and column, where there are tensors.
        totals: similarity of each row.
        omitted: number of further kinds that are not drawn.
    """

    stack: str
    rows: tuple[str, ...]
    columns: tuple[tuple[int, int], ...]
    cells: dict[tuple[int, int], Similarity]
    totals: tuple[Similarity, ...]
    omitted: int


def heat_maps(diff: Diff) -> list[HeatMap]:
    """Return the heat map of each stack of layers, the largest stacks first, then that of all other tensors."""
    stacks: dict[str, list[TensorDiff]] = {}
    for tensor in diff.tensors:
        stacks.setdefault(tensor.stack, []).append(tensor)
    others = stacks.pop("", [])
    largest = sorted(stacks, key=lambda stack: -sum(tensor.similarity.elements for tensor in stacks[stack]))
    maps = [_heat_map(stack, stacks[stack]) for stack in largest[:_MAX_STACKS]]
    return [*maps, *([_heat_map("", others)] if others else [])]


def _heat_map(stack: str, tensors: Sequence[TensorDiff]) -> HeatMap:
    layers = max((tensor.layer or 0 for tensor in tensors), default=0) + 1
    step = -(-layers // _MAX_COLUMNS)
    columns = tuple((first, min(first + step, layers) - 1) for first in range(0, layers, step))
    kinds: dict[str, dict[int, list[Similarity]]] = {}
    for tensor in tensors:
        kind = pattern_of(tensor.name.removeprefix(f"{stack}.{tensor.layer}.") if stack else tensor.name)
        kinds.setdefault(kind, {}).setdefault((tensor.layer or 0) // step, []).append(tensor.similarity)
    rows = tuple(kinds)[:_MAX_ROWS]
    cells = {
        (row, column): Similarity.total(found) for row, kind in enumerate(rows) for column, found in kinds[kind].items()
    }
    totals = tuple(Similarity.total(part for found in kinds[kind].values() for part in found) for kind in rows)
    return HeatMap(stack, rows, columns, cells, totals, len(kinds) - len(rows))


@dataclass(frozen=True, slots=True)
class Scale:
    """A logarithmic scale of relative distances.

    Args:
        low: smallest distance above 0.
        high: largest distance.
    """

    low: float
    high: float

    @classmethod
    def of(cls, maps: Iterable[HeatMap]) -> Scale | None:
        """The scale for all cells of some heat maps; None if no distance is above 0."""
        distances = [cell.relative_distance for heat_map in maps for cell in heat_map.cells.values()]
        positive = [distance for distance in distances if distance]
        return cls(min(positive), max(positive)) if positive else None

    def opacity(self, distance: float) -> float:
        """The opacity of a cell with a distance above 0, from `_FAINTEST` to 1."""
        if self.low == self.high:
            return 1.0
        span = math.log(self.high) - math.log(self.low)
        return _FAINTEST + (1 - _FAINTEST) * (math.log(distance) - math.log(self.low)) / span

    def steps(self) -> list[float]:
        """Distances for the key, from the smallest to the largest."""
        if self.low == self.high:
            return [self.low]
        low, span = math.log(self.low), math.log(self.high) - math.log(self.low)
        return [self.low, *(math.exp(low + span * number / 4) for number in (1, 2, 3)), self.high]


def draw_heat_map(heat_map: HeatMap, scale: Scale | None) -> str:
    """Draw a heat map, with the numbers of the layers below and the distance of each row on its right."""
    tensors = plural(len(heat_map.rows), "kind of tensor", "kinds of tensors")
    label = f"relative distance of {tensors}, {heat_map.stack or 'outside the layers'}"
    height = {narrow: len(heat_map.rows) * (_NARROW_ROW if narrow else _ROW) for narrow in (False, True)}
    below = 24 if heat_map.stack else 4
    return figure(label, lambda width: (height[is_narrow(width)] + below, _elements(heat_map, scale, width)))


def _elements(heat_map: HeatMap, scale: Scale | None, width: float) -> Iterator[str]:
    """Yield the elements of a drawing. A narrow one has the name and the distance of each row above its cells."""
    narrow = is_narrow(width)
    left, room, height = (0.0, width, _NARROW_ROW) if narrow else (_LEFT, width - _LEFT - _RIGHT, _ROW)
    cell = min(_MAX_CELL, room / len(heat_map.columns))
    for row, name in enumerate(heat_map.rows):
        y = row * height + 14
        name_x, anchor = (0.0, "start") if narrow else (left - 10, "end")
        yield text_at(name_x, y, _shortened(name), "name", anchor)
        value_x, anchor = (width, "end") if narrow else (left + cell * len(heat_map.columns) + 10, "start")
        yield text_at(value_x, y, measures(heat_map.totals[row])[0], "tick", anchor)
    for (row, column), similarity in heat_map.cells.items():
        y = (row + 1) * height - _ROW
        box = f'x="{left + column * cell:.1f}" y="{y:g}" width="{cell:.1f}" height="{_ROW:g}"'
        title = "" if narrow else f"<title>{text_of(_title(heat_map, row, column, similarity))}</title>"
        yield f"<rect {box} {_fill(similarity, scale)}>{title}</rect>"
    if heat_map.stack:
        step = nice_number(len(heat_map.columns) / 10)
        for column in range(0, len(heat_map.columns), step):
            x = left + (column + 0.5) * cell
            layer = heat_map.columns[column][0]
            yield text_at(x, len(heat_map.rows) * height + 14, str(layer), "tick", "middle")


def _title(heat_map: HeatMap, row: int, column: int, similarity: Similarity) -> str:
    """The tooltip of a cell."""
    first, last = heat_map.columns[column]
    place = f"layer {first}" if first == last else f"layers {first} to {last}"
    place = f"{heat_map.rows[row]}, {place}" if heat_map.stack else heat_map.rows[row]
    distance, cosine, equal = measures(similarity)
    return f"{place}\nrelative distance {distance}, cosine {cosine}, equal {equal}"


def _fill(similarity: Similarity, scale: Scale | None) -> str:
    distance = similarity.relative_distance
    if distance is None:
        return 'class="heat undefined"'
    if distance == 0 or scale is None:
        return 'class="heat none"'
    return f'class="heat" fill-opacity="{scale.opacity(distance):.3f}"'


def _shortened(name: str) -> str:
    """Return a name with its middle elided where it is too long."""
    half = _LETTERS // 2
    return name if len(name) <= _LETTERS else f"{name[:half]}…{name[-half + 1 :]}"


def heat_key(scale: Scale | None) -> str:
    """Return the key of the colors: distance 0, five steps from the smallest to the largest distance, undefined."""
    swatches = ['<span><i class="heat-key none-key"></i>0</span>']
    if scale is not None:
        for distance in scale.steps():
            style = f"opacity:{scale.opacity(distance):.3f}"
            swatches.append(f'<span><i class="heat-key" style="{style}"></i>{distance_text(distance)}</span>')
    swatches.append('<span><i class="heat-key undefined-key"></i>undefined</span>')
    return f'<div class="key">{"".join(swatches)}</div>'
