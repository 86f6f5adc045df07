"""Imports follow the pipeline, without cycles, and heavy libraries load late."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT, python_files

FOLDERS = ("mergeloom", "engine", "methods", "io")

BOTTOM = {"mergeloom.errors", "mergeloom.version"}
"""Modules of the front end that everything may import, and that import nothing of mergeloom."""

LAYERS: dict[str, set[str]] = {
    "io": set(),
    "methods": set(),
    "recipe": {"methods", "io"},
    "model": {"recipe", "methods", "io"},
    "graph": {"model", "recipe", "methods", "io"},
    "schedule": {"graph", "model", "recipe", "methods", "io"},
    "execute": {"schedule", "graph", "model", "recipe", "methods", "io"},
    "files": {"schedule", "graph", "model", "recipe", "methods", "io"},
    "cost": {"execute", "schedule", "graph", "model", "recipe", "methods", "io"},
    "run": {"execute", "files", "cost", "schedule", "graph", "model", "recipe", "methods", "io"},
    "mergeloom": {"run", "execute", "files", "cost", "schedule", "graph", "model", "recipe", "methods", "io"},
}
"""The arrows of the design: the folders that a folder may import, besides itself. ``cost`` measures ``execute``."""

LIBRARIES: dict[str, set[str]] = {
    **{folder: {"rich", "click", "safetensors"} for folder in LAYERS},
    "graph": {"rich", "click", "safetensors"},
    "methods": {"rich", "click", "safetensors", "networkx", "yaml", "psutil"},
    "io": {"rich", "click", "networkx", "yaml", "torch"},
    "mergeloom": set(),
}
"""Which libraries a folder may not import, at the top or inside a function."""


def sources() -> Iterator[tuple[Path, str]]:
    """Every source file and the name of its module."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder == "mergeloom" and len(parts) > 2 and parts[1] in FOLDERS:
                continue  # a link to the folder itself
            parts = parts if folder == "mergeloom" else ("mergeloom", *parts)
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module: path for path, module in sources()}


def part_of(module: str) -> str:
    """The folder of the design that a module lies in."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] == "engine":
        return parts[2] if len(parts) > 2 else "engine"
    return parts[1] if len(parts) > 1 and parts[1] in ("methods", "io") else "mergeloom"


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and module of everything that a module imports, wherever in the file, for types only or not."""
    path = SOURCES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in SOURCES else base


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_arrows_of_the_design(module: str) -> None:
    part = part_of(module)
    for line, name in imports(module):
        where = f"{SOURCES[module].relative_to(ROOT)}:{line}: {part} imports {name}"
        library = name.split(".")[0]
        if library != "mergeloom":
            assert library not in LIBRARIES.get(part, set()), where
        elif name not in BOTTOM:
            assert module not in BOTTOM, where
            assert part_of(name) in {part, *LAYERS.get(part, set())}, where


def test_no_modules_import_each_other_in_a_cycle() -> None:
    TopologicalSorter({m: {name for _, name in imports(m) if name in SOURCES and name != m} for m in SOURCES}).prepare()


def test_the_arrows_of_the_design_have_no_cycle() -> None:
    TopologicalSorter(LAYERS).prepare()


def test_the_kernel_imports_no_method() -> None:
    for module in SOURCES:
        if module.startswith("mergeloom.methods.kernel"):
            for line, name in imports(module):
                inside = name.startswith("mergeloom.methods.kernel") or name in BOTTOM
                assert inside or not name.startswith("mergeloom"), f"{module}:{line} imports {name}"


def test_every_module_of_the_package_is_found_without_an_installation() -> None:
    """The package folder links to the other code folders, so editors and type checkers resolve every import."""
    for folder in ("engine", "methods", "io"):
        assert (ROOT / "mergeloom" / folder).resolve() == ROOT / folder


WITH_TORCH = {
    "mergeloom.engine.cost.measure_gpu",
    "mergeloom.engine.cost.measure_torch_memory",
    "mergeloom.engine.execute.devices.cuda",
    "mergeloom.engine.execute.compute.torch_computer",
}
"""Modules outside the torch backend that import torch at their top: those that only GPU merges import."""

INSIDE = {"mergeloom.engine.cost.devices", "mergeloom.engine.cost.prepare"}
"""Modules that import torch in a function."""


def test_torch_is_imported_only_by_modules_for_gpus() -> None:
    for module, path in SOURCES.items():
        if module.startswith("mergeloom.methods.kernel.torch_backend") or module in WITH_TORCH:
            continue
        of_types = {
            each
            for node in ast.walk(ast.parse(path.read_text(), path))
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for each in range(node.lineno, (node.end_lineno or 0) + 1)
        }
        for line, name in imports(module):
            if line not in of_types and name.split(".")[0] == "torch":
                assert module in INSIDE, f"{module}:{line} imports torch"
    for module in INSIDE:
        assert "torch" not in loaded_by(f"import {module}")


def test_the_modules_for_gpus_are_imported_late() -> None:
    allowed = WITH_TORCH | {"mergeloom.methods.kernel.torch_backend"}
    importing = "\n".join(f"import {module}" for module in SOURCES if not module.startswith(tuple(allowed)))
    assert not loaded_by(importing.replace("import mergeloom.__main__\n", "")) & {"torch"}


def test_llvm_is_imported_only_by_the_compiler() -> None:
    for module in SOURCES:
        for line, name in imports(module):
            inside = module == "mergeloom.methods.kernel.fused.compiler"
            assert inside or name.split(".")[0] != "llvmlite", f"{module}:{line} imports llvmlite"


# ------------------------------------------------------------------------------------------------ what is loaded


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout))


def test_io_loads_nothing_else() -> None:
    modules = [module for module in SOURCES if part_of(module) == "io"]
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert not loaded & {"torch", "rich", "click", "networkx", "mergeloom.engine", "mergeloom.methods"}


def test_mergeloom_itself_loads_lazily() -> None:
    loaded = loaded_by("import mergeloom")
    assert not loaded & {"torch", "numpy", "rich", "click", "networkx", "yaml"}
    assert {name for name in loaded if name.startswith("mergeloom.")} == {"mergeloom.version"}


def test_the_command_line_loads_no_torch() -> None:
    assert not loaded_by("import mergeloom.__main__, mergeloom.engine.run.planning") & {"torch", "networkx"}


# ------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("path", [p for p in python_files() if p.parts[len(ROOT.parts)] in ("tests", "benchmarks")])
def test_nothing_imports_from_a_test_module(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names if node.module == "tests")]
            assert not any(name.startswith("test_") for name in names), f"{path.relative_to(ROOT)}:{node.lineno}"
