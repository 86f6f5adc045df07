"""Draws memory over the steps, parameters by layer, and the time of each lane, each with its scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...engine.schedule.timeline import Moment
from ...io.units import duration, memory_size
from .layer_map import Curve
from .svg import figure, is_narrow, nice_number, nice_step, text_at, text_of

_PLOT_TOP, _PLOT_HEIGHT = 20.0, 170.0
_CURVE_TOP, _CURVE_HEIGHT, _CURVE_LEFT = 10.0, 56.0, 48.0
_TICK_WIDTH = 44.0  # between the layers of a scale
_LANE = 30.0  # height of a lane
_NARROW_LANE = 54.0
_TIMES = 4  # ticks of a scale of times, at most


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
    title = f"{curve.kind} over the steps, peak {memory_size(curve.peak)} of {memory_size(curve.budget)}"
    return figure(title, lambda width: (_PLOT_TOP + _PLOT_HEIGHT + 26, _memory(curve, width)))


def _memory(curve: MemoryCurve, width: float) -> Iterator[str]:
    near = curve.budget <= 1.6 * curve.peak  # a much larger budget would flatten the curve
    top = curve.budget if near else curve.peak
    left, right = 56.0 if is_narrow(width) else 72.0, width
    bottom = _PLOT_TOP + _PLOT_HEIGHT
    column = (right - left) / max(1, len(curve.moments))

    def y_of(nbytes: float) -> float:
        return bottom - _PLOT_HEIGHT * min(1.0, nbytes / top)

    step = _next_power_of_two(top / 4)
    for number in range(int(top // step) + 1):
        y = y_of(number * step)
        yield f'<path d="M{left - 4:g} {y:.1f}H{right:g}" class="grid"/>'
        yield text_at(left - 8, y + 4, memory_size(number * step) if number else "0", "tick", "end")
    line = "".join(f"V{y_of(held):.1f}H{left + column * (place + 1):.1f}" for place, held in enumerate(curve.held))
    peak, budget = y_of(curve.peak), y_of(curve.budget)
    yield f'<path d="M{left:g} {bottom:g}V{peak:.1f}H{right:g}V{bottom:g}Z" class="ahead"/>'
    yield f'<path d="M{left:g} {bottom:g}{line}V{bottom:g}Z" class="held"/>'
    yield f'<path d="M{left:g} {bottom:g}V{y_of(curve.fixed):.1f}H{right:g}V{bottom:g}Z" class="own"/>'
    yield f'<path d="M{left:g} {peak:.1f}H{right:g}" class="peak"/>'
    if near:
        yield f'<path d="M{left:g} {budget:.1f}H{right:g}" class="budget"/>'
    yield text_at(left + 6, peak - 6, f"peak {memory_size(curve.peak, up=True)}", "peak-label")
    label = f"budget {memory_size(curve.budget)}{'' if near else ' ↑'}"
    yield text_at(right, (budget if near else peak) - 6, label, "budget-label", "end")
    if not is_narrow(width):
        yield from _tooltips(curve, left, column)
    yield from _steps(curve, left, right)


def _tooltips(curve: MemoryCurve, left: float, column: float) -> Iterator[str]:
    """Draw the tooltip of each column."""
    for place, moment in enumerate(curve.moments):
        steps = f"steps {moment.first:,} to {moment.last:,}: {memory_size(curve.held[place])}"
        title = f"{steps}\n{curve.names[place]}, pass {moment.index + 1}"
        box = f'x="{left + column * place:.1f}" y="{_PLOT_TOP:g}" width="{column:.2f}" height="{_PLOT_HEIGHT:g}"'
        yield f'<rect {box} class="hit"><title>{text_of(title)}</title></rect>'


def _steps(curve: MemoryCurve, left: float, right: float) -> Iterator[str]:
    """Write step numbers below the columns: at most five, or three where the chart is narrow."""
    moments = curve.moments
    parts = 4 if right - left > 500 else 2
    previous = -1
    for part in range(parts + 1):
        place = min(len(moments) - 1, part * len(moments) // parts)
        number = curve.steps if part == parts else moments[place].first if moments else 0
        anchor = "start" if part == 0 else "end" if part == parts else "middle"
        x = left + (right - left) * part / parts
        if number != previous:  # a step of many bytes has many columns
            yield text_at(x, _PLOT_TOP + _PLOT_HEIGHT + 18, f"step {number:,}", "tick", anchor)
        previous = number


def _next_power_of_two(minimum: float) -> int:
    size = 1
    while size < minimum:
        size *= 2
    return size


# ------------------------------------------------------------------------------------------------ parameters


def curve_chart(curve: Curve) -> str:
    """Draw a parameter by layer as a line of steps."""
    known = [value for value in curve.values if value is not None]
    label = f"{curve.parameter} from {known[0]:.4g} to {known[-1]:.4g}"
    return figure(label, lambda width: (_CURVE_TOP + _CURVE_HEIGHT + 20, _curve(curve, known, width)))


def _curve(curve: Curve, known: Sequence[float], width: float) -> Iterator[str]:
    low, high = min(0.0, *known), max(1.0 if max(known) <= 1 else max(known), *known)
    cell = (width - _CURVE_LEFT) / len(curve.values)

    def y_of(value: float) -> float:
        return _CURVE_TOP + _CURVE_HEIGHT * (1 - (value - low) / (high - low))

    for level in (low, (low + high) / 2, high):
        yield f'<path d="M{_CURVE_LEFT - 4:g} {y_of(level):.1f}H{width:g}" class="grid"/>'
        yield text_at(_CURVE_LEFT - 8, y_of(level) + 4, f"{level:.3g}", "tick", "end")
    path, pen = "", "M"
    for layer, value in enumerate(curve.values):
        if value is None:
            pen = "M"
            continue
        path += f"{pen}{_CURVE_LEFT + layer * cell:.1f} {y_of(value):.1f}h{cell:.1f}"
        pen = "L"
    yield f'<path d="{path}" class="curve"/>'
    y = _CURVE_TOP + _CURVE_HEIGHT + 15
    yield text_at(_CURVE_LEFT - 8, y, "layer", "tick", "end")
    for layer in range(0, len(curve.values), nice_number(_TICK_WIDTH / cell)):
        yield text_at(_CURVE_LEFT + (layer + 0.5) * cell, y, str(layer), "tick", "middle")


# ------------------------------------------------------------------------------------------------ time


def lanes_chart(lanes: Sequence[tuple[str, float, str]]) -> str:
    """Draw the time of each lane as a bar, above a scale of times.

    Args:
        lanes: (name, seconds, label) of each lane.
    """
    height = _NARROW_LANE, _LANE
    return figure(
        "time of each lane if it ran alone",
        lambda width: (26 + height[not is_narrow(width)] * len(lanes), _lanes(lanes, width)),
    )


def _lanes(lanes: Sequence[tuple[str, float, str]], width: float) -> Iterator[str]:
    longest = max((seconds for _, seconds, _ in lanes), default=0.0) or 1.0
    narrow = is_narrow(width)
    left, room, lane = (0.0, width - 24, _NARROW_LANE) if narrow else (90.0, 600.0, _LANE)
    bottom = 6 + lane * len(lanes)
    step = nice_step(longest / _TIMES)
    for number in range(int(longest / step * 1.0001) + 1):
        x = left + room * number * step / longest
        yield f'<path d="M{x:.1f} 0V{bottom:g}" class="grid"/>'
        yield text_at(x, bottom + 14, _time(number * step), "tick", "start" if number == 0 else "middle")
    for number, (name, seconds, label) in enumerate(lanes):
        y = 6 + lane * number
        length = max(2.0, room * seconds / longest)
        kind = "lane slowest" if seconds == longest else "lane"
        name_x, name_y, anchor = (0.0, y + 12, "start") if narrow else (left - 12, y + 15, "end")
        label_x, label_y = (0.0, y + 44) if narrow else (left + 8 + length, y + 15)
        bar = (
            f'y="{y + 18:g}" width="{length:.1f}" height="12"'
            if narrow
            else f'y="{y:g}" width="{length:.1f}" height="20"'
        )
        yield f'<rect x="{left:g}" {bar} rx="3" class="{kind}"/>'
        yield text_at(name_x, name_y, name, "name", anchor)
        yield text_at(label_x, label_y, label, "soft")


def _time(seconds: float) -> str:
    """Format a tick of a scale of times: seconds exactly, longer times as durations."""
    return f"{seconds:.3g} s" if seconds < 60 else duration(seconds)
