"""The dry run as one HTML page that needs nothing else: no network, no script, nothing outside the file.

What is drawn is bounded: a plan of 100,000 tensors gives a page no larger than one of 1,000. Everything that comes from
recipes and files is escaped, and the page's own policy forbids scripts and requests besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from ...engine.graph.graph import Kind
from ...engine.run.alternatives import THIS
from ...engine.schedule.timeline import timeline
from ...engine.schedule.traffic import fixed_ram, output_names, pattern_of
from ...io.units import data_size, duration, listed, memory_size, plural
from ...version import __version__
from ..alternatives import alternatives_section
from ..plan import headline, plan_sections, time_section
from ..sections import Grid, Section
from .layer_map import Outside, StackMap, curves, weaves
from .svg import bands_chart, curve_chart, lanes_chart, memory_chart, text_of

if TYPE_CHECKING:
    from ...engine.cost.estimate import Estimate
    from ...engine.run.alternatives import Alternative
    from ...engine.run.destination import Destination
    from ...engine.run.plan import Plan

_MOMENTS = 240
_LARGEST = 12
_LINES = 60
_LETTERS = 600  # of a cell or a line
_RECIPE = 8000


def make_page(
    plan: Plan,
    *,
    destination: Destination | None = None,
    time: Estimate | None = None,
    others: Sequence[Alternative] = (),
) -> str:
    """The page.

    Args:
        plan: what is shown.
        destination: OUT, looked at.
        time: how long it takes.
        others: what it would do within other budgets.
    """
    title = headline(plan)
    sections = {section.title: section for section in plan_sections(plan) if section.title != title}
    parts = [_header(plan, title), _tiles(plan, destination, time)]
    parts += [section_html(sections.pop(name)) for name, section in list(sections.items()) if section.warns]
    if destination is not None and destination.problem is not None:
        parts.append(section_html(Section("Destination", lines=[str(destination.problem)], warns=True)))
    woven, outside = weaves(plan)
    parts += [_weave(weave, number, outside) for number, weave in enumerate(woven)]
    parts.append(_parameters(plan))
    parts.append(_memory(plan, sections.pop("Memory")))
    if time is not None:
        parts.append(_time(time))
    if others:
        parts.append(section_html(alternatives_section(others)))
    first = [name for name in ("Read more than once", "Inputs") if name in sections]
    parts += [section_html(sections.pop(name)) for name in first]
    parts.append(section_html(_largest(plan)))
    parts += [section_html(section) for section in sections.values()]
    parts.append(_recipe(plan))
    parts.append(f"<footer>Foretold by mergeloom {text_of(__version__)} from headers alone.</footer>")
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=text_of(title), generator=text_of(f"mergeloom {__version__}"), body="\n".join(filter(None, parts))
    )


# ------------------------------------------------------------------------------------------------ parts


def section_html(section: Section, before: str = "") -> str:
    """A section as it stands in the terminal's report, with a drawing before its words."""
    parts = [f"<h2>{text_of(section.title)}</h2>", before]
    if section.fields:
        rows = "".join(f"<dt>{text_of(label)}</dt><dd>{_cut(value)}</dd>" for label, value in section.fields)
        parts.append(f"<dl>{rows}</dl>")
    if section.grid is not None:
        parts.append(_table(section.grid))
    if section.lines:
        shown = "".join(f"<p>{_cut(line)}</p>" for line in section.lines[:_LINES])
        left = len(section.lines) - _LINES
        more = f"<p>and {left:,} more, which <code>mergeloom plan</code> lists</p>" if left > 0 else ""
        parts.append(f'<div class="lines">{shown}{more}</div>')
    kind = ' class="warns"' if section.warns else ""
    return f"<section{kind}>{''.join(parts)}</section>"


def _cut(words: str) -> str:
    return text_of(words if len(words) <= _LETTERS else f"{words[:_LETTERS]}…")


def _table(grid: Grid) -> str:
    def cell(tag: str, name: str, words: str) -> str:
        return f"<{tag}{' class=n' if name in grid.numbers else ''}>{_cut(words)}</{tag}>"

    header = "".join(cell("th", name, name) for name in grid.header)
    rows = "".join(
        f"<tr{' class=this' if row[-1] == THIS else ''}>"
        f"{''.join(cell('td', name, words) for name, words in zip(grid.header, row, strict=True))}</tr>"
        for row in grid.rows[:_LINES]
    )
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'


def _header(plan: Plan, title: str) -> str:
    source = plan.recipe.source
    where = f"The plan of {text_of(source)}." if source is not None else "A plan."
    return f"<header><h1>{text_of(title)}</h1><p>{where} Nothing has been merged yet.</p></header>"


def _tiles(plan: Plan, destination: Destination | None, time: Estimate | None) -> str:
    schedule, said = plan.schedule, plan.output_dict()
    budget = schedule.budget
    again = f"{data_size(schedule.bytes_reread)} of it again" if schedule.bytes_reread else "every byte once"
    tiles = [
        _tile("output", data_size(said["bytes"]), f"{plural(said['tensors'], 'tensor')}, {', '.join(said['dtypes'])}"),
        _tile("reads", data_size(plan.bytes_read), again),
        _tile("writes", data_size(plan.bytes_written), plural(said["shards"], "file")),
        _tile(
            "peak RAM",
            memory_size(schedule.peak_ram, up=True),
            f"of {memory_size(budget.ram)}; at least {memory_size(schedule.minimum_ram, up=True)} are needed",
            schedule.peak_ram / budget.ram,
        ),
    ]
    if plan.bytes_shared:
        tiles.insert(3, _tile("shares", data_size(plan.bytes_shared), "with the inputs: no disk taken"))
    if vram := max((device.vram or 0 for device in budget.devices), default=0):
        peak = memory_size(schedule.peak_vram, up=True)
        tiles.append(_tile("peak VRAM", peak, f"of {memory_size(vram)}", schedule.peak_vram / vram))
    if time is not None:
        span = f"between {duration(time.low)} and {duration(time.high)}"
        tiles.append(_tile("time, about", duration(time.seconds), span))
    if destination is not None:
        free = f"of {data_size(destination.free)} that are free"
        share = destination.needed / destination.free if destination.free else 1.0
        tiles.append(_tile("disk", data_size(destination.needed), free, share))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(label: str, value: str, note: str, share: float | None = None) -> str:
    meter = ""
    if share is not None:
        meter = f'<div class="meter"><i style="width:{100 * max(0.0, min(1.0, share)):.1f}%"></i></div>'
    return (
        f'<div class="tile"><div class="label">{text_of(label)}</div><div class="value">{text_of(value)}</div>{meter}'
        f'<div class="note">{text_of(note)}</div></div>'
    )


def _weave(weave: StackMap, number: int, outside: Sequence[Outside]) -> str:
    lines = []
    if number == 0:
        for each in outside:
            what = f"{listed(each.tensors)} ({data_size(each.nbytes)})"
            lines.append(f"Outside the layers: {what}, from {' and '.join(each.models)}.")
    rows = tuple(
        (
            weave.strips[band.strip].name,
            f"[{band.first}, {band.first + band.count})",
            f"[{band.out}, {band.out + band.count})",
        )
        for band in weave.bands
    )
    drawing = bands_chart(weave)
    if len(rows) > 1:
        table = _table(Grid(("layers of", "from", "become"), rows, frozenset(("from", "become"))))
        drawing += f"<details><summary>The {len(rows):,} bands as a table</summary>{table}</details>"
    return section_html(Section("What comes from where", lines=lines), drawing)


def _parameters(plan: Plan) -> str:
    found = curves(plan)
    if not found:
        return ""
    parts = []
    for curve in found:
        of = f" of {curve.model}" if curve.model else ""
        known = [value for value in curve.values if value is not None]
        span = f"{min(known):.4g} to {max(known):.4g}" if min(known) < max(known) else f"{known[0]:.4g}"
        said = f"<span>{text_of(span)}, for {_cut(listed(curve.tensors, 6))}</span>"
        parts.append(f"<h3>{text_of(f'{curve.parameter}{of}')} {said}</h3>{curve_chart(curve)}")
    words = '<p class="lead">What gradients and filters come to, from the first layer of the output to the last.</p>'
    return f"<section><h2>Parameters over the layers</h2>{words}{''.join(parts)}</section>"


def _memory(plan: Plan, section: Section) -> str:
    graph, schedule = plan.built.graph, plan.schedule
    moments = timeline(graph, schedule, _MOMENTS)
    if not moments:
        return section_html(section)
    names = output_names(graph)
    labels = [names[moment.node] for moment in moments]
    steps = len(schedule.steps)
    drawings = [
        "<h3>RAM</h3>",
        memory_chart(
            moments,
            labels,
            vram=False,
            own=fixed_ram(schedule),
            peak=schedule.peak_ram,
            budget=schedule.budget.ram,
            steps=steps,
        ),
    ]
    vram = max((device.vram or 0 for device in schedule.budget.devices), default=0)
    if vram:
        own = schedule.peak_vram - max(schedule.vram_slots) * schedule.slot_bytes
        drawings += [
            "<h3>VRAM</h3>",
            memory_chart(moments, labels, vram=True, own=own, peak=schedule.peak_vram, budget=vram, steps=steps),
        ]
    key = (
        '<div class="key"><span><i class="own-key"></i>the program and its workspaces</span>'
        '<span><i class="held-key"></i>inputs and outputs that the step holds</span>'
        '<span><i class="ahead-key"></i>what is read ahead of it, at the most</span></div>'
    )
    fields = [field for field in section.fields if field[0] != "over time"]
    return section_html(Section(section.title, fields), f"{''.join(drawings)}{key}")


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
    shown = text if len(text) <= _RECIPE else f"{text[:_RECIPE]}\n..."
    return f"<section><h2>The recipe</h2><pre>{text_of(shown)}</pre></section>"


def _largest(plan: Plan) -> Section:
    """The largest output tensors; those whose names differ only in their numbers are one line."""
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
    header = ("tensor", "how many", "shape", "dtype", "each", "together", "made by", "passes")
    numbers = frozenset(("how many", "shape", "each", "together", "passes"))
    left = len(order) - len(rows)
    return Section("Largest tensors", grid=Grid(header, rows, numbers), lines=[f"and {left:,} kinds more"] * (left > 0))
