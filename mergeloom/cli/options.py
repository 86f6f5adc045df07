"""Options that several commands share, and the conversion of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import UsageError

if TYPE_CHECKING:
    from ..engine.run.plan import Options
    from ..io.sizes import Limit

METHODS_HELP = "Python file with additional merge methods; repeatable."
SET_HELP = "Change a value of the recipe, such as parameters.weight=0.3 or models.0.parameters.weight=0.3; repeatable."
_MIN_SHARD_SIZE = 1000

F = TypeVar("F", bound=Callable[..., Any])


def size(text: str) -> int:
    """Convert the value of a size option, such as 32GiB, to bytes."""
    from ..io.sizes import parse_size

    try:
        return parse_size(text)
    except UsageError as error:
        raise click.BadParameter(str(error)) from error


def limit(text: str) -> Limit:
    """Convert the value of a memory limit, such as 32GiB or 50%."""
    from ..io.sizes import parse_limit

    try:
        return parse_limit(text)
    except UsageError as error:
        raise click.BadParameter(str(error)) from error


def shard_size(text: str) -> int:
    """Convert the value of --shard-size to bytes. A size such as 5B is rejected: mergekit counts parameters."""
    nbytes = size(text)
    if nbytes < _MIN_SHARD_SIZE:
        raise click.BadParameter(
            f"{text!r} is {nbytes} bytes for each file, which is too small: use a size such as 5GB. mergekit's 5B "
            "counts parameters, which are 10GB in bfloat16"
        )
    return nbytes


def override(text: str) -> str:
    """Check that the value of --set has a key and a value, before an extra argument is reported instead."""
    if "=" not in text:
        raise click.BadParameter(f"{text!r} has no value: use KEY=VALUE, such as dtype=bfloat16")
    return text


def recipe_path(text: str) -> Path:
    """Return the path of the recipe; `-` is standard input."""
    return Path("/dev/stdin" if text == "-" else text)


def complete_device(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the value of --device for the shell."""
    return [name for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)]


def planning_options(command: F) -> F:
    """Add the options that `plan` and `merge` share."""
    for option in reversed(
        (
            click.option(
                "--max-ram",
                type=limit,
                metavar="SIZE",
                help="RAM limit for the process, such as 32GiB or 50%.  [default: 70%]",
            ),
            click.option("--max-vram", type=limit, metavar="SIZE", help="VRAM limit for each GPU.  [default: 85%]"),
            click.option(
                "--device",
                default="auto",
                show_default=True,
                shell_complete=complete_device,
                help="Compute device: auto, cpu, cuda (all GPUs), cuda:1, or cuda:0,cuda:1.",
            ),
            click.option(
                "--seed",
                type=int,
                default=0,
                show_default=True,
                help="Seed for methods that sample (dare_*, della*).",
            ),
            click.option(
                "--shard-size",
                type=shard_size,
                metavar="SIZE",
                default="5GB",
                show_default=True,
                help="Maximum size of an output shard.",
            ),
            click.option("--threads", type=click.IntRange(1), help="CPU compute threads.  [default: all cores]"),
            click.option("--set", "overrides", type=override, multiple=True, metavar="KEY=VALUE", help=SET_HELP),
            click.option("--strict", is_flag=True, help="Treat every warning as an error."),
            click.option(
                "--survival",
                is_flag=True,
                help="Also measure what rounding to bfloat16 and float16 keeps of the changes; for FP8, it always is.",
            ),
            click.option("--methods", multiple=True, type=click.Path(), metavar="FILE", help=METHODS_HELP),
        )
    ):
        command = option(command)
    return command


def make_options(values: Mapping[str, Any]) -> Options:
    """Convert the values of the planning options to Options."""
    from ..engine.run.plan import Options

    return Options(**{**values, "methods": tuple(values["methods"]), "overrides": tuple(values["overrides"])})
