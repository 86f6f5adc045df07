"""Merge methods of the user's: from a Python file, and from installed packages."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import UsageError
from . import catalogue  # noqa: F401  whose names are taken
from .kernel.contract import Method, registered, unregister

GROUP = "mergeloom.methods"
"""The group of entry points; each names a module whose import registers methods."""

_loaded: dict[str, tuple[str, tuple[str, ...]]] = {}  # what was loaded -> the identity of its code, its methods


def load_methods(path: str | Path) -> tuple[str, ...]:
    """Run a Python file that registers merge methods; once, and again where it has changed since.

    Returns:
        The names of the methods that it registered.

    Raises:
        UsageError: where there is no such file, or it fails, registers nothing, or takes a name that is taken.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UsageError(f"--methods {path}: there is no such file")
    try:
        code = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--methods {path}: can't be read: {error.strerror}") from error
    identity = f"sha256:{hashlib.sha256(code).hexdigest()}"
    before, names = _loaded.get(str(file), ("", ()))
    if identity != before:
        for name in names:
            unregister(name)
        _loaded.pop(str(file), None)
        module_name = f"_mergeloom_methods_{identity[7:23]}_{file.stem}"
        spec = importlib.util.spec_from_loader(
            module_name, importlib.machinery.SourceFileLoader(module_name, str(file))
        )
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # where type hints are looked up
        # what is run is what was read: no stale bytecode
        names = _register(lambda: exec(compile(code, str(file), "exec"), module.__dict__), f"--methods {path}")
        _loaded[str(file)] = identity, names
    return names


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
            package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
            _loaded[key] = package, _register(point.load, f"the package {package}")
        names += _loaded[key][1]
    return tuple(names)


def code_of(method: str) -> str | None:
    """What tells the code of a user's method from other versions of it; None for one of mergeloom's own."""
    return next((identity for identity, names in _loaded.values() if method in names), None)


class MethodRegistry(Mapping[str, Method]):
    """Every method by name. Installed packages are asked once a name is wanted that isn't there yet."""

    def __getitem__(self, name: str) -> Method:
        if name not in registered():
            load_entry_points()
        return registered()[name]

    def __contains__(self, name: object) -> bool:
        if name not in registered():
            load_entry_points()
        return name in registered()

    def __iter__(self) -> Iterator[str]:
        return iter(registered())

    def __len__(self) -> int:
        return len(registered())


def _register(run: Callable[[], object], origin: str) -> tuple[str, ...]:
    before = set(registered())
    try:
        run()
    except (Exception, SystemExit) as error:
        for name in set(registered()) - before:
            unregister(name)
        raise UsageError(f"{origin}: {type(error).__name__}: {error}") from error
    names = tuple(name for name in registered() if name not in before)
    if not names:
        raise UsageError(f"{origin}: it registers no merge method; decorate one with @merge_method(NAME)")
    return names
