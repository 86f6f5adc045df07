"""Plans within other budgets as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.run.alternatives import THIS, Alternative
from ..io.units import data_size, duration, memory_size
from .sections import Grid, Section


def alternatives_section(found: Sequence[Alternative]) -> Section:
    """What people read of it."""
    gpu = any(one.vram for one in found)
    timed = any(one.time is not None for one in found)
    header = ["RAM", *(["VRAM"] if gpu else []), "read", "read again", *(["to the GPU"] if gpu else [])]
    header += [*(["about"] if timed else []), ""]
    rows = []
    for one in found:
        row = [memory_size(one.ram, up=not one.planned), *([memory_size(one.vram, up=not one.planned)] if gpu else [])]
        row += [data_size(one.bytes_read), data_size(one.bytes_reread) if one.bytes_reread else "nothing"]
        row += [data_size(one.bytes_uploaded)] if gpu else []
        row += [duration(one.time.seconds) if one.time is not None else ""] if timed else []
        rows.append((*row, THIS if one.planned else ""))
    grid = Grid(tuple(header), tuple(rows), frozenset(header[:-1]))
    best = [one for one in found if not one.bytes_reread]
    lines = []
    if best and min(one.ram for one in best) < max(one.ram for one in found):
        lines.append(f"More RAM than {memory_size(min(one.ram for one in best), up=True)} saves no reading.")
    return Section("With other budgets", grid=grid, lines=lines)
