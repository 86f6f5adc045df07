"""The process of a merge: its imports, its peak memory, rehearsals, interruptions and failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.cost.machine import process_memory
from mergeloom.engine.execute.measurements import Progress
from mergeloom.engine.run import session
from mergeloom.engine.run.merge import Result, merge
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, EnvironmentFailure, Interrupted
from mergeloom.io.output import directory, publish
from tests.support.models import FineTune, Random, tiny_llama, write_checkpoint
from tests.support.outputs import digests
from tests.support.plans import ROOMY, sliced, weighted_mean, weighted_slices
from tests.support.waiting import HANG_SECONDS

# ------------------------------------------------------------------------------------------------ the process


def imported_after(code: str) -> list[str]:
    """The heavy modules in a fresh interpreter after some code."""
    watched = "[name for name in ('torch', 'transformers', 'safetensors.torch', 'llvmlite') if name in sys.modules]"
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint({watched})"], capture_output=True, text=True, check=True
    )
    found: list[str] = json.loads(ended.stdout.splitlines()[-1].replace("'", '"'))
    return found


def test_the_cpu_loads_the_compiler_only_to_compute_and_never_torch(llamas: dict[str, Path], tmp_path: Path) -> None:
    averaged, stacked = (
        weighted_mean({llamas["a"]: 1, llamas["b"]: 1}),
        sliced((llamas["a"], 0, 3), (llamas["b"], 1, 4)),
    )
    planning = "from mergeloom import plan\nprint(plan({!r}, device='cpu'))"
    merging = "from mergeloom.engine.run.merge import merge\nprint(merge({!r}, {!r}).measured)"
    assert imported_after(planning.format(averaged)) == ["llvmlite"]  # the plan measures the process of the merge
    assert imported_after(planning.format(stacked)) == []
    assert imported_after(merging.format(stacked, str(tmp_path / "stacked"))) == []
    assert imported_after(merging.format(averaged, str(tmp_path / "averaged"))) == ["llvmlite"]


def test_the_report_has_the_peak_of_the_whole_process(llamas: dict[str, Path], tmp_path: Path) -> None:
    before = process_memory().peak
    result = merge(weighted_mean({llamas["a"]: 1, llamas["b"]: 1}), tmp_path / "out", ROOMY)
    measured = result.to_dict()["measured"]
    assert before <= measured["peak_rss"] <= process_memory().peak
    assert measured["bytes_read"] == result.plan.to_dict()["bytes_read"]
    assert measured["bytes_written"] == result.plan.to_dict()["bytes_written"]
    if sys.platform == "linux":
        high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        assert measured["peak_rss"] <= int(high.split()[1]) * 1024


def test_a_rehearsal_does_everything_and_writes_nothing(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = merge(weighted_slices(llamas), None, ROOMY)
    assert result.out is None
    assert result.measured.bytes_written == result.plan.schedule.bytes_written
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ interrupted


def test_an_interrupted_merge_leaves_nothing(llamas: dict[str, Path], tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        merge(weighted_slices(llamas), tmp_path / "a" / "b" / "out", ROOMY, notify=stop)
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "a").exists()
    merge(weighted_slices(llamas), tmp_path / "a" / "b" / "out", ROOMY)  # and nothing is in the way of the next


@pytest.mark.parametrize("when", ["write_model_files", "validate_shard", "rename", "sync_directory", "remove_tree"])
def test_a_merge_interrupted_while_it_publishes_is_resumed(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    calls = 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= (3 if when == "rename" else 1) and (when != "sync_directory" or list(out.glob("*.safetensors"))):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    homes: dict[str, Any] = {
        "write_model_files": session,
        "validate_shard": directory,
        "rename": publish,
        "sync_directory": publish,
        "remove_tree": publish,
    }
    original = getattr(homes[when], when)
    with monkeypatch.context() as patch:
        patch.setattr(homes[when], when, stop)
        with pytest.raises(Interrupted):
            merge(weighted_slices(llamas), out, replace(ROOMY, shard_size=60_000))
    assert when == "remove_tree" or not (out / "model.safetensors.index.json").exists()
    merge(weighted_slices(llamas), out, replace(ROOMY, shard_size=60_000))
    merge(weighted_slices(llamas), tmp_path / "at once", replace(ROOMY, shard_size=60_000))
    assert digests(out) == digests(tmp_path / "at once")


def test_a_signal_ends_the_process_with_130(tmp_path: Path, llamas: dict[str, Path]) -> None:
    code = (
        "import os, sys, threading\n"
        "from mergeloom.cli import signals\n"
        "from mergeloom.engine.execute.lanes import Lane\n"
        "from mergeloom.io.reading import Reader\n"
        "from mergeloom.__main__ import main\n"
        "stop, read, stopped = Lane.stop, Reader.read, threading.Event()\n"
        "def blocked(self, *arguments):\n"
        "    os.write(1, b'reading\\n'); stopped.wait(); read(self, *arguments)\n"
        "def stop_lane(lane):\n"
        "    stop(lane); stopped.set()\n"
        f"Reader.read, Lane.stop, signals.GRACE_SECONDS = blocked, stop_lane, {HANG_SECONDS}\n"
        "sys.exit(main(['merge', *sys.argv[1:], '--device', 'cpu', '--quiet']))\n"
    )
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(weighted_slices(llamas)))
    command = [sys.executable, "-c", code, str(recipe), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "reading" in process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_failure_in_a_lane_leaves_nothing(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        time.sleep(0.01)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("mergeloom.io.reading.read_at", fail)
    with pytest.raises(EnvironmentFailure, match="Input/output error"):
        merge(weighted_slices(llamas), tmp_path / "out", ROOMY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["shrinks", "goes", "is another"])
def test_a_source_that_changes_after_planning_is_an_error(what: str, tmp_path: Path) -> None:
    fills = [FineTune(Random(0), seed) for seed in (1, 2)]
    models = [
        write_checkpoint(tmp_path / name, tiny_llama(), fill=fill) for name, fill in zip("ab", fills, strict=True)
    ]
    planned = plan(weighted_mean(dict.fromkeys(models, 1.0)), ROOMY)
    file = models[1] / "model.safetensors"
    if what == "shrinks":
        file.write_bytes(file.read_bytes()[:-1000])
    elif what == "goes":
        file.unlink()
    else:
        shutil.copytree(write_checkpoint(tmp_path / "c", tiny_llama(layers=2)), models[1], dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=str(file)):
        merge(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_say_where_they_are(llamas: dict[str, Path], tmp_path: Path) -> None:
    result = merge(sliced((llamas["a"], 0, 4)), str(tmp_path / "out"), ROOMY)
    assert isinstance(result, Result)
    assert result.out == tmp_path / "out"
