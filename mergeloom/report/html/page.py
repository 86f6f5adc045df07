"""The dry run as a self-contained HTML page: no network, no script, no other files.

The page's size is bounded: a plan of 100,000 tensors makes a page no larger than one of 1,000. All text from recipes
and files is escaped, and the page's content security policy also forbids scripts and requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from ...engine.graph.graph import Kind
from ...engine.run.alternatives import THIS
from ...engine.schedule.timeline import timeline
from ...engine.schedule.traffic import bytes_of_reads, fixed_ram, pattern_of
from ...io.units import data_size, duration, listed, memory_size, plural
from ...version import __version__
from ..alternatives import alternatives_section, formats_section
from ..parameters import parameters_section
from ..plan import (
    headline,
    inputs_section,
    memory_section,
    output_section,
    reads_text,
    renamed_section,
    reread_section,
    tensors_text,
    warnings_section,
    work_section,
)
from ..sections import Grid, Section
from ..tensors.vocabulary import vocabulary_section
from ..time import time_section
from ..unused import unused_section
from .charts import MemoryCurve, curve_chart, lanes_chart, memory_chart
from .layer_map import NonLayerTensors, StackMap, curves, stack_maps
from .origin import Origin, other_machine
from .stack_chart import letter, stack_chart
from .svg import text_of

if TYPE_CHECKING:
    from ...engine.cost.estimate import Estimate
    from ...engine.run.alternatives import Alternative
    from ...engine.run.destination import Destination
    from ...engine.run.plan import Plan

_MOMENTS = 240  # points of a memory chart
_LARGEST = 12  # rows of the table of largest tensors
_MAX_LINES = 60  # rows of a table, or lines of a section
_MAX_TEXT = 600  # characters of a cell or a line
_MAX_RECIPE = 8000  # characters


def make_page(
    plan: Plan,
    *,
    destination: Destination | None = None,
    time: Estimate | None = None,
    others: Sequence[Alternative] = (),
    origin: Origin | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        plan: plan of the merge.
        destination: state of OUT.
        time: estimated time.
        others: the same merge within other budgets.
        origin: command, machine and date; None to leave them out.
    """
    body = "\n".join(filter(None, page_parts(plan, destination, time, others, origin)))
    return fill_template(headline(plan), body)


def fill_template(title: str, body: str) -> str:
    """Return a complete page with a title and a body of HTML."""
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=text_of(title), generator=text_of(f"mergeloom {__version__}"), body=body)


def page_parts(
    plan: Plan,
    destination: Destination | None = None,
    time: Estimate | None = None,
    others: Sequence[Alternative] = (),
    origin: Origin | None = None,
) -> Iterator[str]:
    """Yield the parts of the page from top to bottom, for the arguments of `make_page`; empty parts have no content."""
    yield _header(plan, headline(plan), origin)
    read = bytes_of_reads(plan.built.graph, plan.schedule)
    yield _tiles(plan, destination, time)
    yield _optional(warnings_section(plan))
    if destination is not None and destination.problem is not None:
        yield section_html(Section("Destination", lines=[str(destination.problem)], warns=True))
    stacks, non_layer_tensors = stack_maps(plan)
    for number, stack in enumerate(stacks):
        yield _layer_map(stack, non_layer_tensors if number == 0 else ())
    yield _parameters(plan)
    yield _optional(parameters_section(plan))
    yield _memory(plan)
    if time is not None:
        yield _time(time)
    if others:
        yield section_html(alternatives_section(others))
    yield _optional(reread_section(plan, read))
    yield section_html(inputs_section(plan, read))
    yield _optional(renamed_section(plan))
    yield section_html(_largest(plan))
    yield section_html(output_section(plan))
    yield _optional(formats_section(plan))
    yield _optional(vocabulary_section(plan))
    yield section_html(work_section(plan))
    yield _optional(unused_section(plan))
    yield _recipe(plan)
    yield f"<footer>Planned by mergeloom {text_of(__version__)} from headers only.</footer>"


def _optional(section: Section | None) -> str:
    return section_html(section) if section is not None else ""


# ------------------------------------------------------------------------------------------------ parts


def section_html(section: Section, before: str = "") -> str:
    """Return a section of the terminal report as HTML, with a drawing above its text."""
    parts = [f"<h2>{text_of(section.title)}</h2>", before]
    if section.fields:
        rows = "".join(f"<dt>{text_of(label)}</dt><dd>{_cut(value)}</dd>" for label, value in section.fields)
        parts.append(f"<dl>{rows}</dl>")
    if section.grid is not None:
        parts.append(_table(section.grid))
    if section.lines:
        shown = "".join(f"<p>{_cut(line)}</p>" for line in section.lines[:_MAX_LINES])
        left = len(section.lines) - _MAX_LINES
        more = f"<p>and {left:,} more; <code>mergeloom plan</code> lists all</p>" if left > 0 else ""
        parts.append(f'<div class="lines">{shown}{more}</div>')
    kind = ' class="warns"' if section.warns else ""
    return f"<section{kind}>{''.join(parts)}</section>"


def _cut(text: str) -> str:
    return text_of(text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…")


def _table(grid: Grid) -> str:
    def cell(tag: str, name: str, text: str) -> str:
        label = f' data-label="{text_of(name)}"' if tag == "td" else ""  # shown where the table is too narrow
        return f"<{tag}{' class=n' if name in grid.numbers else ''}{label}>{_cut(text)}</{tag}>"

    header = "".join(cell("th", name, name) for name in grid.header)
    rows = "".join(
        f"<tr{' class=this' if row[-1] == THIS else ''}>"
        f"{''.join(cell('td', name, text) for name, text in zip(grid.header, row, strict=True))}</tr>"
        for row in grid.rows[:_MAX_LINES]
    )
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'


def _header(plan: Plan, title: str, origin: Origin | None) -> str:
    source = plan.recipe.source
    where = f"Plan of {text_of(source)}." if source is not None else "Plan."
    rows = origin_rows(origin)
    if plan.options.machine is not None:
        rows.insert(1 if rows else 0, ("planned for", text_of(other_machine(plan.options.machine))))
    return header_html(title, f"<p>{where} Nothing has been merged yet.</p>", rows)


def origin_rows(origin: Origin | None) -> list[tuple[str, str]]:
    """Return the labels and values, as HTML, that say where a page comes from."""
    if origin is None:
        return []
    command = f"<code>{_cut(origin.command)}</code>"
    return [("command", command), ("machine", text_of(origin.machine)), ("date", text_of(origin.date))]


def header_html(title: str, lead: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return the header of a page: its title, a lead and labeled values; lead and values are HTML."""
    facts = f"<dl>{''.join(f'<dt>{label}</dt><dd>{value}</dd>' for label, value in rows)}</dl>" if rows else ""
    return f"<header><h1>{text_of(title)}</h1>{lead}{facts}</header>"


def _tiles(plan: Plan, destination: Destination | None, time: Estimate | None) -> str:
    schedule, output = plan.schedule, plan.output_dict()
    budget, dtypes = schedule.budget, ", ".join(plan.output_formats())
    tiles = [
        tile(
            "output",
            data_size(output["bytes"]),
            f"{tensors_text(output)}, {dtypes}",
        ),
        tile("reads", data_size(plan.bytes_read), reads_text(plan)),
        tile("writes", data_size(plan.bytes_written), plural(output["shards"], "file")),
        tile(
            "peak RAM",
            memory_size(schedule.peak_ram, up=True),
            f"of {memory_size(budget.ram)}; minimum {memory_size(schedule.minimum_ram, up=True)}",
            schedule.peak_ram / budget.ram,
        ),
    ]
    if plan.bytes_shared:
        tiles.insert(3, tile("reflinked", data_size(plan.bytes_shared), "no disk space"))
    if vram := max((device.vram or 0 for device in budget.devices), default=0):
        peak = memory_size(schedule.peak_vram, up=True)
        tiles.append(tile("peak VRAM", peak, f"of {memory_size(vram)}", schedule.peak_vram / vram))
    if time is not None:
        span = f"{duration(time.low)} to {duration(time.high)}"
        tiles.append(tile("estimated time", duration(time.seconds), span))
    if destination is not None:
        free = f"of {data_size(destination.free)} free"
        share = destination.needed / destination.free if destination.free else 1.0
        tiles.append(tile("disk", data_size(destination.needed), free, share))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def tile(label: str, value: str, note: str, share: float | None = None) -> str:
    """Return a large value with a label and a note, and a meter of its `share` of a limit."""
    meter = ""
    if share is not None:
        meter = f'<div class="meter"><i style="width:{100 * max(0.0, min(1.0, share)):.1f}%"></i></div>'
    return (
        f'<div class="tile"><div class="label">{text_of(label)}</div><div class="value">{text_of(value)}</div>{meter}'
        f'<div class="note">{text_of(note)}</div></div>'
    )


def _layer_map(stack: StackMap, non_layer_tensors: Sequence[NonLayerTensors]) -> str:
    lines = []
    for group in non_layer_tensors:
        tensors = f"{listed(group.tensors)} ({data_size(group.nbytes)})"
        lines.append(f"Outside the layers: {tensors}, from {' and '.join(group.models)}.")
    several = len(stack.inputs) > 1
    rows = tuple(
        (
            f"{letter(run.input)} {stack.inputs[run.input].name}" if several else stack.inputs[run.input].name,
            f"[{run.first}, {run.first + run.count})",
            f"[{run.out}, {run.out + run.count})",
        )
        for run in stack.runs
    )
    drawing = stack_chart(stack)
    if len(rows) > 1:
        header = ("model", "input layers", "output layers")
        table = _table(Grid(header, rows, frozenset(header[1:])))
        drawing += f"<details><summary>Table of {len(rows):,} layer ranges</summary>{table}</details>"
    return section_html(Section("Layer map", lines=lines), drawing)


def _parameters(plan: Plan) -> str:
    found = curves(plan)
    if not found:
        return ""
    parts = []
    for curve in found:
        of = f" of {curve.model}" if curve.model else ""
        known = [value for value in curve.values if value is not None]
        span = f"{min(known):.4g} to {max(known):.4g}" if min(known) < max(known) else f"{known[0]:.4g}"
        detail = f"<span>{text_of(span)}, for {_cut(listed(curve.tensors, 6))}</span>"
        parts.append(f"<h3>{text_of(f'{curve.parameter}{of}')} {detail}</h3>{curve_chart(curve)}")
    lead = '<p class="lead">Values after gradients and filters, from the first output layer to the last.</p>'
    return f"<section><h2>Parameters by layer</h2>{lead}{''.join(parts)}</section>"


def _memory(plan: Plan) -> str:
    section = memory_section(plan, timelines=False)
    graph, schedule = plan.built.graph, plan.schedule
    moments = timeline(graph, schedule, _MOMENTS)
    if not moments:
        return section_html(section)
    names = graph.node_names()
    labels = [names[moment.node] for moment in moments]
    vram = max((device.vram or 0 for device in schedule.budget.devices), default=0)
    ram = MemoryCurve(
        "RAM",
        moments,
        labels,
        [moment.ram for moment in moments],
        fixed=fixed_ram(schedule),
        peak=schedule.peak_ram,
        budget=schedule.budget.ram,
        steps=len(schedule.steps),
    )
    charts = ["<h3>RAM</h3>", memory_chart(ram)]
    if vram:
        fixed = schedule.peak_vram - max(schedule.vram_slots) * schedule.slot_bytes
        held = [moment.vram for moment in moments]
        curve = replace(ram, kind="VRAM", held=held, fixed=fixed, peak=schedule.peak_vram, budget=vram)
        charts += ["<h3>VRAM</h3>", memory_chart(curve)]
    key = (
        '<div class="key"><span><i class="own-key"></i>process and workspaces</span>'
        '<span><i class="held-key"></i>working set of the step</span>'
        '<span><i class="ahead-key"></i>read-ahead (maximum)</span></div>'
    )
    lead = '<p class="lead">Memory held by each step. All columns stand for the same number of bytes moved.</p>'
    return section_html(section, f"{lead}{''.join(charts)}{key}")


def _time(time: Estimate) -> str:
    lanes = [
        (
            lane.name,
            lane.seconds,
            f"{duration(lane.seconds)}: {data_size(lane.nbytes)} at {lane.rate.text}, {lane.rate.origin}",
        )
        for lane in time.lanes
    ]
    section = time_section(time)
    return section_html(Section(section.title, section.fields, lines=section.lines), lanes_chart(lanes))


def _recipe(plan: Plan) -> str:
    text = plan.recipe.text.strip()
    if not text:
        return ""
    shown = text if len(text) <= _MAX_RECIPE else f"{text[:_MAX_RECIPE]}\n..."
    return f"<section><h2>Recipe</h2><pre>{text_of(shown)}</pre></section>"


def _largest(plan: Plan) -> Section:
    """List the largest output tensors; tensors whose names differ only in their numbers share a row."""
    graph = plan.built.graph
    groups: dict[tuple[str, int, str, str], list[int]] = {}
    shapes: dict[tuple[str, int, str, str], Iterable[int]] = {}
    for output in graph.outputs:
        operation = graph.operation(output.node)
        how = operation.method if operation.kind is Kind.MERGE else "copied"
        key = (pattern_of(output.name), graph.nbytes(output.node), graph.node_dtype[output.node].name, how)
        group = groups.setdefault(key, [0, 0])
        group[0] += 1
        group[1] = max(group[1], operation.passes)
        shapes.setdefault(key, graph.shape(output.node))
    order = sorted(groups, key=lambda key: (-key[1], key[0]))
    rows = tuple(
        (
            key[0],
            f"{groups[key][0]:,}",
            " x ".join(f"{size:,}" for size in shapes[key]),
            key[2],
            data_size(key[1]),
            data_size(key[1] * groups[key][0]),
            key[3],
            str(groups[key][1]),
        )
        for key in order[:_LARGEST]
    )
    header = ("tensor", "count", "shape", "dtype", "size", "total", "method", "passes")
    numbers = frozenset(("count", "shape", "size", "total", "passes"))
    left = len(order) - len(rows)
    return Section("Largest tensors", grid=Grid(header, rows, numbers), lines=[f"and {left:,} more"] * (left > 0))
