"""Mutated PyTorch files are refused or read as torch reads them; nothing is executed, and memory is bounded."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.models.torch_mutations import BYTES, Outcome, Watch, fuzz


def check(outcome: Outcome, count: int) -> None:
    """Most files were refused, some were accepted unchanged, a few read otherwise, as torch does."""
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.tried == count
    assert count // 2 < outcome.refused < count - outcome.changed
    assert outcome.peak < BYTES


def test_mutated_files_are_refused_or_read_as_torch_does(tmp_path: Path) -> None:
    check(fuzz(400, 11, tmp_path), 400)


def test_twenty_thousand_mutated_files(tmp_path: Path) -> None:
    outcome = fuzz(20_000, 21, tmp_path)
    check(outcome, 20_000)
    assert outcome.changed > 100


def test_the_watch_sees_what_is_executed(tmp_path: Path) -> None:
    with Watch.on() as seen:
        exec("1")
        subprocess.run(["true"], check=True)
        (tmp_path / "x").write_text("x")
    assert [event.split(" ")[0] for event in seen if not event.startswith("import")][:2] == ["compile", "exec"]
    assert any(event.startswith("subprocess.Popen") for event in seen)
    assert any(event.startswith("open") and "/x'" in event for event in seen)
    with Watch.on() as seen:
        (tmp_path / "x").read_bytes()
    assert seen == []


@pytest.mark.parametrize("call", ["exec('1')", "compile('1', 'x', 'eval')"])
def test_the_watch_is_quiet_afterwards(call: str) -> None:
    with Watch.on() as seen:
        pass
    eval(call)
    assert seen == []
