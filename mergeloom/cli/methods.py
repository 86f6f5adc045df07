"""`mergeloom methods`: lists the merge methods, or describes one. Only click is imported at the top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from ..errors import UsageError
from .options import METHODS_HELP

if TYPE_CHECKING:
    from ..methods.kernel.method import Method


def complete_method(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete a method's name for the shell."""
    from ..methods import merge_methods

    return sorted(name for name in merge_methods() if name.startswith(incomplete))


@click.command()
@click.argument("name", required=False, shell_complete=complete_method)
@click.option("--methods", "files", multiple=True, type=click.Path(), metavar="FILE", help=METHODS_HELP)
def methods(name: str | None, files: Sequence[str]) -> None:
    """List the merge methods, or describe one with its parameters."""
    from ..methods import merge_methods
    from ..methods.registry import load_entry_points
    from ..report.methods import method_list_section, method_sections
    from ..report.sections import show

    known = merge_methods(files)
    load_entry_points()
    if name is not None:
        show(method_sections(_find_method(name, known)))
    else:
        show([method_list_section(known.values())])


def _find_method(name: str, known: Mapping[str, Method]) -> Method:
    """Return the method with this name. Raises UsageError with the closest name if there is none."""
    if name in known:
        return known[name]
    from difflib import get_close_matches

    close = get_close_matches(name.lower(), known, n=1)
    advice = f"did you mean {close[0]}?" if close else "`mergeloom methods` lists the known methods"
    raise UsageError(f"unknown merge method {name!r}; {advice}")
