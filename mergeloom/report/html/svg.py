"""The parts of all drawings: the figure with a wide and a narrow drawing, texts, and the ticks of scales.

Colors come from the page's style sheet by class, for light and dark mode. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape

from ...io.units import clean

WIDTH = 1000
"""Width of a drawing for wide windows, in pixels of its own."""
NARROW_WIDTH = 340
"""Width of a drawing for narrow windows: at 400 pixels, its texts have their nominal size."""
LETTER = 6.2
"""Approximate width of a letter."""
_MIN_LETTERS = 4

Draw = Callable[[float], tuple[float, Iterable[str]]]
"""A function that draws at a width, and returns the drawing's height and elements."""


def text_of(value: object) -> str:
    """Return a value as HTML text, with markup and control characters escaped: names come from untrusted files."""
    return escape(clean(str(value)))


def figure(label: str, draw: Draw) -> str:
    """Return a drawing twice, for wide and for narrow windows; the style sheet shows one of them.

    Args:
        label: description for screen readers.
        draw: function that draws at a width.
    """
    drawings = (("wide", WIDTH), ("narrow", NARROW_WIDTH))
    return "".join(_svg(f"figure {kind}", width, *draw(width), label) for kind, width in drawings)


def _svg(kind: str, width: float, height: float, parts: Iterable[str], label: str) -> str:
    return (
        f'<div class="{kind}"><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text_of(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg></div>'
    )


def is_narrow(width: float) -> bool:
    """Whether a drawing has the width for narrow windows, which show no tooltips."""
    return width < WIDTH


def shortened(name: str, width: float) -> str:
    """Return the last component of a model's name, with its middle elided where it is wider than `width`."""
    last = name.rstrip("/").rpartition("/")[2] or name
    letters = max(_MIN_LETTERS, int(width / LETTER))
    return last if len(last) <= letters else f"{last[: letters // 2]}…{last[-(letters - letters // 2 - 1) :]}"


def text_at(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Return a text at a position, with a class of the style sheet."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{text_of(text)}</text>'


def nice_number(minimum: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is at least `minimum`."""
    return max(1, round(nice_step(minimum))) if minimum > 1 else 1


def nice_step(minimum: float) -> float:
    """Return the smallest of ..., 0.1, 0.2, 0.5, 1, 2, 5, 10, ... that is at least `minimum`, which is above 0."""
    power = math.floor(math.log10(minimum))
    for factor in (1, 2, 5):
        step = float(f"{factor}e{power}")  # the nearest float, unlike 10.0**power
        if step >= minimum:
            return step
    return float(f"1e{power + 1}")
