"""`mergeloom verify`: compares a merged model or an adapter with its manifest. Only click is imported at the top."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import CheckpointError
from .output import print_json

if TYPE_CHECKING:
    from ..engine.run.verify import Unverified, Verdict
    from ..report.sections import Section

_SHOWN = 20


@click.command()
@click.argument("out", type=click.Path())
@click.option(
    "--sources",
    is_flag=True,
    help="Also compare tensors without a digest with their source files, and check that all of these are unchanged.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=PATH",
    help="With --sources: where a source model is, by its name in the manifest; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with every unverified tensor.")
@click.option("--quiet", is_flag=True, help="Show no progress, and no summary unless something is wrong.")
def verify(out: str, sources: bool, models: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Compare a merged model or an extracted adapter with its manifest. Needs neither the source models nor a network.

    OUT is the output directory of a merge or of extract-lora; its mergeloom.json or mergeloom_extraction.json has the
    digests. Everything with a digest is read. Tensors that were reflinked or copied by the kernel have none, unless
    the model was merged with --digests full, and are listed as unverified. The exit code is 4 if anything is damaged,
    or if a file was added that loaders would use.
    """
    from ..engine.run.finished import describe_added
    from ..engine.run.verify import Verification
    from ..report.progress import Display
    from ..report.sections import show

    for text in models:
        if "=" not in text or not sources:
            raise click.BadParameter(f"{text}: use it with --sources, as --model NAME=PATH", param_hint="--model")
    named = dict(text.split("=", 1) for text in models)
    check = Verification(Path(out), sources=sources, models=named)
    with Display(check.bytes_to_read, 0, quiet=quiet or as_json) as display:
        verdict = check.run(notify=display)
    if as_json:
        print_json(verdict.to_dict())
    elif not quiet or not verdict.whole or verdict.changed_sources:
        show(list(_sections(verdict, sources)))
    if verdict.damaged:
        again = "merge again" if check.made_by == "merge" else "extract the adapter again"
        raise CheckpointError(f"{out}: {verdict.damaged[0]}; copy it from an intact copy, or {again}")
    if verdict.added:
        raise CheckpointError(f"{out}: {describe_added(verdict.added, check.made_by)}")
    if verdict.changed_sources:
        raise CheckpointError(
            f"{verdict.changed_sources[0]} has changed since the {check.made_by}; {out} is undamaged, and only a new "
            f"{check.made_by} would use the changed file"
        )


def _sections(verdict: Verdict, sources: bool) -> Iterator[Section]:
    from ..io.units import data_size, plural
    from ..report.sections import Section

    state = "OK" if verdict.whole else "not OK"
    matching = f"{plural(verdict.tensors, 'tensor')} of {data_size(verdict.nbytes)} and {plural(verdict.files, 'file')}"
    lines = [f"unverified: {text}" for text in _unverified(verdict.unverified)]
    if lines:
        compares = "" if sources else "; `mergeloom verify --sources` compares them with their sources"
        lines.append(f"`mergeloom merge --digests full` records digests for such tensors{compares}")
    yield Section(f"{state}: {matching} match the manifest", lines=lines, warns=not verdict.whole)
    lists = {
        "Damaged": verdict.damaged,
        "Added, and used by loaders": verdict.added,
        "Sources that have changed": verdict.changed_sources,
        "Sources that could not be checked": verdict.missing_sources,
    }
    for title, texts in lists.items():
        if texts:
            more = (f"and {len(texts) - _SHOWN} more",) if len(texts) > _SHOWN else ()
            yield Section(title, lines=(*texts[:_SHOWN], *more), warns=True)


def _unverified(tensors: tuple[Unverified, ...]) -> Iterator[str]:
    """Yield a line for each source model: how its tensors were copied, and why they could not be compared."""
    from ..io.units import data_size, plural

    groups: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.origin, tensor.reason), []).append(tensor.nbytes)
    for (origin, reason), sizes in groups.items():
        because = f" ({reason})" if reason else ""
        yield f"{origin}: {plural(len(sizes), 'tensor')} of {data_size(sum(sizes))}{because}"
