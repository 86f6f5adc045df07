"""The schedule step by step, as `plan --steps` prints it: a table, or JSON with one step per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..engine.schedule.steps import StepRow, step_rows
from ..io.units import clean, data_size, memory_size

if TYPE_CHECKING:
    from ..engine.run.plan import Plan

_TEXT_COLUMNS = ("tensor", "device")


def json_lines(plan: Plan) -> Iterator[str]:
    """Yield the steps as the lines of a JSON list."""
    yield "["
    previous = ""
    for row in step_rows(plan.built.graph, plan.schedule):
        if previous:
            yield f"{previous},"
        previous = json.dumps(asdict(row))
    if previous:
        yield previous
    yield "]"


def plain_lines(plan: Plan) -> Iterator[str]:
    """Yield the steps as the lines of a table. The steps are generated twice, since there can be a million of them."""
    gpu = any(device.vram is not None for device in plan.schedule.budget.devices)
    header = _header(gpu)
    widths = [len(name) for name in header]
    for cells in _rows(plan, gpu):
        widths = [max(width, len(cell)) for width, cell in zip(widths, cells, strict=True)]
    yield _line(header, header, widths)
    for cells in _rows(plan, gpu):
        yield _line(header, cells, widths)


def _header(gpu: bool) -> tuple[str, ...]:
    ram = ("step", "tensor", "pass", "device", "read", "kept", "dropped", "RAM")
    return (*ram, "uploaded", "kept in VRAM", "dropped from VRAM", "VRAM") if gpu else ram


def _rows(plan: Plan, gpu: bool) -> Iterator[tuple[str, ...]]:
    slot = plan.schedule.slot_bytes
    for row in step_rows(plan.built.graph, plan.schedule):
        yield (*_ram_cells(row, slot), *_vram_cells(row, slot)) if gpu else _ram_cells(row, slot)


def _ram_cells(row: StepRow, slot: int) -> tuple[str, ...]:
    return (
        f"{row.step:,}",
        clean(row.tensor),
        f"{row.index}/{row.passes}",
        row.device,
        data_size(sum(source.nbytes for source in row.read)),
        f"{sum(source.ram for source in row.kept):,}",
        f"{sum(source.ram for source in row.dropped):,}",
        memory_size(row.ram * slot),
    )


def _vram_cells(row: StepRow, slot: int) -> tuple[str, ...]:
    return (
        data_size(row.uploaded),
        f"{sum(source.vram for source in row.kept):,}",
        f"{sum(source.vram for source in row.dropped):,}",
        memory_size(row.vram * slot),
    )


def _line(header: tuple[str, ...], cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(
        cell.ljust(width) if name in _TEXT_COLUMNS else cell.rjust(width)
        for name, cell, width in zip(header, cells, widths, strict=True)
    ).rstrip()
