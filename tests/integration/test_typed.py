"""The public API as a typed program uses it, and the types of every function."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mergeloom
from tests.support.paths import ROOT

PROGRAM = ROOT / "tests" / "support" / "scripts" / "typed.py"


def test_the_program_uses_every_public_name() -> None:
    """`make check` checks the types of the program; so it checks those of every public name."""
    used = {
        node.attr
        for node in ast.walk(ast.parse(PROGRAM.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mergeloom"
    }
    assert used == set(mergeloom.__all__)
    assert "$(BIN)/mypy --strict tests/support/scripts/typed.py\n" in (ROOT / "Makefile").read_text()


def test_the_program_runs(llamas: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.scripts.typed", str(llamas["a"]), str(llamas["b"]), str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "2"


@pytest.mark.slow
def test_the_program_passes_mypy() -> None:
    command = [sys.executable, "-m", "mypy", "--strict", str(PROGRAM)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", ["diff", "inspect", "merge", "methods", "plan", "stack", "verify"])
def test_functions_are_typed_and_documented(name: str) -> None:
    from mergeloom.methods import list_methods

    function = list_methods if name == "methods" else getattr(mergeloom, name)
    signature = inspect.signature(function)
    doc = inspect.getdoc(function) or ""
    assert signature.return_annotation in (
        "Plan",
        "Result",
        "Inspection",
        "Verdict",
        "Diff",
        "Recipe",
        "dict[str, Method]",
    )
    assert "Raises:" in doc
    arguments = doc.partition("Args:")[2].partition("Raises:")[0]
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert parameter.name in arguments, parameter
    assert inspect.signature(mergeloom.methods) == inspect.signature(list_methods)
