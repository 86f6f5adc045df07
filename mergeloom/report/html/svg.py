"""Drawings of a plan as SVG text: the layer map, memory over the steps, parameters by layer, and lanes.

Colors come from the page's style sheet by class, for light and dark mode. All text is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ...engine.schedule.timeline import Moment
from ...io.units import clean, memory_size, plural
from .layer_map import Curve, LayerRun, StackMap

WIDTH = 1000
_COLORS = 8
_GAP = 36.0
_BAR = 16.0
_TOP, _BOTTOM = 42.0, 236.0
_MAX_CELLS = 240  # layers of a bar that are separated by lines
_MAX_RUNS = 1500  # layer runs that are drawn
_LETTER = 6.2  # approximate width of a letter
_PLOT_LEFT, _PLOT_TOP, _PLOT_HEIGHT = 72.0, 20.0, 170.0


def text_of(value: object) -> str:
    """Return a value as HTML text, with markup and control characters escaped: names come from untrusted files."""
    return escape(clean(str(value)))


def svg(height: float, label: str, parts: Iterable[str]) -> str:
    """Return a drawing of the page's width, with a label for screen readers."""
    return (
        f'<div class="figure"><svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{text_of(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg></div>'
    )


def shortened(name: str, width: float) -> str:
    """Return the last component of a model's name, with its middle elided where it is wider than `width`."""
    last = name.rstrip("/").rpartition("/")[2] or name
    letters = max(4, int(width / _LETTER))
    return last if len(last) <= letters else f"{last[: letters // 2]}…{last[-(letters - letters // 2 - 1) :]}"


def text_at(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Return a text at a position, with a class of the style sheet."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{text_of(text)}</text>'


# ------------------------------------------------------------------------------------------------ layer map


def layer_chart(stack: StackMap) -> str:
    """Draw the layers of the inputs on top, those of the output below, and a ribbon for each run between them."""
    total = sum(source.count for source in stack.inputs)
    width = WIDTH - _GAP * (len(stack.inputs) - 1)
    starts, widths = [], []
    x = 0.0
    for source in stack.inputs:
        starts.append(x)
        widths.append(width * source.count / total)
        x += widths[-1] + _GAP
    cell = WIDTH / stack.layers
    disjoint = _disjoint(stack)
    parts: list[str] = []
    used = [[False] * source.count for source in stack.inputs]
    for number, run in enumerate(stack.runs):
        used[run.input][run.first : run.first + run.count] = [True] * run.count
        if number < _MAX_RUNS:
            input_cell = widths[run.input] / stack.inputs[run.input].count
            left = starts[run.input] + run.first * input_cell
            top = left, left + run.count * input_cell
            parts.append(_ribbon(run, stack, _color(stack, number), top, cell, disjoint=disjoint))
    for number, source in enumerate(stack.inputs):
        kind = f"c{number % _COLORS}" if len(stack.inputs) > 1 else "whole"
        parts += _bar(starts[number], _TOP - _BAR, widths[number], used[number], kind)
        name = shortened(source.name, widths[number] - 70 if widths[number] > 160 else widths[number])
        parts.append(f"<g><title>{text_of(source.name)}</title>{text_at(starts[number], 14, name, 'name')}</g>")
        if widths[number] > 160:
            label = plural(source.count, "layer")
            parts.append(text_at(starts[number] + widths[number], 14, label, "soft", "end"))
    parts += _output_bar(stack, cell, disjoint=disjoint)
    label = f"layers of {plural(len(stack.inputs), 'input')} become {plural(stack.layers, 'layer')}"
    return svg(_BOTTOM + _BAR + 42, label, parts)


def _output_bar(stack: StackMap, cell: float, *, disjoint: bool) -> list[str]:
    """Draw the layers of the output, in the colors of their sources where each has one source."""
    parts = _bar(0, _BOTTOM, WIDTH, [True] * stack.layers, "whole")
    for number, run in enumerate(stack.runs[:_MAX_RUNS] if disjoint else ()):
        size = f'width="{run.count * cell:.1f}" height="{_BAR:g}"'
        parts.append(
            f'<rect x="{run.out * cell:.1f}" y="{_BOTTOM:g}" {size} class="bar over c{_color(stack, number)}"/>'
        )
    step = nice_number(stack.layers / 10)
    for layer in range(0, stack.layers, step):
        parts.append(text_at((layer + 0.5) * cell, _BOTTOM + _BAR + 14, str(layer), "tick", "middle"))
    parts.append(text_at(0, _BOTTOM + _BAR + 36, f"output: {stack.prefix}", "name"))
    parts.append(text_at(WIDTH, _BOTTOM + _BAR + 36, plural(stack.layers, "layer"), "soft", "end"))
    return parts


def _disjoint(stack: StackMap) -> bool:
    """Whether every layer of the output has a single source."""
    return sum(run.count for run in stack.runs) <= stack.layers


def _color(stack: StackMap, number: int) -> int:
    """The color of a run: its input's, or its own if there is one input."""
    return (stack.runs[number].input if len(stack.inputs) > 1 else number) % _COLORS


def _ribbon(
    run: LayerRun, stack: StackMap, color: int, top: tuple[float, float], cell: float, *, disjoint: bool
) -> str:
    """Draw a run as a curved band from the input's layers to the output's."""
    left, right = run.out * cell, (run.out + run.count) * cell
    middle = (_TOP + _BOTTOM) / 2
    path = (
        f"M{top[0]:.1f} {_TOP:g}C{top[0]:.1f} {middle:g} {left:.1f} {middle:g} {left:.1f} {_BOTTOM:g}"
        f"H{right:.1f}C{right:.1f} {middle:g} {top[1]:.1f} {middle:g} {top[1]:.1f} {_TOP:g}Z"
    )
    name = stack.inputs[run.input].name
    title = f"{name}: {_layers(run.first, run.count)} become {_layers(run.out, run.count)} of the output"
    if run.count == 1:
        title = f"{name}: layer {run.first} becomes layer {run.out} of the output"
    kind = f"band{'' if disjoint else ' many'} c{color}"
    return f'<path d="{path}" class="{kind}"><title>{text_of(title)}</title></path>'


def _layers(first: int, count: int) -> str:
    return f"layer {first}" if count == 1 else f"layers {first}-{first + count - 1}"


def _bar(x: float, y: float, width: float, used: Sequence[bool], kind: str) -> list[str]:
    """Draw a bar of layers: used ones filled, the others hollow, separated by lines where they are wide enough."""
    cell = width / len(used)
    parts = [f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{_BAR:g}" rx="3" class="hollow"/>']
    start = 0
    for layer in range(len(used) + 1):
        if layer == len(used) or used[layer] != used[start]:
            if used[start]:
                left, size = x + start * cell, (layer - start) * cell
                parts.append(
                    f'<rect x="{left:.1f}" y="{y:g}" width="{size:.1f}" height="{_BAR:g}" rx="3" class="bar {kind}"/>'
                )
            start = layer
    if len(used) <= _MAX_CELLS and cell >= 3:
        lines = "".join(f"M{x + layer * cell:.1f} {y:g}v{_BAR:g}" for layer in range(1, len(used)))
        parts.append(f'<path d="{lines}" class="cells"/>')
    return parts


def nice_number(minimum: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is at least `minimum`."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if size * factor >= minimum:
                return size * factor
        size *= 10


# ------------------------------------------------------------------------------------------------ memory


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Memory over the steps of a schedule.

    Args:
        kind: ``RAM`` or ``VRAM``.
        moments: columns of the chart, with equal bytes moved in each.
        names: output tensor that each column works on.
        held: bytes held at each column.
        fixed: bytes held throughout.
        peak: planned peak in bytes, read-ahead included.
        budget: limit in bytes.
        steps: number of steps.
    """

    kind: str
    moments: Sequence[Moment]
    names: Sequence[str]
    held: Sequence[int]
    fixed: int
    peak: int
    budget: int
    steps: int


def memory_chart(curve: MemoryCurve) -> str:
    """Draw memory over the steps, below the planned peak and the budget."""
    near = curve.budget <= 1.6 * curve.peak  # a much larger budget would flatten the curve
    top = curve.budget if near else curve.peak
    left, right = _PLOT_LEFT, float(WIDTH)
    bottom = _PLOT_TOP + _PLOT_HEIGHT
    column = (right - left) / max(1, len(curve.moments))

    def y_of(nbytes: float) -> float:
        return bottom - _PLOT_HEIGHT * min(1.0, nbytes / top)

    parts = []
    step = _next_power_of_two(top / 4)
    for number in range(int(top // step) + 1):
        y = y_of(number * step)
        parts.append(f'<path d="M{left - 4:g} {y:.1f}H{right:g}" class="grid"/>')
        parts.append(text_at(left - 8, y + 4, memory_size(number * step) if number else "0", "tick", "end"))
    line = "".join(f"V{y_of(held):.1f}H{left + column * (place + 1):.1f}" for place, held in enumerate(curve.held))
    peak, budget = y_of(curve.peak), y_of(curve.budget)
    parts.append(f'<path d="M{left:g} {bottom:g}V{peak:.1f}H{right:g}V{bottom:g}Z" class="ahead"/>')
    parts.append(f'<path d="M{left:g} {bottom:g}{line}V{bottom:g}Z" class="held"/>')
    parts.append(f'<path d="M{left:g} {bottom:g}V{y_of(curve.fixed):.1f}H{right:g}V{bottom:g}Z" class="own"/>')
    parts.append(f'<path d="M{left:g} {peak:.1f}H{right:g}" class="peak"/>')
    if near:
        parts.append(f'<path d="M{left:g} {budget:.1f}H{right:g}" class="budget"/>')
    parts.append(text_at(left + 6, peak - 6, f"peak {memory_size(curve.peak, up=True)}", "peak-label"))
    label = f"budget {memory_size(curve.budget)}{'' if near else ' ↑'}"
    parts.append(text_at(right, (budget if near else peak) - 6, label, "budget-label", "end"))
    parts += _columns(curve, column)
    title = f"{curve.kind} over the steps, peak {memory_size(curve.peak)} of {memory_size(curve.budget)}"
    return svg(bottom + 26, title, parts)


def _columns(curve: MemoryCurve, column: float) -> Iterator[str]:
    """Draw the tooltip of each column, and the step numbers below."""
    moments = curve.moments
    for place, moment in enumerate(moments):
        steps = f"steps {moment.first:,} to {moment.last:,}: {memory_size(curve.held[place])}"
        title = f"{steps}\n{curve.names[place]}, pass {moment.index + 1}"
        left = _PLOT_LEFT + column * place
        box = f'x="{left:.1f}" y="{_PLOT_TOP:g}" width="{column:.2f}" height="{_PLOT_HEIGHT:g}"'
        yield f'<rect {box} class="hit"><title>{text_of(title)}</title></rect>'
    for quarter in range(5):
        place = min(len(moments) - 1, quarter * len(moments) // 4)
        number = curve.steps if quarter == 4 else moments[place].first if moments else 0
        anchor = "start" if quarter == 0 else "end" if quarter == 4 else "middle"
        x = _PLOT_LEFT + column * quarter * len(moments) / 4
        yield text_at(x, _PLOT_TOP + _PLOT_HEIGHT + 18, f"step {number:,}", "tick", anchor)


def _next_power_of_two(minimum: float) -> int:
    size = 1
    while size < minimum:
        size *= 2
    return size


# ------------------------------------------------------------------------------------------------ parameters


def curve_chart(curve: Curve) -> str:
    """Draw a parameter by layer as a line of steps."""
    known = [value for value in curve.values if value is not None]
    low, high = min(0.0, *known), max(1.0 if max(known) <= 1 else max(known), *known)
    height, top = 38.0, 6.0
    cell = WIDTH / len(curve.values)
    path, pen = "", "M"
    for layer, value in enumerate(curve.values):
        if value is None:
            pen = "M"
            continue
        y = top + height * (1 - (value - low) / (high - low))
        path += f"{pen}{layer * cell:.1f} {y:.1f}h{cell:.1f}"
        pen = "L"
    base = f'<path d="M0 {top + height:g}H{WIDTH}" class="grid"/>'
    label = f"{curve.parameter} from {known[0]:.4g} to {known[-1]:.4g}"
    return svg(top + height + 4, label, [base, f'<path d="{path}" class="curve"/>'])


def lanes_chart(lanes: Sequence[tuple[str, float, str]]) -> str:
    """Draw the time of each lane as a bar.

    Args:
        lanes: (name, seconds, label) of each lane.
    """
    longest = max((seconds for _, seconds, _ in lanes), default=0.0) or 1.0
    parts = []
    for number, (name, seconds, label) in enumerate(lanes):
        y = 6 + 30 * number
        width = max(2.0, 600 * seconds / longest)
        kind = "lane slowest" if seconds == longest else "lane"
        parts.append(text_at(78, y + 15, name, "name", "end"))
        parts.append(f'<rect x="90" y="{y:g}" width="{width:.1f}" height="20" rx="3" class="{kind}"/>')
        parts.append(text_at(98 + width, y + 15, label, "soft"))
    return svg(12 + 30 * len(lanes), "time of each lane if it ran alone", parts)
