"""Merge methods as pure tensor functions, independent of files, devices, tensor names and budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .kernel.contract import Method


def merge_methods(files: Iterable[str] = ()) -> Mapping[str, Method]:
    """All merge methods by name: built-in ones, those in the given Python files, and those of installed packages.

    Raises:
        UsageError: a file or package is invalid; see `registry.load_methods`.
    """
    from .registry import MethodRegistry, load_methods

    for file in files:
        load_methods(file)
    return MethodRegistry()
