"""`mergeloom merge`: executes a merge. Only click is imported at the top."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BudgetError
from .mergekit import MergeCommand, mergekit_notes
from .options import make_options, planning_options, recipe_path
from .output import print_message, print_warning
from .streams import StdoutFailure

if TYPE_CHECKING:
    from ..engine.run.merge import Result
    from ..engine.run.plan import Options, Plan
    from ..io.hub.repository import HubFile
    from ..report.sections import Section


@click.command(cls=MergeCommand)
@click.argument("recipe", type=recipe_path)
@click.argument("out", type=click.Path(), required=False)
@planning_options
@click.option("--report", type=click.Path(), help="Write planned and measured values to this file as JSON.")
@click.option("--restart", is_flag=True, help="Discard an unfinished merge in OUT and start over.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop, as `mergeloom plan` does.")
@click.option("--no-output", is_flag=True, help="Rehearsal: run the complete merge without writing OUT.")
@click.option("--fresh", is_flag=True, hidden=True, help="Former name of --restart.")
@click.option("--discard", is_flag=True, hidden=True, help="Former name of --no-output.")
@click.option(
    "--digests",
    type=click.Choice(["written", "full"]),
    default="written",
    show_default=True,
    help="Which tensors get a digest in the manifest; `full` also reads those that are only reflinked or copied.",
)
@click.option(
    "--keep-paths",
    is_flag=True,
    help="Keep local paths in the files that describe the merge, instead of their last component.",
)
@click.option("--quiet", is_flag=True, help="Show no progress and no summary, only warnings and errors.")
def merge(
    recipe: Path,
    out: str | None,
    report: str | None,
    restart: bool,
    dry_run: bool,
    no_output: bool,
    fresh: bool,
    discard: bool,
    digests: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge models, or resume an interrupted merge.

    The output is written to the directory OUT, which must be new or empty, or hold an unfinished merge of the same
    RECIPE. OUT is optional with --no-output and --dry-run. Progress and messages go to stderr, the summary to stdout.
    """
    no_output = no_output or discard
    for note in () if quiet else mergekit_notes():
        print_message(note)
    if dry_run:
        if report is not None:
            raise click.UsageError("--dry-run and --report are mutually exclusive: use `mergeloom plan --json`")
        from .plan import show_plan

        show_plan(recipe, out, options)
        return
    if out is None and not no_output:
        advice = "Name a new directory: mergeloom merge RECIPE OUT. Only --dry-run and --no-output need none."
        raise click.MissingParameter(advice, param_hint="'OUT'", param_type="argument")
    if out is not None and Path(out).is_file() and not recipe.exists():
        raise click.UsageError(f"{recipe} does not exist, and {out} is a file: RECIPE comes first, then OUT")
    from .target_files import TargetFile

    target = TargetFile("--report", report) if report is not None else None
    from ..report.result import overflow_section, result_sections
    from ..report.sections import show
    from .signals import StopSignals

    with StopSignals():
        plan = _make_plan(recipe, None if no_output else out, make_options(options), full=digests == "full")
        for warning in (*plan.warnings, *_memory_warnings(plan)):
            print_warning(warning)
        result = _merge(plan, None if no_output else out, restart=restart or fresh, quiet=quiet)
    if target is not None:
        target.write(json.dumps(result.to_dict(), indent=2) + "\n", "; the merge is complete", quiet=quiet)
    if not quiet and (sections := result_sections(result)):
        _show_summary(sections, written=result.out is not None)
    elif result.measured.overflowed:
        show([overflow_section(result)], sys.stderr)
    if result.excess_ram:
        raise _excess_error(result)


def _show_summary(sections: Sequence[Section], *, written: bool) -> None:
    """Print the summary. If OUT is written, a standard output that can't be written is not a failure."""
    from ..report.sections import show

    try:
        show(sections)
        sys.stdout.flush()
    except (BrokenPipeError, StdoutFailure) as error:
        if not written:
            raise
        reason = "its reader is gone" if isinstance(error, BrokenPipeError) else str(error)
        print_warning(f"the merge is complete, but its summary can't be printed: {reason}")


def _make_plan(recipe: Path, out: str | None, options: Options, *, full: bool) -> Plan:
    """Plan the merge, with reflinks and kernel copies where it writes to OUT."""
    from ..engine.run.planning import plan as make_plan
    from ..io.output.lock import classify, refuse_occupied
    from ..report.sections import load_rich

    load_rich()
    if out is None:
        return make_plan(recipe, options)
    refuse_occupied(classify(Path(out)))  # before planning reads headers from the Hub
    from ..engine.run.placement import with_reflinks

    return with_reflinks(make_plan(recipe, options), Path(out), digests=full)


def _merge(plan: Plan, out: str | None, *, restart: bool, quiet: bool) -> Result:
    """Execute the plan, with its progress on stderr."""
    from ..engine.run.merge import fetch
    from ..engine.run.merge import merge as run_merge
    from ..report.plan import headline
    from ..report.progress import Display

    display = Display(plan.bytes_read, plan.bytes_written, quiet=quiet)

    def note(text: str) -> None:
        if not quiet:
            display.print_above(text)

    note(headline(plan))
    with ExitStack() as displays:

        def download(files: Sequence[HubFile]) -> None:
            if files:
                size = sum(file.nbytes for file in files)
                with Display(size, 0, quiet=quiet, verb="downloaded") as download_display:
                    fetch(files, download_display.print_above if not quiet else note, download_display)
            displays.enter_context(display)

        return run_merge(
            plan,
            out,
            fresh=restart,
            digests=plan.digests,
            notify=display,
            say=note,
            warn=lambda text: display.print_above(f"warning: {text}"),
            download=download,
        )


def _memory_warnings(plan: Plan) -> list[str]:
    """Warn if less RAM is available than the merge will use."""
    from ..engine.cost.machine import available_ram, process_memory
    from ..io.units import memory_size

    needed, available = plan.schedule.peak_ram, available_ram() + process_memory().now
    if needed <= available:
        return []
    return [
        f"the merge uses up to {memory_size(needed)} of RAM, but only {memory_size(available)} are available: close "
        f"other programs, or set --max-ram {memory_size(available)}"
    ]


def _excess_error(result: Result) -> BudgetError:
    """The error for a merge that finished but used more memory than its budget."""
    from ..io.units import memory_size

    what = "the merge is complete" if result.out is not None else "the rehearsal is complete"
    limit = result.plan.schedule.budget.ram
    return BudgetError(
        f"{what}, but the process used {memory_size(result.peak_rss, up=True)} of RAM, more than the budget of "
        f"{memory_size(limit)}: please report this with the recipe"
    )
