"""`mergeloom diff`: compares two models. Only click is imported at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .options import limit
from .output import print_json, print_warning

if TYPE_CHECKING:
    from ..engine.run.diff.compare import Comparison
    from ..engine.run.diff.result import Diff
    from ..io.sizes import Limit


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option(
    "--max-ram",
    type=limit,
    metavar="SIZE",
    help="RAM limit for the process, such as 32GiB or 50%.  [default: 70%]",
)
@click.option("--threads", type=click.IntRange(1), help="Number of threads.  [default: all cores]")
@click.option("--tensors", is_flag=True, help="List every tensor with its distance, cosine and share.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with every tensor.")
@click.option("--html", type=click.Path(), help="Also write a heat map to this file as a self-contained HTML page.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def diff(
    a: str,
    b: str,
    max_ram: Limit | None,
    threads: int | None,
    tensors: bool,
    as_json: bool,
    html: str | None,
    quiet: bool,
) -> None:
    """Compare the values of two models, tensor by tensor.

    A and B are directories, .safetensors files, indexes or Hub ids; an output of a merge is a model, too. For each
    tensor that both have: the relative distance ||A - B|| / ||A||, the cosine, and the share of equal elements; with
    summaries by layer and by kind of tensor. Every byte is read once. The exit code is 0 whether or not they differ.
    """
    from .target_files import TargetFile

    target = TargetFile("--html", html) if html is not None else None
    from ..engine.run.diff.compare import JSON_BYTES, RESULT_BYTES, Comparison
    from ..report.diff import diff_sections
    from ..report.html.diff_page import make_diff_page
    from ..report.html.origin import find_origin
    from ..report.sections import load_rich, show

    load_rich()
    result_bytes = JSON_BYTES if as_json else RESULT_BYTES
    comparison = Comparison(a, b, max_ram=max_ram, threads=threads, result_bytes=result_bytes)
    result = _run(comparison, quiet=quiet or as_json)
    for warning in result.warnings:
        print_warning(warning)
    if target is not None:
        origin = find_origin(click.get_current_context().obj or ())  # `main` passes the arguments
        target.write(make_diff_page(result, origin), quiet=quiet)
    if as_json:
        print_json(result.to_dict())
    else:
        show(diff_sections(result, tensors=tensors))
    _check_memory(result)


def _run(comparison: Comparison, *, quiet: bool) -> Diff:
    """Download what is missing, and compare, with the progress on stderr."""
    from ..engine.run.merge import fetch
    from ..report.progress import Display

    if files := comparison.downloads:
        with Display(sum(file.nbytes for file in files), 0, quiet=quiet, verb="downloaded") as display:
            fetch(files, display.print_above, display)
    with Display(comparison.bytes_to_read, 0, quiet=quiet) as display:
        return comparison.run(display)


def _check_memory(result: Diff) -> None:
    """Raise the error for a comparison that is complete but used more memory than its budget."""
    from ..engine.cost.machine import process_memory
    from ..errors import BudgetError
    from ..io import platform
    from ..io.units import memory_size

    peak = process_memory().peak
    if platform.OWN_PROCESS and peak > result.max_ram:
        raise BudgetError(
            f"the comparison is complete, but the process used {memory_size(peak, up=True)} of RAM, more "
            f"than the budget of {memory_size(result.max_ram)}: please report this with the version of numpy"
        )
