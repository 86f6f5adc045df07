"""Draws the layer map: the layers of the inputs on top, those of the output below, and a band for each run between.

Colors are never the only difference: each input has a letter, and the bands and the output show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...io.units import plural
from .layer_map import LayerRun, StackMap
from .svg import LETTER, figure, is_narrow, nice_number, shortened, text_at, text_of

COLORS = 8
"""Number of colors of the style sheet, ``c0`` to ``c7``."""
_GAP, _NARROW_GAP = 36.0, 14.0
_BAR = 16.0
_TOP, _BOTTOM = 56.0, 250.0  # of the bands
_NAME, _TICK = 13.0, 34.0  # baselines above the inputs' bars
_MAX_CELLS = 240  # layers of a bar that are separated by lines
_MAX_RUNS = 1500  # layer runs that are drawn
_TICK_WIDTH = 34.0  # between the ticks of a scale
_KEY_INPUTS = 24  # inputs that the key names


def stack_chart(stack: StackMap) -> str:
    """Draw a stack of layers, with the key of its inputs."""
    label = f"layers of {plural(len(stack.inputs), 'input')} become {plural(stack.layers, 'layer')}"
    return figure(label, lambda width: (_BOTTOM + _BAR + 42, _Drawing(stack, width).parts())) + _key(stack)


def letter(number: int) -> str:
    """Return the letter of an input: A to Z, then AA, AB, ..."""
    name = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        name = chr(ord("A") + digit) + name
    return name


def _key(stack: StackMap) -> str:
    """Return the key of the inputs' letters and colors; empty if there is one input."""
    if len(stack.inputs) == 1:
        return ""
    entries = [
        f'<span><i class="b{number % COLORS}"></i><b>{letter(number)}</b> {text_of(source.name)}, '
        f"{plural(source.count, 'layer')}</span>"
        for number, source in enumerate(stack.inputs[:_KEY_INPUTS])
    ]
    if more := len(stack.inputs) - _KEY_INPUTS:
        entries += [f"<span>and {more:,} more</span>"] * (more > 0)
    return f'<div class="key">{"".join(entries)}</div>'


class _Drawing:
    """The drawing of a stack at one width."""

    def __init__(self, stack: StackMap, width: float) -> None:
        self._stack = stack
        self._width = width
        self._narrow = is_narrow(width)
        self._several = len(stack.inputs) > 1
        self._disjoint = sum(run.count for run in stack.runs) <= stack.layers  # each output layer has one source
        self._cell = width / stack.layers
        gap = min(_NARROW_GAP if self._narrow else _GAP, 0.4 * width / len(stack.inputs))
        total = sum(source.count for source in stack.inputs)
        room = width - gap * (len(stack.inputs) - 1)
        self._widths = [room * source.count / total for source in stack.inputs]
        self._starts = [sum(self._widths[:number]) + gap * number for number in range(len(stack.inputs))]

    def parts(self) -> Iterator[str]:
        """Yield the elements of the drawing."""
        stack = self._stack
        used = [[False] * source.count for source in stack.inputs]
        for run in stack.runs:
            used[run.input][run.first : run.first + run.count] = [True] * run.count
        shown = stack.runs[:_MAX_RUNS]
        for number, run in enumerate(shown):
            yield self._band(number, run)
        for number in range(len(stack.inputs)):
            yield from self._input(number, used[number])
        yield from self._output(shown)
        for number, run in enumerate(shown):
            yield from self._label(number, run)

    def _color(self, number: int) -> int:
        """The color of a run: its input's, or its own if there is one input."""
        return (self._stack.runs[number].input if self._several else number) % COLORS

    def _top_of(self, run: LayerRun) -> tuple[float, float]:
        """The left and the right end of a run in its input's bar."""
        cell = self._widths[run.input] / self._stack.inputs[run.input].count
        left = self._starts[run.input] + run.first * cell
        return left, left + run.count * cell

    def _band(self, number: int, run: LayerRun) -> str:
        """Draw a run as a curved band from the input's layers to the output's."""
        top = self._top_of(run)
        left, right = run.out * self._cell, (run.out + run.count) * self._cell
        middle = (_TOP + _BOTTOM) / 2
        path = (
            f"M{top[0]:.1f} {_TOP:g}C{top[0]:.1f} {middle:g} {left:.1f} {middle:g} {left:.1f} {_BOTTOM:g}"
            f"H{right:.1f}C{right:.1f} {middle:g} {top[1]:.1f} {middle:g} {top[1]:.1f} {_TOP:g}Z"
        )
        kind = f"band{'' if self._disjoint else ' many'} c{self._color(number)}"
        if self._narrow:
            return f'<path d="{path}" class="{kind}"/>'
        name = self._stack.inputs[run.input].name
        title = f"{name}: {_layers(run.first, run.count)} become {_layers(run.out, run.count)} of the output"
        if run.count == 1:
            title = f"{name}: layer {run.first} becomes layer {run.out} of the output"
        return f'<path d="{path}" class="{kind}"><title>{text_of(title)}</title></path>'

    def _label(self, number: int, run: LayerRun) -> Iterator[str]:
        """Write the letter and the layers of a run into its band, as far as there is room."""
        top = self._top_of(run)
        bottom = run.out * self._cell, (run.out + run.count) * self._cell
        room = min(top[1] - top[0], bottom[1] - bottom[0]) - 6
        layers = f"{run.first}-{run.first + run.count - 1}" if run.count > 1 else f"{run.first}"
        own = letter(run.input) if self._several else ""
        for text in (f"{own} {layers}".strip(), own or layers):
            if len(text) * LETTER <= room:
                # bands of several inputs cross between the bars: labels near the input are apart
                y, x = (_TOP + 16, sum(top) / 2) if not self._disjoint else (_BOTTOM - 10, sum(bottom) / 2)
                yield text_at(x, y, text, "band-label", "middle")
                return

    def _input(self, number: int, used: Sequence[bool]) -> Iterator[str]:
        """Draw an input: its letter and name, its scale, and its bar."""
        source, left, width = self._stack.inputs[number], self._starts[number], self._widths[number]
        yield from _bar(left, _TOP - _BAR, width, used, f"c{number % COLORS}" if self._several else "entire")
        own = f"{letter(number)} " if self._several else ""
        roomy = width > 160
        if roomy or not self._several:
            name = f"{own}{shortened(source.name, width - 90)}"
            yield f"<g><title>{text_of(source.name)}</title>{text_at(left, _NAME, name, 'name')}</g>"
            yield text_at(left + width, _NAME, plural(source.count, "layer"), "soft", "end")
        elif width >= LETTER * len(own):
            yield text_at(left, _NAME, own.strip(), "name")
        if width >= 2 * LETTER:
            yield from _ticks(left, _TICK, width, source.count)

    def _output(self, runs: Sequence[LayerRun]) -> Iterator[str]:
        """Draw the layers of the output, in the colors of their sources where each has one source."""
        stack, y = self._stack, _BOTTOM + _BAR
        yield from _bar(0, _BOTTOM, self._width, [True] * stack.layers, "entire")
        for number, run in enumerate(runs if self._disjoint else ()):
            size = f'width="{run.count * self._cell:.1f}" height="{_BAR:g}"'
            kind = f"bar over c{self._color(number)}"
            yield f'<rect x="{run.out * self._cell:.1f}" y="{_BOTTOM:g}" {size} class="{kind}"/>'
        yield from _ticks(0, y + 14, self._width, stack.layers)
        label = plural(stack.layers, "layer")
        room = self._width - LETTER * (len(label) + 12)
        prefix = stack.prefix if len(stack.prefix) * LETTER <= room else shortened(stack.prefix, room)
        yield text_at(0, y + 36, f"output: {prefix}", "name")
        yield text_at(self._width, y + 36, label, "soft", "end")


def _ticks(x: float, y: float, width: float, layers: int) -> Iterator[str]:
    """Write layer numbers along a bar."""
    cell = width / layers
    for layer in range(0, layers, nice_number(layers * _TICK_WIDTH / width)):
        yield text_at(x + (layer + 0.5) * cell, y, str(layer), "tick", "middle")


def _layers(first: int, count: int) -> str:
    return f"layer {first}" if count == 1 else f"layers {first}-{first + count - 1}"


def _bar(x: float, y: float, width: float, used: Sequence[bool], kind: str) -> Iterator[str]:
    """Draw a bar of layers: used ones filled, the others hollow, separated by lines where they are wide enough."""
    cell = width / len(used)
    yield f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{_BAR:g}" rx="3" class="hollow"/>'
    start = 0
    for layer in range(len(used) + 1):
        if layer == len(used) or used[layer] != used[start]:
            if used[start]:
                left, size = x + start * cell, (layer - start) * cell
                yield f'<rect x="{left:.1f}" y="{y:g}" width="{size:.1f}" height="{_BAR:g}" rx="3" class="bar {kind}"/>'
            start = layer
    if len(used) <= _MAX_CELLS and cell >= 3:
        lines = "".join(f"M{x + layer * cell:.1f} {y:g}v{_BAR:g}" for layer in range(1, len(used)))
        yield f'<path d="{lines}" class="cells"/>'
