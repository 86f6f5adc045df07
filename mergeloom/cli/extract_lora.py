"""`mergeloom extract-lora`: extracts an adapter from a fine-tuned model. Only click is imported at the top."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from .options import limit
from .output import print_warning

if TYPE_CHECKING:
    from ..engine.run.extract.extraction import Extraction
    from ..engine.run.extract.result import ExtractedAdapter
    from ..io.sizes import Limit


@click.command("extract-lora")
@click.argument("model", type=click.Path())
@click.argument("base", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--rank", type=int, required=True, help="Rank of the factors; less for matrices with a shorter side.")
@click.option("--embed", is_flag=True, help="Decompose embeddings and the head, too, instead of saving them in full.")
@click.option(
    "--low-rank-only",
    is_flag=True,
    help="Leave out changed norms, biases and embeddings instead of saving them in full.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="REGEX",
    help="Extract only tensors whose name this regular expression finds; repeatable.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="REGEX",
    help="Leave out tensors whose name this regular expression finds; repeatable.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the SVD of large matrices.")
@click.option(
    "--max-ram",
    type=limit,
    metavar="SIZE",
    help="RAM limit for the process, such as 32GiB or 50%.  [default: 70%]",
)
@click.option("--threads", type=click.IntRange(1), help="Number of threads.  [default: all cores]")
@click.option("--report", type=click.Path(), help="Write the error of each matrix to this file as JSON.")
@click.option("--matrices", is_flag=True, help="List every matrix with its error.")
@click.option("--restart", is_flag=True, help="Discard an unfinished extraction in OUT and start over.")
@click.option("--quiet", is_flag=True, help="Show no progress and no summary, only warnings and errors.")
def extract_lora(
    model: str,
    base: str,
    out: str,
    rank: int,
    embed: bool,
    low_rank_only: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    seed: int,
    max_ram: Limit | None,
    threads: int | None,
    report: str | None,
    matrices: bool,
    restart: bool,
    quiet: bool,
) -> None:
    """Extract a LoRA adapter: the difference of MODEL and BASE in low rank, or resume an interrupted extraction.

    MODEL was fine-tuned from BASE. OUT is a new or empty directory; PEFT loads the adapter that is written to it. One
    matrix is decomposed at a time. Matrices that are equal in both models are left out. Progress and messages go to
    stderr, the summary to stdout.
    """
    from .target_files import TargetFile

    target = TargetFile("--report", report) if report is not None else None
    from ..engine.run.extract.extraction import Extraction
    from ..engine.run.extract.options import ExtractOptions
    from ..report.adapters.extract import extraction_sections
    from ..report.sections import load_rich, show
    from .signals import StopSignals

    load_rich()
    options = ExtractOptions(rank, embed, low_rank_only, include, exclude, seed)
    with StopSignals():
        extraction = Extraction(model, base, out, options, max_ram=max_ram, threads=threads)
        result = _run(extraction, restart=restart, quiet=quiet)
    for warning in result.warnings:
        print_warning(warning)
    if target is not None:
        target.write(json.dumps(result.to_dict(), indent=2) + "\n", "; the adapter is complete", quiet=quiet)
    if not quiet:
        show(extraction_sections(result, matrices=matrices))
    _check_memory(result)


def _run(extraction: Extraction, *, restart: bool, quiet: bool) -> ExtractedAdapter:
    """Download what is missing, and extract, with the progress on stderr."""
    from ..engine.run.merge import fetch
    from ..report.adapters.extract import extraction_headline
    from ..report.progress import Display

    if (files := extraction.downloads) and not extraction.complete:
        with Display(sum(file.nbytes for file in files), 0, quiet=quiet, verb="downloaded") as display:
            fetch(files, display.print_above, display)
    display = Display(extraction.bytes_to_read, 0, quiet=quiet)

    def note(text: str) -> None:
        if not quiet:
            display.print_above(text)

    if not extraction.complete:
        note(extraction_headline(extraction))
    with display:
        return extraction.run(display, note, restart=restart)


def _check_memory(result: ExtractedAdapter) -> None:
    """Raise the error for an extraction that is complete but used more memory than its budget."""
    from ..errors import BudgetError
    from ..io import platform
    from ..io.units import memory_size

    if platform.OWN_PROCESS and result.peak_rss > result.max_ram:
        raise BudgetError(
            f"the adapter is complete, but the process used {memory_size(result.peak_rss, up=True)} of RAM, more than "
            f"the budget of {memory_size(result.max_ram)}: please report this with the version of numpy"
        )
