"""Merge methods, and all that a method of your own needs: `merge_method`, `Inputs`, and the functions of arrays.

A method does not depend on files, devices, tensor names or budgets. `mergeloom.methods()` calls `list_methods`: the
package has the name of this function in the public API.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType

from ..errors import UsageError
from .definition import *  # noqa: F403
from .kernel.method import Method


def merge_methods(files: Iterable[str] = ()) -> Mapping[str, Method]:
    """All merge methods by name: built-in ones, those in the given Python files, and those of installed packages.

    Raises:
        UsageError: a file or package is invalid; see `registry.load_methods`.
    """
    from .registry import MethodRegistry, load_methods

    for file in files:
        load_methods(file)
    return MethodRegistry()


def list_methods(files: Iterable[str | os.PathLike[str]] = ()) -> dict[str, Method]:
    """Return the merge methods by name, sorted: built-in ones, those in Python files, and those of installed packages.

    Args:
        files: paths of Python files with additional merge methods.

    Raises:
        UsageError: a file does not exist, raises an exception, or registers no method.
    """
    from .registry import load_entry_points

    known = merge_methods(os.fspath(file) for file in one_or_several(files))
    load_entry_points()
    return {name: known[name] for name in sorted(known)}


def one_or_several(files: Iterable[str | os.PathLike[str]]) -> Iterable[str | os.PathLike[str]]:
    """Return several paths; a single path counts as one file, not as its characters.

    Raises:
        UsageError: `files` is neither a path nor several.
    """
    if isinstance(files, (str, os.PathLike)):
        return (files,)
    if not isinstance(files, Iterable):
        raise UsageError(f"invalid methods {files!r}: use paths of Python files")
    return files


class _CallablePackage(ModuleType):
    """A package that is called like a function. Importing it sets the attribute that the function would have."""

    def __call__(self, files: Iterable[str | os.PathLike[str]] = ()) -> dict[str, Method]:
        """As `list_methods`."""
        return list_methods(files)


sys.modules[__name__].__class__ = _CallablePackage
