"""Merge methods as pure tensor maths: torch in, torch out. No files, devices, names or budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .kernel.contract import Method


def merge_methods(files: Iterable[str] = ()) -> Mapping[str, Method]:
    """Every merge method by name: the built-in ones, those of the given Python files, and of installed packages.

    Raises:
        UsageError: where a file, or a package, doesn't do what it should: see `plugins`.
    """
    from .registry import MethodRegistry, load_methods

    for file in files:
        load_methods(file)
    return MethodRegistry()
