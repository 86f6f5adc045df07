"""Processes for the same recipe agree on their size, whichever side of a step they lie on."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from mergeloom.engine.cost import machine
from mergeloom.engine.cost.process_size import MAX_STORED, agreed_sizes, size_key
from mergeloom.engine.schedule.budget import DeviceBudget
from mergeloom.io import platform

MIB = 1 << 20
STEP = 16 * MIB


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mergeloom" / "process-sizes.json"


@pytest.mark.parametrize("sizes", [(64 * MIB - 1, 64 * MIB + 1), (64 * MIB + 1, 64 * MIB - 1), (60 * MIB, 63 * MIB)])
def test_two_processes_near_a_step_agree(stored: Path, sizes: tuple[int, int]) -> None:
    first = agreed_sizes((sizes[0], 2 * sizes[0]), STEP, "key")
    assert first[0] in (64 * MIB, 80 * MIB)
    assert all(size <= agreed for size, agreed in zip((sizes[1], 2 * sizes[1]), first, strict=True))
    assert agreed_sizes((sizes[1], 2 * sizes[1]), STEP, "key") == first


def test_a_size_that_does_not_fit_is_replaced(stored: Path) -> None:
    assert agreed_sizes((100 * MIB,), STEP, "key") == (112 * MIB,)
    assert agreed_sizes((113 * MIB,), STEP, "key") == (128 * MIB,)
    assert agreed_sizes((90 * MIB,), STEP, "key") == (96 * MIB,)  # one that fits with two steps to spare is too large
    assert agreed_sizes((90 * MIB,), STEP, "other") == (96 * MIB,)
    assert agreed_sizes((90 * MIB, 90 * MIB), STEP, "key") == (96 * MIB, 96 * MIB)


def test_only_the_newest_sizes_are_kept(stored: Path) -> None:
    for number in range(MAX_STORED + 10):
        agreed_sizes((number * MIB,), STEP, str(number))
    kept = json.loads(stored.read_text())
    assert list(kept) == [str(number) for number in range(10, MAX_STORED + 10)]


@pytest.mark.parametrize("content", ["", "[]", '{"key": 3}', '{"key": ["x"]}', "\0"])
def test_a_damaged_file_is_replaced(stored: Path, content: str) -> None:
    stored.parent.mkdir()
    stored.write_text(content)
    assert agreed_sizes((MIB,), STEP, "key") == (STEP,)
    assert json.loads(stored.read_text()) == {"key": [STEP]}


def test_without_a_cache_directory_each_process_rounds_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file: nothing can be made in it, not even by root
    assert agreed_sizes((13 * MIB,), STEP, "key") == (2 * STEP,)
    assert agreed_sizes((12 * MIB,), STEP, "key") == (STEP,)
    assert stat.S_ISREG(file.stat().st_mode)


def test_the_budgets_of_the_command_line_agree(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([(64 * MIB - 1, 96 * MIB + 1), (64 * MIB + 1, 96 * MIB - 1), (64 * MIB + 1, 96 * MIB - 1)])
    monkeypatch.setattr(machine, "process_memory", lambda: machine.ProcessMemory(*next(sizes)))
    monkeypatch.setattr(platform, "OWN_PROCESS", True)
    cpu = (DeviceBudget("cpu", None, 2),)
    first, second = (machine.make_budget(1 << 30, cpu, computes=True, key="key") for _ in range(2))
    assert first == second
    assert (first.baseline, first.held) == (80 * MIB + machine.SLACK_BYTES, 112 * MIB)
    assert machine.make_budget(1 << 30, cpu, computes=True).held == 96 * MIB  # no key, so no agreement


def test_the_key_has_all_that_the_memory_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    key = size_key("recipe", 3)
    assert key == size_key("recipe", 3) != size_key("recipe", 4)
    monkeypatch.setattr("mergeloom.engine.cost.process_size.__version__", "9")
    assert key != size_key("recipe", 3)
