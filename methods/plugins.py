"""Merge methods of the user's: from a Python file, and from installed packages."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError
from . import catalogue  # noqa: F401  whose names are taken
from .contract import registered, unregister

GROUP = "mergeloom.methods"
"""The group of entry points; each names a module whose import registers methods."""

_loaded: dict[str, tuple[str, ...]] = {}


def load_methods(path: str | Path) -> tuple[str, ...]:
    """Run a Python file that registers merge methods; only once in a process.

    Returns:
        The names of the methods that it registered.

    Raises:
        UsageError: where there is no such file, or it fails, registers nothing, or takes a name that is taken.
    """
    file = Path(path).resolve()
    if str(file) not in _loaded:
        if not file.is_file():
            raise UsageError(f"--methods {path}: there is no such file")
        name = f"_mergeloom_methods_{len(_loaded)}_{file.stem}"
        loader = importlib.machinery.SourceFileLoader(name, str(file))
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where type hints are looked up
        _loaded[str(file)] = _register(lambda: loader.exec_module(module), f"--methods {path}")
    return _loaded[str(file)]


def load_entry_points() -> tuple[str, ...]:
    """Import what installed packages name in the entry point group "mergeloom.methods"; only once in a process.

    Returns:
        The names of the methods that they registered.

    Raises:
        UsageError: as `load_methods`.
    """
    names: list[str] = []
    for point in importlib.metadata.entry_points(group=GROUP):
        key = f"{point.name} = {point.value}"
        if key not in _loaded:
            _loaded[key] = _register(point.load, f"the package {point.dist.name if point.dist else point.value}")
        names += _loaded[key]
    return tuple(names)


def _register(run: Callable[[], object], origin: str) -> tuple[str, ...]:
    before = set(registered())
    try:
        run()
    except Exception as error:
        for name in set(registered()) - before:
            unregister(name)
        raise UsageError(f"{origin}: {type(error).__name__}: {error}") from error
    names = tuple(name for name in registered() if name not in before)
    if not names:
        raise UsageError(f"{origin}: it registers no merge method; decorate one with @merge_method(NAME)")
    return names
