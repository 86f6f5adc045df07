"""`mergeloom plan`: the dry run. Only click is imported at the top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .mergekit import MergeCommand, mergekit_notes
from .options import make_options, planning_options, recipe_path
from .output import print_json, print_message

if TYPE_CHECKING:
    from ..engine.cost.estimate import Estimate
    from ..engine.run.plan import Plan
    from ..report.dry_run import DryRun
    from .target_files import TargetFile


@click.command(cls=MergeCommand)
@click.argument("recipe", type=recipe_path)
@click.argument("out", type=click.Path(), required=False)
@planning_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--html", type=click.Path(), help="Also write the plan to this file as a self-contained HTML page.")
@click.option("--explain", metavar="TENSOR", help="Show only how this output tensor is made.")
@click.option("--steps", is_flag=True, help="Show only the schedule, step by step.")
@click.option("--graph", type=click.Path(), help="Also write the task graph to this .graphml or .json file.")
@click.option(
    "--graph-detail",
    type=click.Choice(["layer", "tensor"]),
    default="layer",
    show_default=True,
    help="Group the nodes of --graph by layer, or keep one for each tensor.",
)
@click.option("--time", "timed", is_flag=True, help="Measure disks, memory and methods, and estimate the time.")
@click.option("--rates", help="Estimate the time from rates, such as disk_read=6GB/s,h2d=25GB/s.")
@click.option("--for", "machine", metavar="MACHINE", help="Plan for another machine: ram=64GiB,vram=24GiB,cores=16.")
@click.option("--what-if", is_flag=True, help="Compare with other RAM and VRAM budgets.")
def plan(
    recipe: Path,
    out: str | None,
    as_json: bool,
    html: str | None,
    explain: str | None,
    steps: bool,
    graph: str | None,
    graph_detail: Literal["layer", "tensor"],
    timed: bool,
    rates: str | None,
    machine: str | None,
    what_if: bool,
    **options: Any,
) -> None:
    """Dry run: show what a merge would do, need and produce.

    Reads only the recipe and the models' headers, and writes nothing. With OUT, it also checks that OUT can be written
    and fits its disk, and finds out what the file system can reflink instead of copying. Only --time reads tensor data
    and writes an unnamed file to OUT's file system, for about a second.
    """
    from .target_files import TargetFile

    _check_exclusive(
        {"--explain": explain is not None, "--steps": steps},
        {"--html": html is not None, "--what-if": what_if, "--time": timed, "--rates": rates is not None},
    )
    page = TargetFile("--html", html) if html is not None else None
    graph_format, graph_file = (_graph_format(graph), TargetFile("--graph", graph)) if graph else (None, None)
    from ..engine.cost.estimate import parse_rates

    for note in mergekit_notes():
        print_message(note)
    known_rates = parse_rates(rates) if rates is not None else {}
    planned = _make_plan(recipe, out, machine, options)
    if graph_file is not None and graph_format is not None:
        from ..engine.graph.exports.export import export_graph

        graph_file.write(export_graph(planned.built.graph, graph_format, graph_detail))
    if explain is not None:
        _print_explanation(planned, explain, as_json)
    elif steps:
        _print_steps(planned, as_json)
    else:
        time = _estimate(planned, out, known_rates, timed) if timed or known_rates else None
        _print_dry_run(_dry_run(planned, out, time, what_if), page, as_json)


def show_plan(recipe: Path, out: str | None, options: Mapping[str, Any]) -> None:
    """Print the plan of a merge, for ``mergeloom merge --dry-run``. Raises the error that the merge would raise."""
    _print_dry_run(_dry_run(_make_plan(recipe, out, None, options), out, None, False), None, False)


def _check_exclusive(instead: Mapping[str, bool], parts: Mapping[str, bool]) -> None:
    """Raise click.UsageError for options that would have no effect.

    Args:
        instead: options that show something instead of the plan, and whether each is given.
        parts: options that add something to the plan or write it.
    """
    given = [name for name, is_given in instead.items() if is_given]
    if given:
        given += [name for name, is_given in parts.items() if is_given]
    if len(given) > 1:
        raise click.UsageError(f"{given[0]} and {given[1]} are mutually exclusive")


def _graph_format(path: str) -> Literal["graphml", "json"]:
    """Return the format of the graph file that its suffix names."""
    suffix = Path(path).suffix.lower()
    if suffix == ".graphml":
        return "graphml"
    if suffix == ".json":
        return "json"
    raise click.UsageError(f"--graph {path}: unknown suffix {suffix!r}: use .graphml or .json")


def _make_plan(recipe: Path, out: str | None, machine: str | None, options: Mapping[str, Any]) -> Plan:
    from ..engine.cost.machine import parse_machine
    from ..engine.run.planning import plan as make_plan
    from ..report.sections import load_rich

    chosen = make_options({**options, "machine": parse_machine(machine) if machine is not None else None})
    load_rich()
    planned = make_plan(recipe, chosen)
    if out is None:
        return planned
    from ..engine.run.placement import with_reflinks

    return with_reflinks(planned, Path(out))


def _print_explanation(planned: Plan, tensor: str, as_json: bool) -> None:
    from ..report.explain import explain, explanation_sections
    from ..report.sections import show

    explanation = explain(planned, tensor)
    if as_json:
        print_json(explanation.to_dict())
    else:
        show(explanation_sections(explanation))


def _print_steps(planned: Plan, as_json: bool) -> None:
    from ..report.steps import json_lines, plain_lines

    for line in (json_lines if as_json else plain_lines)(planned):
        click.echo(line)


def _estimate(planned: Plan, out: str | None, known_rates: Mapping[str, float], timed: bool) -> Estimate:
    """Estimate the time from the known rates, with measured or assumed values for the others."""
    from ..engine.cost.estimate import assumed_rates, estimate, with_given

    if not timed:
        return estimate(planned.workload, with_given(assumed_rates(planned.workload), known_rates))
    from ..engine.cost.measure_disk import measured_rates

    rates = measured_rates(planned.workload, None if out is None else Path(out), known_rates)
    return estimate(planned.workload, rates)


def _dry_run(planned: Plan, out: str | None, time: Estimate | None, what_if: bool) -> DryRun:
    from ..engine.run.alternatives import alternatives
    from ..report.dry_run import DryRun

    destination = None
    if out is not None:
        from ..engine.run.destination import look_at

        destination = look_at(planned, Path(out))
    others = alternatives(planned, time.rates if time is not None else None) if what_if else []
    return DryRun(planned, destination, time, tuple(others))


def _print_dry_run(dry_run: DryRun, page: TargetFile | None, as_json: bool) -> None:
    """Print the dry run and write its page. Raises the error that a merge into OUT would raise, after printing."""
    from ..report.sections import show

    if page is not None:
        from ..report.html.origin import find_origin
        from ..report.html.page import make_page

        origin = find_origin(click.get_current_context().obj or ())  # `main` passes the arguments
        page.write(
            make_page(
                dry_run.plan,
                destination=dry_run.destination,
                time=dry_run.time,
                others=dry_run.others,
                origin=origin,
            )
        )
    if as_json:
        print_json(dry_run.to_dict())
    else:
        show(dry_run.sections())
    if dry_run.destination is not None and dry_run.destination.problem is not None:
        raise dry_run.destination.problem
