"""The comparison of two models as a self-contained HTML page: heat maps and tables, without scripts and requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ...io.units import data_size, plural
from ...version import __version__
from ..diff import headline, kinds_section, layers_section, measures, unpaired_sections
from ..sections import Section
from .heat_map import Scale, draw_heat_map, heat_key, heat_maps
from .origin import Origin
from .page import fill_template, header_html, origin_rows, section_html, tile
from .svg import text_of

if TYPE_CHECKING:
    from ...engine.run.diff.result import Diff

_MAX_TABLE = 60  # rows of a table


def make_diff_page(diff: Diff, origin: Origin | None = None) -> str:
    """Return the page as HTML.

    Args:
        diff: comparison of two models.
        origin: command, machine and date; None to leave them out.
    """
    return fill_template(headline(diff), "\n".join(_parts(diff, origin)))


def _parts(diff: Diff, origin: Origin | None) -> Iterator[str]:
    """Yield the parts of the page from top to bottom."""
    yield header_html(headline(diff), "", origin_rows(origin))
    yield _tiles(diff)
    if diff.warnings:
        yield section_html(Section("Warnings", lines=diff.warnings, warns=True))
    maps = heat_maps(diff)
    scale = Scale.of(maps)
    for heat_map in maps:
        omitted = [f"and {plural(heat_map.omitted, 'more kind', 'more kinds')} of tensors"] if heat_map.omitted else []
        title = f"Relative distance: {heat_map.stack or 'outside the layers'}"
        yield section_html(Section(title, lines=omitted), draw_heat_map(heat_map, scale) + heat_key(scale))
    for section in (layers_section(diff), kinds_section(diff), *unpaired_sections(diff)):
        if section.lines or (section.grid is not None and section.grid.rows):
            yield section_html(_bounded(section))
    yield f"<footer>Compared by mergeloom {text_of(__version__)}.</footer>"


def _bounded(section: Section) -> Section:
    """Return a section whose table has at most `_MAX_TABLE` rows."""
    grid = section.grid
    if grid is None or len(grid.rows) <= _MAX_TABLE:
        return section
    more = f"and {len(grid.rows) - _MAX_TABLE:,} more (mergeloom diff lists all)"
    return replace(section, grid=replace(grid, rows=grid.rows[:_MAX_TABLE]), lines=[*section.lines, more])


def _tiles(diff: Diff) -> str:
    total = diff.total
    distance, cosine, equal = measures(total)
    tiles = [
        tile("relative distance", distance, "||A - B|| / ||A||"),
        tile("cosine", cosine, "of all compared elements"),
        tile("equal", equal, f"of {total.elements:,} elements"),
        tile("tensors", f"{len(diff.tensors):,}", f"{data_size(diff.bytes_read)} read"),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'
