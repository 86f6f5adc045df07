"""The command line. Only click is imported at the top, so that help is there at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import BudgetError, UsageError
from ..version import __version__
from .stack import stack
from .verify import verify

if TYPE_CHECKING:
    from ..engine.cost.estimate import Estimate
    from ..engine.run.merge import Result
    from ..engine.run.plan import Options, Plan
    from ..io.hub.repository import HubFile
    from ..methods.kernel.contract import Method
    from ..report.dry_run import DryRun

PIPE_CLOSED = 141
"""As the shell has it for a process that SIGPIPE ended."""

METHODS = "Merge methods of your own, from a Python file; may be repeated."

F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES = """\
Exit codes: 0 done; 1 a bug of ours; 2 the recipe or the command line is wrong; 3 it does not fit the budget or the \
disk; 4 an input is damaged, missing or inconsistent; 5 the device, the disk or another process got in the way, try \
again; 130 interrupted."""


def size(text: str) -> int:
    """The type of an option that takes a size such as 32GiB: bytes, or a usage error."""
    from ..io.sizes import parse_size

    try:
        return parse_size(text)
    except UsageError as error:
        raise click.BadParameter(str(error)) from error


def planning_options(command: F) -> F:
    """The options that `plan` and `merge` share."""
    for option in reversed(
        (
            click.option("--max-ram", type=size, help="Hold at most this much memory, such as 32GiB.  [default: 70%]"),
            click.option("--max-vram", type=size, help="Hold at most this much on each GPU.  [default: 85%]"),
            click.option(
                "--device",
                default="auto",
                show_default=True,
                shell_complete=lambda *given: [name for name in ("auto", "cpu", "cuda") if name.startswith(given[-1])],
                help="What computes: auto, cpu, cuda (all GPUs), cuda:1, or cuda:0,cuda:1.",
            ),
            click.option("--seed", type=int, default=0, show_default=True, help="Of the random methods."),
            click.option("--shard-size", type=size, default="5GB", show_default=True, help="The most of one file."),
            click.option("--threads", type=click.IntRange(1), help="Compute threads of the CPU.  [default: all cores]"),
            click.option("--strict", is_flag=True, help="Make unknown keys and parameters in the recipe errors."),
            click.option("--methods", multiple=True, type=click.Path(), metavar="FILE", help=METHODS),
        )
    ):
        command = option(command)
    return command


class Commands(click.Group):
    """The commands. A reader that has gone is no bug, and click would end with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the context names."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise click.exceptions.Exit(PIPE_CLOSED) from None


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EXIT_CODES
)
@click.version_option(__version__, prog_name="mergeloom")
def cli() -> None:
    """Merge model checkpoints within a memory budget.

    A RECIPE is a mergekit YAML configuration. Sizes take B, KB, MB, GB, TB and KiB to TiB.
    """


cli.add_command(stack)
cli.add_command(verify)


@cli.command()
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path(), required=False)
@planning_options
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.option("--html", type=click.Path(), help="Write it as a page, too: one file that needs no network.")
@click.option("--explain", metavar="TENSOR", help="Say how this output tensor is made, and nothing else.")
@click.option("--time", "timed", is_flag=True, help="Measure disks, memory and methods, and estimate the time.")
@click.option("--rates", help="Estimate the time from rates, such as disk_read=6GB/s,h2d=25GB/s.")
@click.option("--for", "machine", metavar="MACHINE", help="Plan for another machine: ram=64GiB,vram=24GiB,cores=16.")
@click.option("--what-if", is_flag=True, help="Show what other budgets would change.")
def plan(
    recipe: str,
    out: str | None,
    as_json: bool,
    html: str | None,
    explain: str | None,
    timed: bool,
    rates: str | None,
    machine: str | None,
    what_if: bool,
    **options: Any,
) -> None:
    """Say what a merge would do, need and produce: a dry run.

    Reads the recipe and the models' headers only, and writes nothing. With OUT, it also says whether OUT can be written
    and its disk has room, and what the file system can share instead of copying. Only --time reads more, and writes a
    file without a name in OUT's file system, for about a second in all.
    """
    from .target_files import TargetFile

    page = TargetFile("--html", html) if html is not None else None
    from ..engine.cost.estimate import parse_rates
    from ..engine.cost.machine import parse_machine
    from ..engine.run.planning import plan as make_plan
    from ..report.sections import load_rich, show

    given = parse_rates(rates) if rates is not None else {}
    chosen = _options({**options, "machine": parse_machine(machine) if machine is not None else None})
    load_rich()
    planned = make_plan(recipe, chosen)
    if out is not None:
        from ..engine.run.placement import with_reflinks

        planned = with_reflinks(planned, Path(out))
    if explain is not None:
        _explain(planned, explain, as_json)
        return
    time = _estimate(planned, out, given, timed) if timed or given else None
    dry_run = _dry_run(planned, out, time, what_if)
    if page is not None:
        from ..report.html.page import make_page

        page.write(make_page(planned, destination=dry_run.destination, time=time, others=dry_run.others))
    if as_json:
        _print_json(dry_run.to_dict())
    else:
        show(dry_run.sections())
    if dry_run.destination is not None and dry_run.destination.problem is not None:
        raise dry_run.destination.problem


def _explain(planned: Plan, tensor: str, as_json: bool) -> None:
    from ..report.explain import explain, explanation_sections
    from ..report.sections import show

    found = explain(planned, tensor)
    if as_json:
        _print_json(found.to_dict())
    else:
        show(explanation_sections(found))


def _estimate(planned: Plan, out: str | None, given: Mapping[str, float], timed: bool) -> Estimate:
    from ..engine.cost.estimate import assumed_rates, estimate, with_given

    if not timed:
        return estimate(planned.workload, with_given(assumed_rates(planned.workload), given))
    from ..engine.cost.measure_disk import measured_rates

    return estimate(planned.workload, measured_rates(planned.workload, None if out is None else Path(out), given))


def _dry_run(planned: Plan, out: str | None, time: Estimate | None, what_if: bool) -> DryRun:
    from ..engine.run.alternatives import alternatives
    from ..report.dry_run import DryRun

    destination = None
    if out is not None:
        from ..engine.run.destination import look_at

        destination = look_at(planned, Path(out))
    others = alternatives(planned, time.rates if time is not None else None) if what_if else []
    return DryRun(planned, destination, time, tuple(others))


@cli.command()
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path(), required=False)
@planning_options
@click.option("--report", type=click.Path(), help="Write what was foretold and measured, as JSON.")
@click.option("--fresh", is_flag=True, help="Discard an unfinished merge in OUT, and begin anew.")
@click.option("--discard", is_flag=True, help="Rehearse: do all of it, and write nothing.")
@click.option(
    "--digests",
    type=click.Choice(["written", "full"]),
    default="written",
    show_default=True,
    help="Of which tensors to note digests: full reads those, too, that are only shared or copied.",
)
@click.option("--quiet", is_flag=True, help="Show no progress and no summary; warnings and errors still.")
def merge(
    recipe: str,
    out: str | None,
    report: str | None,
    fresh: bool,
    discard: bool,
    digests: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge models into the new directory OUT, or go on with a merge that was interrupted there.

    OUT must be new or empty, or hold an unfinished merge of the same RECIPE; it can be left out with --discard.
    Progress and messages go to stderr, the summary to stdout.
    """
    if out is None and not discard:
        raise click.MissingParameter(param_hint="'OUT'", param_type="argument")
    from .target_files import TargetFile

    target = TargetFile("--report", report) if report is not None else None
    from ..engine.run.planning import plan as make_plan
    from ..io.output.lock import classify, refuse_occupied
    from ..report.plan import headline, overflow_section, summary_sections
    from ..report.sections import load_rich, show
    from .signals import StopSignals

    with StopSignals():
        load_rich()
        if out is not None and not discard:
            refuse_occupied(classify(Path(out)))  # before planning reads headers from the Hub
        planned = make_plan(recipe, _options(options))
        if out is not None and not discard:
            from ..engine.run.placement import with_reflinks

            planned = with_reflinks(planned, Path(out), digests=digests == "full")
        for warning in (*planned.warnings, *_memory_warnings(planned)):
            _say(f"warning: {warning}")
        if not quiet:
            _say(headline(planned))
        result = _perform(planned, None if discard else out, fresh, quiet)
    if target is not None:
        target.write(json.dumps(result.to_dict(), indent=2) + "\n", "; the merge is done")
    if not quiet and (sections := summary_sections(result)):
        show(sections)
    elif result.measured.overflowed:
        show([overflow_section(result)], sys.stderr)
    if result.excess_ram:
        raise _exceeded(result)


def _exceeded(result: Result) -> BudgetError:
    """The error of a merge that is complete, but held more memory than it was allowed."""
    from ..io.units import memory_size

    done = "the merge is complete" if result.out is not None else "the rehearsal is complete"
    limit = result.plan.schedule.budget.ram
    return BudgetError(
        f"{done}, but the process held {memory_size(result.peak_rss, up=True)} of memory, more than the budget of "
        f"{memory_size(limit)}: please report this with the recipe and the version of torch"
    )


def _perform(planned: Plan, out: str | None, fresh: bool, quiet: bool) -> Result:
    from ..engine.run.merge import fetch
    from ..engine.run.merge import merge as perform
    from ..report.progress import Display

    def say(text: str) -> None:
        if not quiet or text.startswith("warning: "):
            _say(text)

    with ExitStack() as shown:

        def download(files: Sequence[HubFile]) -> None:
            if files:
                with Display(sum(file.nbytes for file in files), 0, quiet=quiet, verb="downloaded") as downloading:
                    fetch(files, say, downloading)
            shown.enter_context(display)

        display = Display(planned.bytes_read, planned.bytes_written, quiet=quiet)
        return perform(planned, out, fresh=fresh, digests=planned.digests, notify=display, say=say, download=download)


@cli.command()
@click.argument("model", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor, with its dtype, shape and file.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(model: str, tensors: bool, as_json: bool) -> None:
    """Show a checkpoint's tensors, layers, dtypes and sizes.

    MODEL is a directory, a .safetensors file, or an index. Reads headers only.
    """
    from ..engine.model.inspect import inspect_model
    from ..report.inspect import inspection_sections
    from ..report.sections import show

    inspection = inspect_model(model)
    if as_json:
        _print_json(inspection.to_dict(tensors=tensors))
    else:
        show(inspection_sections(inspection, tensors=tensors))


def complete_method(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names of methods that begin so, for the shell."""
    from ..methods import merge_methods

    return sorted(name for name in merge_methods() if name.startswith(incomplete))


@cli.command()
@click.argument("name", required=False, shell_complete=complete_method)
@click.option("--methods", "files", multiple=True, type=click.Path(), metavar="FILE", help=METHODS)
def methods(name: str | None, files: Sequence[str]) -> None:
    """List the merge methods, or show one and its parameters."""
    from ..methods import merge_methods
    from ..methods.registry import load_entry_points
    from ..report.methods import method_sections
    from ..report.sections import Grid, Section, show

    known = merge_methods(files)
    load_entry_points()
    if name is not None:
        show(method_sections(_method(name, known)))
        return
    rows = tuple((method.name, method.summary) for method in sorted(known.values(), key=lambda method: method.name))
    show([Section("Merge methods", grid=Grid(("name", "what it makes"), rows))])


def _method(name: str, known: Mapping[str, Method]) -> Method:
    if name in known:
        return known[name]
    from difflib import get_close_matches

    close = get_close_matches(name.lower(), known, n=1)
    advice = f"did you mean {close[0]}?" if close else "`mergeloom methods` lists those that there are"
    raise UsageError(f"unknown merge method {name!r}; {advice}")


def _options(options: Mapping[str, Any]) -> Options:
    from ..engine.run.plan import Options

    return Options(**{**options, "methods": tuple(options["methods"])})


def _memory_warnings(planned: Plan) -> list[str]:
    """What there is to say of this machine's memory before a merge begins."""
    from ..engine.cost.machine import available_ram, process_memory
    from ..io.units import memory_size

    needed, free = planned.schedule.peak_ram, available_ram() + process_memory().now
    if needed <= free:
        return []
    return [
        f"the merge holds up to {memory_size(needed)} of RAM, and {memory_size(free)} are free now: close other "
        f"programs, or give --max-ram {memory_size(free)}"
    ]


def _print_json(content: Mapping[str, Any]) -> None:
    click.echo(json.dumps(content, indent=2))


def _say(message: str) -> None:
    """A message for people, on stderr."""
    from ..io.units import clean

    print(clean(message), file=sys.stderr, flush=True)
