"""`mergeloom verify`: does OUT hold what its manifest says? Only click is imported at the top."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import CheckpointError

if TYPE_CHECKING:
    from .display import Section
    from .verifying import Verdict

_SHOWN = 20


@click.command()
@click.argument("out", type=click.Path())
@click.option("--sources", is_flag=True, help="Look, too, if the source files are still what they were.")
@click.option("--quiet", is_flag=True, help="Show no progress and no summary; what is wrong still.")
def verify(out: str, sources: bool, quiet: bool) -> None:
    """Read every byte of a merged model, and compare it with its manifest.

    OUT is a directory that mergeloom has made: mergeloom.json in it has the digests. Ends with 0 only where every
    tensor and every file is vouched for and is what it was.
    """
    from .display import show
    from .progress import Display
    from .verifying import bytes_to_read
    from .verifying import verify as perform

    path = Path(out)
    with Display(bytes_to_read(path), 0, quiet=quiet) as display:
        verdict = perform(path, sources=sources, notify=display)
    if not quiet or not verdict.whole:
        show(_sections(verdict))
    if verdict.damaged:
        raise CheckpointError(f"{out}: {verdict.damaged[0]}; make it again, or get it from where it came from")
    if verdict.unvouched:
        raise CheckpointError(
            f"{out}: {verdict.unvouched[0]}: nothing is known to be wrong, but not everything is vouched for"
        )


def _sections(verdict: Verdict) -> list[Section]:
    from .display import Section
    from .wording import data_size, plural

    state = "whole" if verdict.whole else "not whole"
    sections = [
        Section(
            f"{state}: {plural(verdict.tensors, 'tensor')} of {data_size(verdict.nbytes)} are what the manifest says"
        )
    ]
    for title, lines in (("Damaged", verdict.damaged), ("Not vouched for", verdict.unvouched)):
        if lines:
            more = (f"and {len(lines) - _SHOWN} more",) if len(lines) > _SHOWN else ()
            sections.append(Section(title, lines=(*lines[:_SHOWN], *more), warns=True))
    return sections
