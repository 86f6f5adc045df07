"""`mergeloom inspect`: shows what a checkpoint contains. Only click is imported at the top."""

from __future__ import annotations

import click

from .output import print_json


@click.command()
@click.argument("model", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor with its dtype, shape and file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def inspect(model: str, tensors: bool, as_json: bool) -> None:
    """Show a checkpoint's tensors, layers, dtypes and sizes.

    MODEL is a directory, a .safetensors or PyTorch file, or an index. Reads headers only.
    """
    from ..engine.model.inspect import inspect_model
    from ..report.inspect import inspection_sections
    from ..report.sections import show

    inspection = inspect_model(model)
    if as_json:
        print_json(inspection.to_dict(tensors=tensors))
    else:
        show(inspection_sections(inspection, tensors=tensors))
