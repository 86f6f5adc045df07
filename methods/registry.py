"""Loads merge methods from Python files and from installed packages."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import UsageError
from . import catalogue  # noqa: F401  registers the built-in methods
from .kernel.expression import MethodDefinitionError
from .kernel.method import Method, registered, unregister

GROUP = "mergeloom.methods"
"""The entry point group; each entry point names a module that registers methods on import."""

_loaded: dict[
    str, tuple[str, tuple[str, ...]]
] = {}  # file or entry point -> (identity of its code, names of its methods)


def load_methods(path: str | Path) -> tuple[str, ...]:
    """Run a Python file that registers merge methods, unless it has been run before and has not changed.

    Returns:
        Names of the methods that the file registers.

    Raises:
        UsageError: the file does not exist, raises an exception, registers no method, or uses an existing name.
    """
    try:
        file = Path(path).resolve()
        if not file.is_file():
            raise UsageError(f"--methods {path}: file not found")
        code = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--methods {path}: cannot read the file: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--methods {path!r}: invalid path: {error}") from error
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
        sys.modules[module_name] = module  # typing.get_type_hints looks names up here
        # run the bytes that were hashed, not cached bytecode
        names = _register(lambda: exec(compile(code, str(file), "exec"), module.__dict__), f"--methods {path}")
        _loaded[str(file)] = identity, names
    return names


def load_entry_points() -> tuple[str, ...]:
    """Import the modules that installed packages list in the entry point group "mergeloom.methods", once per process.

    Returns:
        Names of the methods that they register.

    Raises:
        UsageError: see `load_methods`.
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
    """The identity of a user-defined method's code (a hash or package version); None for a built-in method."""
    return next((identity for identity, names in _loaded.values() if method in names), None)


class MethodRegistry(Mapping[str, Method]):
    """All methods by name. The first lookup of an unknown name loads the methods of installed packages."""

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
    try:
        for name in names:
            registered()[name].check()
    except MethodDefinitionError as error:
        for name in names:
            unregister(name)
        raise UsageError(f"{origin}: {error}") from error
    if not names:
        raise UsageError(f"{origin}: registers no merge method; decorate one with @merge_method(NAME)")
    return names
