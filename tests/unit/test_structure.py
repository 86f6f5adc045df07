"""The bounds of the design on the code itself: files, functions and folders stay small, and each file says its job."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT, python_files

MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_FILES = 16


FILES = python_files()
IDS = [str(path.relative_to(ROOT)) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_says_its_one_job_and_is_short(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text, path)
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring that says its job"
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"


def test_no_folder_has_more_files_than_a_reader_can_take_in() -> None:
    folders: dict[Path, int] = {}
    for path in FILES:
        folders[path.parent] = folders.get(path.parent, 0) + 1
    assert {str(folder.relative_to(ROOT)): count for folder, count in folders.items() if count > MOST_FILES} == {}


def test_the_list_of_long_tests_names_tests_that_exist() -> None:
    """Else a test that was renamed runs in `make test` again, and nobody knows why that takes so long."""
    for line in (ROOT / "tests" / "long.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        file, _, test = line.partition("::")
        assert (ROOT / file).exists(), line
        if test:
            name, parameters, _ = test.partition("[")
            end = r"\(" if parameters else r"\w*\("
            assert re.search(rf"^def {re.escape(name)}{end}", (ROOT / file).read_text(), re.M), line
