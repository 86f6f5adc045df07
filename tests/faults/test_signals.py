"""Stopping a merge: signals, interrupts from Python, and errors of devices end it in good order."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.cli.signals import GRACE_SECONDS
from mergeloom.engine.execute.lanes import Lane
from mergeloom.engine.execute.measurements import Progress
from mergeloom.engine.run.merge import merge
from mergeloom.errors import EnvironmentFailure, Interrupted, MergeloomError
from mergeloom.io.output.lock import WORK
from tests.support.merges.resumable import OPTIONS, interrupt, recipe, run, write_models
from tests.support.merges.small import make_blocks_small
from tests.support.outputs import digests
from tests.support.waiting import HANG_SECONDS, no_hang


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        make_blocks_small(patch)
        yield


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base model and two fine-tunes."""
    return write_models(tmp_path)


# ------------------------------------------------------------------------------------------------ signals

BLOCKED = """
import os, sys, threading
from pathlib import Path
from mergeloom.cli import signals
from mergeloom.engine.run import merge as merging
from mergeloom.__main__ import main
from mergeloom.engine.execute.lanes import Lane
from mergeloom.io import platform

journal, released = Path(sys.argv[3]) / {work!r} / "journal", threading.Event()

def watch(call, *arguments):
    if call == "write" and journal.exists() and journal.read_bytes().count(b'{{"node"') > 2:
        os.write(1, b"blocked\\n")
        released.wait()

def stop_lane(lane):
    stop_at_once(lane)
    if {released}:
        released.set()

def stop_merge(self, number, frame):
    os.write(1, b"stopping\\n")
    raise_interrupt(self, number, frame)

platform.WATCH = watch
stop_at_once, Lane.stop = Lane.stop, stop_lane
raise_interrupt, signals.StopSignals._stop = signals.StopSignals._stop, stop_merge
signals.GRACE_SECONDS = {grace}
merge = merging.merge
merging.merge = lambda *a, **k: merge(*a, **k, group_bytes=40000)
sys.exit(main(sys.argv[1:]))
"""
"""A merge whose writes block after a few commits: until its lanes are stopped, or for ever."""


def spawn(
    models: list[Path], out: Path, tmp_path: Path, *, released: bool, grace: float = HANG_SECONDS
) -> subprocess.Popen[str]:
    """Start a merge, and wait until it blocks.

    Args:
        models: the sources.
        out: the output directory.
        tmp_path: where the recipe is written.
        released: whether the blocked writes end once the lanes are stopped.
        grace: seconds until the process gives up stopping in good order.
    """
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe(models)))
    program = BLOCKED.format(work=WORK, released=released, grace=grace)
    command = [sys.executable, "-c", program, "merge", str(tmp_path / "recipe.yml"), str(out)]
    command += ["--device", "cpu", "--threads", "1", "--shard-size", "400000", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_line(process, "blocked\n")
    return process


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    """Read what a process prints up to a line."""
    assert process.stdout is not None
    assert line in iter(process.stdout.readline, ""), process.communicate(timeout=HANG_SECONDS)[1]


def test_stopping_in_good_order_may_take_less_than_two_seconds() -> None:
    assert GRACE_SECONDS < 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_good_order_and_it_goes_on(
    number: signal.Signals, models: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = spawn(models, out, tmp_path, released=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 128 + number, errors
    assert f"finished work is kept in {out}; run the same command again to resume" in errors
    assert "Traceback" not in errors
    file = tmp_path / "recipe.yml"
    said: list[str] = []
    merge(file, out, OPTIONS, say=said.append)
    assert said[0].startswith("resuming: ")
    merge(file, tmp_path / "whole", OPTIONS)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once_and_so_does_a_disk_that_hangs(
    number: signal.Signals, models: list[Path], tmp_path: Path
) -> None:
    """Every lane hangs in a write, as on a network file system that has gone."""
    outs = [tmp_path / "twice", tmp_path / "once"]
    for out in outs:
        twice = out.name == "twice"
        process = spawn(models, out, tmp_path, released=False, grace=10 * HANG_SECONDS if twice else 0.1)
        process.send_signal(number)
        if twice:
            wait_for_line(process, "stopping\n")
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 128 + number
        assert ("killed; run the same command to resume" in errors) == (not twice)
        assert "Traceback" not in errors
        merge(tmp_path / "recipe.yml", out, OPTIONS)
    assert digests(outs[0]) == digests(outs[1])


def test_from_python_too_an_interrupt_can_be_gone_on_from(models: list[Path], tmp_path: Path) -> None:
    journal = tmp_path / "out" / WORK / "journal"
    stop_at_once, stopped = Lane.stop, threading.Event()

    def committed() -> bool:
        # then the first tensor is complete; a part of its only chunk would be computed again
        return journal.exists() and b'{"node":1,' in journal.read_bytes()

    def stop(progress: Progress) -> None:
        if committed():
            raise KeyboardInterrupt

    def watch(call: str, *arguments: object) -> None:
        if call == "write" and committed():
            stopped.wait()

    def stop_lane(lane: Lane[Any]) -> None:
        stop_at_once(lane)
        stopped.set()

    with no_hang(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergeloom.engine.execute.executor.NOTIFY_SECONDS", 0.001)
        patch.setattr("mergeloom.io.platform.WATCH", watch)
        patch.setattr(Lane, "stop", stop_lane)
        with pytest.raises(Interrupted, match="run the same command again to resume"):
            run(recipe(models), tmp_path / "out", notify=stop)
    run(recipe(models), tmp_path / "out")
    run(recipe(models), tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_progress_after_a_resume_counts_what_was_done_before(models: list[Path], tmp_path: Path) -> None:
    interrupt(recipe(models), tmp_path / "out", 10)
    resumed: list[Progress] = []
    result = run(recipe(models), tmp_path / "out", notify=lambda progress: resumed.append(replace(progress)))
    counts = [(each.bytes_earlier, each.bytes_read + each.bytes_written) for each in resumed if not each.bytes_to_check]
    earlier = result.earlier.bytes_read + result.earlier.bytes_written
    assert earlier > 0
    assert {count for count, _ in counts} == {earlier}
    assert min(moved for _, moved in counts) >= earlier


def test_device_errors_end_with_what_happened(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AcceleratorError(RuntimeError):
        """As torch's."""

    for error, said in (
        (AcceleratorError("CUDA error: an illegal memory access\nmore"), "the device failed .CUDA error: an illegal"),
        (MemoryError("no"), "less memory than was promised"),
    ):

        def fail(*arguments: object, error: BaseException = error, **options: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("mergeloom.engine.run.run_lanes.run_graph", fail)
            with pytest.raises(EnvironmentFailure, match=f"{said}.*run the same command again"):
                run(recipe(models), tmp_path / "out")
    run(recipe(models), tmp_path / "out")


def test_an_interrupt_while_it_is_still_looking_leaves_nothing(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    for function in ("facts_of", "SourceFiles", "with_reflinks", "recover"):
        with monkeypatch.context() as patch:
            patch.setattr(f"mergeloom.engine.run.session.{function}", stop)
            with pytest.raises(Interrupted, match="nothing is left behind"):
                run(recipe(models), tmp_path / "deep" / "out")
        assert not (tmp_path / "deep").exists()


def test_all_errors_are_ours(models: list[Path], tmp_path: Path) -> None:
    """What is in the way of OUT is said, whatever it is."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file", tmp_path / "a\0b", Path("/proc/nothing/out")):
        with pytest.raises(MergeloomError):
            run(recipe(models), out)
