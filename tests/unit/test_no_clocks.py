"""No test asserts seconds: a busy machine must not make one fail. Count work (see `counting`), or wait for events."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TESTS = ROOT / "tests"
CLOCKS = {
    *("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"),
    *("process_time", "process_time_ns", "thread_time", "thread_time_ns"),
    *("clock_gettime", "clock_gettime_ns", "times", "getrusage", "ru_utime", "ru_stime", "now", "utcnow"),
}
"""Functions and attributes that give a time."""
MENTIONED = re.compile(rf"\b(?:{'|'.join(sorted(CLOCKS))})\b")
COUNTERS = {"ru_maxrss"}
"""Fields of ``getrusage`` that are not times."""


def reads_clock(node: ast.AST, clocks: set[str]) -> bool:
    """Whether an expression reads a clock, or a variable that holds a reading."""
    if isinstance(node, ast.Attribute) and node.attr in COUNTERS:
        return False
    if isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in CLOCKS:
            return True
    if isinstance(node, ast.Attribute) and node.attr in CLOCKS and node.attr.startswith("ru_"):
        return True
    if isinstance(node, ast.Name) and node.id in clocks:
        return True
    return any(reads_clock(child, clocks) for child in ast.iter_child_nodes(node))


def names_of(target: ast.expr) -> Iterator[str]:
    """The variables that an assignment sets."""
    for node in ast.walk(target):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def clocks_of(scope: ast.AST) -> set[str]:
    """The variables of a function or a module that hold a reading, directly or by way of other variables."""
    clocks: set[str] = set()
    before = -1
    while len(clocks) != before:
        before = len(clocks)
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign) and reads_clock(node.value, clocks):
                clocks.update(name for target in node.targets for name in names_of(target))
            elif (
                isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr)
                and node.value is not None
                and reads_clock(node.value, clocks)
            ):
                clocks.update(names_of(node.target))
    return clocks


def timed_functions(tree: ast.Module) -> set[str]:
    """The functions of a module that return a reading."""
    return {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and node.value is not None and reads_clock(node.value, clocks_of(function))
    }


def timed_asserts(source: str) -> list[int]:
    """The lines of the asserts that depend on a clock."""
    if not MENTIONED.search(source):
        return []
    tree = ast.parse(source)
    timed = timed_functions(tree)
    found = set()
    for scope in ast.walk(tree):
        if isinstance(scope, ast.FunctionDef | ast.Module):
            clocks = clocks_of(scope) | timed
            body = ast.walk(scope) if isinstance(scope, ast.FunctionDef) else iter(scope.body)
            found |= {node.lineno for node in body if isinstance(node, ast.Assert) and reads_clock(node.test, clocks)}
    return sorted(found)


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: file.name)
def test_no_assert_depends_on_a_clock(file: Path) -> None:
    assert timed_asserts(file.read_text()) == []


@pytest.mark.parametrize(
    "body",
    [
        "assert time.monotonic() < 5",
        "start = time.perf_counter(); f(); assert time.perf_counter() - start < 5",
        "start = perf_counter(); f(); seconds = perf_counter() - start; share = seconds / 2; assert share < 1",
        "taken: float = time.process_time(); assert taken < 1",
        "assert any(elapsed() < 1.25 for _ in range(4))",
        "assert (taken := time.thread_time()) < 1",
        "usage = resource.getrusage(0); assert usage.ru_utime < 1",
        "for _ in range(3):\n        best = min(best, time.time())\n    assert best < 1",
    ],
)
def test_an_assert_that_depends_on_a_clock_is_found(body: str) -> None:
    helper = "def elapsed():\n    start = time.time()\n    f()\n    return time.time() - start\n\n"
    assert len(timed_asserts(f"{helper}def test():\n    {body}\n")) == 1


def test_other_asserts_are_not_found() -> None:
    body = "before = resource.getrusage(0).ru_maxrss; assert resource.getrusage(0).ru_maxrss - before < 5"
    assert timed_asserts(f"def test():\n    {body}\n    assert found.seconds == 3\n") == []
