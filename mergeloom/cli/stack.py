"""`mergeloom stack`: write the recipe of a self-merge by overlapping windows. Only click is imported at the top."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..engine.model.self_merge import StackSummary

_LAYERS = click.IntRange(1)


@click.command()
@click.argument("model", type=click.Path())
@click.option("--window", type=_LAYERS, multiple=True, required=True, help="Layers of each window; repeatable.")
@click.option("--step", type=_LAYERS, multiple=True, help="From one window to the next; repeatable.  [default: half]")
@click.option(
    "--repeat", type=_LAYERS, help="Stack the stack again: how many passes.  [default: one for each --window]"
)
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32", "float64")),
    help="Of the output.  [default: as it is]",
)
@click.option("--exact", is_flag=True, help="Let the last window reach to the last layer.")
def stack(
    model: str, window: tuple[int, ...], step: tuple[int, ...], repeat: int | None, dtype: str | None, exact: bool
) -> None:
    """Write the recipe of a self-merge by overlapping windows.

    Windows of layers of MODEL, a step apart, are stacked on each other. The recipe goes to stdout, and what it makes to
    stderr. Reads headers only. With several passes, --window and --step are of all of them, or given once for each.
    """
    from ..engine.model.open import open_model, reference_of
    from ..engine.model.self_merge import stack_recipe

    reference = reference_of(model)
    text, summary = stack_recipe(
        reference,
        open_model(reference),
        window=window,
        step=step or None,
        repeat=repeat,
        dtype=dtype,
        exact=exact,
    )
    _report(summary)
    click.echo(text, nl=False)


def _report(summary: StackSummary) -> None:
    from ..io.units import big_number, clean, plural

    said = [f"warning: {warning}" for warning in summary.warnings]
    said += [
        f"{plural(one.before, 'layer')} -> {one.layers:,}, in {plural(len(one.windows), 'window')}"
        for one in summary.rounds
    ]
    said.append(f"makes {plural(summary.layers, 'layer')}, {big_number(summary.parameters)} parameters")
    for line in said:
        print(clean(line), file=sys.stderr, flush=True)
