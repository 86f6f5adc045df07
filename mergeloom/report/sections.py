"""Sections of labeled values and tables: laid out with rich on a terminal, as plain lines anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from ..io.units import clean

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


_INDENT = 2
_GAP = 3  # between the columns of a table
_MAX_LABEL = 24
"""The widest label that has its value next to it; below a wider one, the value has a line of its own."""
_MIN_COLUMN = 12
"""The width in which a text column of a table is readable."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table.

    Args:
        header: names of the columns.
        rows: cells of each row.
        numbers: names of the columns that are aligned to the right.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report.

    Args:
        title: heading.
        fields: (label, value) pairs.
        grid: table below the fields.
        lines: lines of text below the table.
        warns: whether the section is a warning.
    """

    title: str
    fields: Sequence[tuple[str, str]] = ()
    grid: Grid | None = None
    lines: Sequence[str] = ()
    warns: bool = False


def plain(sections: Sequence[Section]) -> str:
    """Return the sections as plain text, without colors and line wrapping, and without a final newline."""
    width = _label_width(sections, _MAX_LABEL)
    blocks = []
    for section in sections:
        block = [clean(section.title)]
        block += [line for label, value in section.fields for line in _field(clean(label), clean(value), width)]
        block += [f"  {row}" for row in _aligned(section.grid)] if section.grid else []
        block += [f"  {part}".rstrip() for line in section.lines for part in clean(line).split("\n")]
        blocks.append("\n".join(block))
    return "\n\n".join(blocks)


def _label_width(sections: Sequence[Section], limit: int) -> int:
    """Return the width of the labels' column: the same in all sections, and no wider than `limit`."""
    widths = (len(label) for section in sections for label, _ in section.fields)
    return max((width for width in widths if width <= limit), default=_INDENT)


def _field(label: str, value: str, width: int) -> list[str]:
    """Return the lines of a labeled value."""
    if len(label) > width:
        return [f"  {label}", f"  {'':{width}}  {value}".rstrip()]
    return [f"  {label:{width}}  {value}".rstrip()]


def _aligned(grid: Grid) -> list[str]:
    """Return the lines of a table with aligned columns."""
    cells = [grid.header, *([clean(cell) for cell in row] for row in grid.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(grid.header))]
    right = [name in grid.numbers for name in grid.header]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


def show(sections: Sequence[Section], stream: TextIO | None = None) -> None:
    """Print the sections: laid out for the width of a terminal, or as plain lines without one."""
    stream = stream or sys.stdout
    if not is_terminal(stream):
        stream.write(plain(sections) + "\n")
        stream.flush()
        return
    console = make_console(stream)
    width = _label_width(sections, min(_MAX_LABEL, console.width // 3))
    for number, section in enumerate(sections):
        if number:
            console.print()
        for part in _renderables(section, width, console.width):
            console.print(part)


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that supports cursor movement."""
    import os

    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def load_rich() -> None:
    """Import rich now, so the memory baseline that planning measures includes it."""
    import rich.console
    import rich.padding
    import rich.table  # noqa: F401


def make_console(stream: TextIO) -> Console:
    """Return a rich console that prints text literally: brackets in a path are not markup."""
    from rich.console import Console

    return Console(file=stream, markup=False, highlight=False, emoji=False)


def _fits(grid: Grid, width: int) -> bool:
    """Whether a table is readable on a terminal of `width` columns, with its numbers in full and its texts folded."""
    from rich.cells import cell_len

    columns = list(zip(grid.header, *grid.rows, strict=True))
    widths = [max(map(cell_len, map(clean, column))) for column in columns]
    needed = [
        natural if name in grid.numbers else min(natural, max(cell_len(name), _MIN_COLUMN))
        for name, natural in zip(grid.header, widths, strict=True)
    ]
    return _INDENT + sum(needed) + _GAP * (len(columns) - 1) <= width


def _stacked(grid: Grid) -> list[RenderableType]:
    """Return a table's rows one below the other, each as labeled values: for a narrow terminal."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    width = max(map(len, grid.header))
    for row in grid.rows:
        fields = Table.grid(padding=(0, 2))
        fields.add_column(style="cyan", no_wrap=True, width=width)
        fields.add_column(overflow="fold")
        for name, cell in zip(grid.header, row, strict=True):
            if cell:
                fields.add_row(Text(name), Text(clean(cell)))
        parts.append(Padding(fields, (0 if not parts else 1, 0, 0, _INDENT)))
    return parts


def _renderables(section: Section, width: int, columns: int) -> list[RenderableType]:
    """Return a section as rich renderables, with labels of `width` on a terminal of `columns`."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(clean(section.title), style="bold yellow" if section.warns else "bold")]
    for label, value in section.fields:
        fields = Table.grid(padding=(0, 2))
        fields.add_column(style="cyan", no_wrap=True, width=width)
        fields.add_column(overflow="fold")
        is_wide = len(label) > width
        if is_wide:
            parts.append(Padding(Text(clean(label), style="cyan"), (0, 0, 0, _INDENT)))
        fields.add_row(Text("" if is_wide else clean(label)), Text(clean(value)))
        parts.append(Padding(fields, (0, 0, 0, _INDENT)))
    if section.grid and not _fits(section.grid, columns):
        parts += _stacked(section.grid)
    elif section.grid:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), header_style="cyan", pad_edge=False, show_edge=False)
        for name in section.grid.header:
            to_right = name in section.grid.numbers
            table.add_column(name, justify="right" if to_right else "left", no_wrap=to_right, overflow="fold")
        for row in section.grid.rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        parts.append(Padding(table, (0, 0, 0, 2)))
    parts += [Padding(Text(clean(line)), (0, 0, 0, 2)) for line in section.lines]
    return parts
