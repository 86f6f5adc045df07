"""Imports go one way: mergeloom -> engine -> io, engine -> methods; errors is a leaf; heavy libraries load late."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDERS = ("mergeloom", "engine", "methods", "io")

MAY_IMPORT = {
    "mergeloom": {"mergeloom", "engine", "methods", "io", "errors"},
    "engine": {"engine", "methods", "io", "errors"},
    "methods": {"methods", "errors"},
    "io": {"io", "errors"},
    "errors": set(),
}
"""Which parts of mergeloom a part may import; ``mergeloom/errors.py`` is a part of its own."""

MAY_NOT_IMPORT = {
    "mergeloom": set(),
    "engine": {"rich", "click", "safetensors"},
    "methods": {"rich", "click", "safetensors", "networkx", "yaml", "psutil"},
    "io": {"rich", "click", "networkx", "yaml", "torch"},
    "errors": {"rich", "click", "safetensors", "networkx", "yaml", "psutil", "torch", "numpy"},
}
"""Which libraries a part may not import, at the top or inside a function."""


def sources() -> Iterator[tuple[Path, str]]:
    """Every source file and its module's name in the installed package."""
    for folder in FOLDERS:
        package = "mergeloom" if folder == "mergeloom" else f"mergeloom.{folder}"
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield path, ".".join([package, *(part for part in parts if part != "__init__")])


def part_of(module: str) -> str:
    """The part of mergeloom that a module belongs to."""
    second = module.split(".")[1] if "." in module else ""
    return second if second in MAY_IMPORT else "mergeloom"


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, wherever in the file, for types only or not."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize(("path", "module"), [pytest.param(*source, id=source[1]) for source in sources()])
def test_imports_go_one_way(path: Path, module: str) -> None:
    part = part_of(module)
    for line, name in imports(path, module):
        where = f"{path.relative_to(ROOT)}:{line}: {part} imports {name}"
        library = name.split(".")[0]
        if library == "mergeloom":
            assert name == "mergeloom.__version__" or part_of(name) in MAY_IMPORT[part], where
        else:
            assert library not in MAY_NOT_IMPORT[part], where


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout))


def test_io_loads_nothing_else() -> None:
    modules = [module for path, module in sources() if part_of(module) == "io"]
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert not loaded & {"torch", "rich", "click", "networkx", "mergeloom.engine", "mergeloom.methods"}


def test_mergeloom_itself_loads_lazily() -> None:
    loaded = loaded_by("import mergeloom")
    assert not loaded & {"torch", "numpy", "rich", "click", "networkx", "yaml"}
    assert not {name for name in loaded if name.startswith("mergeloom.")}


def test_the_command_line_loads_no_torch() -> None:
    assert not loaded_by("import mergeloom.__main__, mergeloom.engine.schedule.schedule") & {"torch", "networkx"}
