"""Drawings of a plan as SVG: bands of layers, memory over the steps, parameters over the layers. Text in, text out.

Colours come from the page's style sheet by class, so that light and dark fit. Everything that is shown is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ...engine.schedule.timeline import Moment
from ...io.units import clean, memory_size, plural
from .layer_map import Curve, LayerRun, StackMap

WIDTH = 1000
_COLOURS = 8
_GAP = 36.0
_BAR = 16.0
_TOP, _BOTTOM = 42.0, 236.0
_CELLS = 240  # layers up to which each is drawn apart
_MOST_BANDS = 1500
_LABEL = 6.2  # the width of a letter, about
_PLOT_LEFT, _PLOT_TOP, _PLOT_HEIGHT = 72.0, 20.0, 170.0


def text_of(words: object) -> str:
    """Anything as text of HTML: what a terminal would obey is escaped too, since names come from others."""
    return escape(clean(str(words)))


def svg(height: float, label: str, parts: Iterable[str]) -> str:
    """A drawing of the page's width, with what it shows in words."""
    return (
        f'<div class="figure"><svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{text_of(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg></div>'
    )


def shortened(name: str, room: float) -> str:
    """A model's name for so much room: its last part, cut in the middle where that is too long."""
    last = name.rstrip("/").rpartition("/")[2] or name
    letters = max(4, int(room / _LABEL))
    return last if len(last) <= letters else f"{last[: letters // 2]}…{last[-(letters - letters // 2 - 1) :]}"


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{text_of(words)}</text>'


# ------------------------------------------------------------------------------------------------ bands


def bands_chart(weave: StackMap) -> str:
    """The layers of the inputs above, those of the output below, and a band for each run between them."""
    total = sum(strip.count for strip in weave.strips)
    room = WIDTH - _GAP * (len(weave.strips) - 1)
    starts, widths = [], []
    x = 0.0
    for strip in weave.strips:
        starts.append(x)
        widths.append(room * strip.count / total)
        x += widths[-1] + _GAP
    cell = WIDTH / weave.layers
    alone = _alone(weave)
    parts: list[str] = []
    used = [[False] * strip.count for strip in weave.strips]
    for number, band in enumerate(weave.bands):
        used[band.strip][band.first : band.first + band.count] = [True] * band.count
        if number < _MOST_BANDS:
            inside = widths[band.strip] / weave.strips[band.strip].count
            left = starts[band.strip] + band.first * inside
            above = left, left + band.count * inside
            parts.append(_ribbon(band, weave, _colour(weave, number), above, cell, alone=alone))
    for number, strip in enumerate(weave.strips):
        kind = f"c{number % _COLOURS}" if len(weave.strips) > 1 else "whole"
        parts += _strip(starts[number], _TOP - _BAR, widths[number], used[number], kind)
        name = shortened(strip.name, widths[number] - 70 if widths[number] > 160 else widths[number])
        parts.append(f"<g><title>{text_of(strip.name)}</title>{_text(starts[number], 14, name, 'name')}</g>")
        if widths[number] > 160:
            label = plural(strip.count, "layer")
            parts.append(_text(starts[number] + widths[number], 14, label, "soft", "end"))
    parts += _strip(0, _BOTTOM, WIDTH, [True] * weave.layers, "whole")
    for number, band in enumerate(weave.bands[:_MOST_BANDS] if alone else ()):
        size = f'width="{band.count * cell:.1f}" height="{_BAR:g}"'
        parts.append(
            f'<rect x="{band.out * cell:.1f}" y="{_BOTTOM:g}" {size} class="bar over c{_colour(weave, number)}"/>'
        )
    step = _nice(weave.layers / 10)
    for layer in range(0, weave.layers, step):
        parts.append(_text((layer + 0.5) * cell, _BOTTOM + _BAR + 14, str(layer), "tick", "middle"))
    parts.append(_text(0, _BOTTOM + _BAR + 36, f"the output: {weave.prefix}", "name"))
    parts.append(_text(WIDTH, _BOTTOM + _BAR + 36, plural(weave.layers, "layer"), "soft", "end"))
    said = f"layers of {plural(len(weave.strips), 'input')} become {plural(weave.layers, 'layer')}"
    return svg(_BOTTOM + _BAR + 42, said, parts)


def _alone(weave: StackMap) -> bool:
    """Whether every layer of the output is made of one layer."""
    return sum(band.count for band in weave.bands) <= weave.layers


def _colour(weave: StackMap, number: int) -> int:
    """The colour of a band: its model's, or its own where there is one model."""
    return (weave.bands[number].strip if len(weave.strips) > 1 else number) % _COLOURS


def _ribbon(
    band: LayerRun, weave: StackMap, colour: int, above: tuple[float, float], cell: float, *, alone: bool
) -> str:
    left, right = band.out * cell, (band.out + band.count) * cell
    middle = (_TOP + _BOTTOM) / 2
    path = (
        f"M{above[0]:.1f} {_TOP:g}C{above[0]:.1f} {middle:g} {left:.1f} {middle:g} {left:.1f} {_BOTTOM:g}"
        f"H{right:.1f}C{right:.1f} {middle:g} {above[1]:.1f} {middle:g} {above[1]:.1f} {_TOP:g}Z"
    )
    strip = weave.strips[band.strip]
    words = f"{strip.name}: {_layers(band.first, band.count)} become {_layers(band.out, band.count)} of the output"
    if band.count == 1:
        words = f"{strip.name}: layer {band.first} becomes layer {band.out} of the output"
    return f'<path d="{path}" class="band{"" if alone else " many"} c{colour}"><title>{text_of(words)}</title></path>'


def _layers(first: int, count: int) -> str:
    return f"layer {first}" if count == 1 else f"layers {first}-{first + count - 1}"


def _strip(x: float, y: float, width: float, used: Sequence[bool], kind: str) -> list[str]:
    """A bar of layers: those that are used filled, the others hollow, with a line between two where there is room."""
    cell = width / len(used)
    parts = [f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{_BAR:g}" rx="3" class="hollow"/>']
    start = 0
    for place in range(len(used) + 1):
        if place == len(used) or used[place] != used[start]:
            if used[start]:
                left, size = x + start * cell, (place - start) * cell
                parts.append(
                    f'<rect x="{left:.1f}" y="{y:g}" width="{size:.1f}" height="{_BAR:g}" rx="3" class="bar {kind}"/>'
                )
            start = place
    if len(used) <= _CELLS and cell >= 3:
        lines = "".join(f"M{x + place * cell:.1f} {y:g}v{_BAR:g}" for place in range(1, len(used)))
        parts.append(f'<path d="{lines}" class="cells"/>')
    return parts


def _nice(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is no smaller."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if size * factor >= least:
                return size * factor
        size *= 10


# ------------------------------------------------------------------------------------------------ memory


def memory_chart(
    moments: Sequence[Moment], names: Sequence[str], *, vram: bool, own: int, peak: int, budget: int, steps: int
) -> str:
    """What is held over the steps, below the peak that the plan promises and the budget.

    Args:
        moments: in which equally many bytes are moved.
        names: of the tensor that each moment works on.
        vram: whether it is about VRAM, else RAM.
        own: bytes that are held all the time.
        peak: what the plan says is held at the most, what is read ahead included.
        budget: what may be held.
        steps: how many there are.
    """
    held = [moment.vram if vram else moment.ram for moment in moments]
    near = budget <= 1.6 * peak
    top = budget if near else peak
    left, right, height = _PLOT_LEFT, float(WIDTH), _PLOT_HEIGHT
    bottom = _PLOT_TOP + height

    def across(place: float) -> float:
        return left + (right - left) * place / max(1, len(moments))

    def up(nbytes: float) -> float:
        return bottom - height * min(1.0, nbytes / top)

    parts = []
    step = _nice_bytes(top / 4)
    for number in range(int(top // step) + 1):
        y = up(number * step)
        parts.append(f'<path d="M{left - 4:g} {y:.1f}H{right:g}" class="grid"/>')
        parts.append(_text(left - 8, y + 4, memory_size(number * step) if number else "0", "tick", "end"))
    curve = "".join(f"V{up(nbytes):.1f}H{across(place + 1):.1f}" for place, nbytes in enumerate(held))
    parts.append(f'<path d="M{left:g} {bottom:g}V{up(peak):.1f}H{right:g}V{bottom:g}Z" class="ahead"/>')
    parts.append(f'<path d="M{left:g} {bottom:g}{curve}V{bottom:g}Z" class="held"/>')
    parts.append(f'<path d="M{left:g} {bottom:g}V{up(own):.1f}H{right:g}V{bottom:g}Z" class="own"/>')
    parts.append(f'<path d="M{left:g} {up(peak):.1f}H{right:g}" class="peak"/>')
    if near:
        parts.append(f'<path d="M{left:g} {up(budget):.1f}H{right:g}" class="budget"/>')
    parts.append(_text(left + 6, up(peak) - 6, f"at the most {memory_size(peak, up=True)}", "peak-label"))
    said = f"budget {memory_size(budget)}{'' if near else ' ↑'}"
    parts.append(_text(right, up(budget if near else peak) - 6, said, "budget-label", "end"))
    for place, moment in enumerate(moments):
        words = (
            f"steps {moment.first:,} to {moment.last:,}: {memory_size(held[place])}\n{names[place]}, pass "
            f"{moment.index + 1}"
        )
        box = f'x="{across(place):.1f}" y="{_PLOT_TOP:g}" width="{across(1) - left:.2f}" height="{height:g}"'
        parts.append(f'<rect {box} class="hit"><title>{text_of(words)}</title></rect>')
    for quarter in range(5):
        place = min(len(moments) - 1, quarter * len(moments) // 4)
        number = steps if quarter == 4 else moments[place].first if moments else 0
        anchor = "start" if quarter == 0 else "end" if quarter == 4 else "middle"
        parts.append(_text(across(quarter * len(moments) / 4), bottom + 18, f"step {number:,}", "tick", anchor))
    name = "VRAM" if vram else "RAM"
    return svg(bottom + 26, f"{name} over the steps, at the most {memory_size(peak)} of {memory_size(budget)}", parts)


def _nice_bytes(least: float) -> int:
    """The smallest power of two that is no smaller."""
    size = 1
    while size < least:
        size *= 2
    return size


# ------------------------------------------------------------------------------------------------ parameters


def curve_chart(curve: Curve) -> str:
    """A parameter over the layers: a step for each, between the least and the largest of its values."""
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
    said = f"{curve.parameter} from {known[0]:.4g} to {known[-1]:.4g}"
    return svg(top + height + 4, said, [base, f'<path d="{path}" class="curve"/>'])


def lanes_chart(lanes: Sequence[tuple[str, float, str]]) -> str:
    """The seconds of each lane side by side: (name, seconds, what is said of it)."""
    longest = max((seconds for _, seconds, _ in lanes), default=0.0) or 1.0
    parts = []
    for number, (name, seconds, said) in enumerate(lanes):
        y = 6 + 30 * number
        width = max(2.0, 600 * seconds / longest)
        kind = "lane slowest" if seconds == longest else "lane"
        parts.append(_text(78, y + 15, name, "name", "end"))
        parts.append(f'<rect x="90" y="{y:g}" width="{width:.1f}" height="20" rx="3" class="{kind}"/>')
        parts.append(_text(98 + width, y + 15, said, "soft"))
    return svg(12 + 30 * len(lanes), "the time that each lane would take alone", parts)
