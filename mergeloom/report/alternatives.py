"""The comparisons of a plan with other memory budgets, and with other formats of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.run.alternatives import THIS, Alternative
from ..io.units import data_size, duration, memory_size
from .sections import Grid, Section

if TYPE_CHECKING:
    from ..engine.run.plan import Plan


def alternatives_section(alternatives: Sequence[Alternative]) -> Section:
    """Compare budgets, one per row: bytes read, re-reads, uploads and estimated time."""
    gpu = any(one.vram for one in alternatives)
    timed = any(one.time is not None for one in alternatives)
    header = ["RAM", *(["VRAM"] if gpu else []), "read", "re-reads", *(["to the GPU"] if gpu else [])]
    header += [*(["time"] if timed else []), ""]
    rows = []
    for one in alternatives:
        row = [memory_size(one.ram, up=not one.planned), *([memory_size(one.vram, up=not one.planned)] if gpu else [])]
        row += [data_size(one.bytes_read), data_size(one.bytes_reread) if one.bytes_reread else "none"]
        row += [data_size(one.bytes_uploaded)] if gpu else []
        row += [duration(one.time.seconds) if one.time is not None else ""] if timed else []
        rows.append((*row, THIS if one.planned else ""))
    grid = Grid(tuple(header), tuple(rows), frozenset(header[:-1]))
    enough = [one.ram for one in alternatives if not one.bytes_reread]
    lines = []
    if enough and min(enough) < max(one.ram for one in alternatives):
        lines.append(f"More RAM than {memory_size(min(enough), up=True)} saves no reading.")
    return Section("With other budgets", grid=grid, lines=lines)


def formats_section(plan: Plan) -> Section | None:
    """Compare the sizes of an output with quantized tensors by `out_dtype`, one per row; None if it has none."""
    sizes = plan.output_sizes
    if sizes is None:
        return None
    written = plan.output_dict()["bytes"]
    rows = [("bfloat16", "", sizes.bfloat16)]
    if sizes.fp8_blocks and sizes.fp8_blocks != sizes.as_stored:
        rows.insert(0, ("fp8_blocks", "", sizes.fp8_blocks))
    if sizes.format:
        note = sizes.format if sizes.writable else f"{sizes.format}, which can only be copied"
        rows.insert(0, ("same", note, sizes.as_stored))
    cells = [(name, data_size(size), note, THIS if size == written else "") for name, note, size in rows]
    grid = Grid(("out_dtype", "size", "format", ""), tuple(cells), frozenset({"size"}))
    return Section("Output in other formats", grid=grid)
