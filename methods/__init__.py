"""Merge methods as pure tensor maths: torch in, torch out. No files, devices, names or budgets."""

from __future__ import annotations

from collections.abc import Mapping

from .contract import Method, registered


def merge_methods() -> Mapping[str, Method]:
    """Every merge method by name: the built-in ones, and those registered by the user."""
    from . import catalogue  # noqa: F401  registers the built-in methods

    return registered()
