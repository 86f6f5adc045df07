"""`mergeloom stack`: writes the recipe of a self-merge by overlapping windows. Only click is imported at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .output import print_message, print_warning

if TYPE_CHECKING:
    from ..engine.model.self_merge import StackSummary

_LAYERS = click.IntRange(1)


@click.command()
@click.argument("model", type=click.Path())
@click.option("--window", type=_LAYERS, multiple=True, required=True, help="Layers in each window; repeatable.")
@click.option(
    "--step",
    type=_LAYERS,
    multiple=True,
    help="Layers from the start of one window to the next; repeatable.  [default: half]",
)
@click.option(
    "--repeat",
    type=_LAYERS,
    help="Number of passes, each over the result of the previous one.  [default: one per --window]",
)
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32", "float64")),
    help="Dtype of the output.  [default: unchanged]",
)
@click.option("--exact", is_flag=True, help="Extend the last window of each pass to the last layer.")
def stack(
    model: str, window: tuple[int, ...], step: tuple[int, ...], repeat: int | None, dtype: str | None, exact: bool
) -> None:
    """Write the recipe of a self-merge by overlapping windows.

    The merge stacks windows of MODEL's layers, --step layers apart. The recipe goes to stdout, a summary of its output
    to stderr. Reads headers only. With several passes, give --window and --step once for all of them, or once for each.
    """
    from ..engine.model.open import open_named
    from ..engine.model.self_merge import stack_recipe

    reference, checkpoint = open_named(model)
    text, summary = stack_recipe(
        reference,
        checkpoint,
        window=window,
        step=step or None,
        repeat=repeat,
        dtype=dtype,
        exact=exact,
    )
    _print_summary(summary)
    click.echo(text, nl=False)


def _print_summary(summary: StackSummary) -> None:
    from ..io.units import big_number, plural

    for warning in summary.warnings:
        print_warning(warning)
    for one in summary.rounds:
        layers = f"{plural(one.before, 'layer')} -> {one.layers:,}"
        print_message(f"{layers}, in {plural(len(one.windows), 'window')}")
    print_message(f"output: {plural(summary.layers, 'layer')}, {big_number(summary.parameters)} parameters")
