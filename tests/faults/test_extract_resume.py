"""Extractions that are killed, run out of space or lose data: the same command makes the same bytes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import mergeloom
from mergeloom.engine.run.extract import staging
from mergeloom.errors import DiskSpaceError, Interrupted, UsageError
from mergeloom.io.output.lock import WORK
from tests.support.command_line import COMMAND, run
from tests.support.extraction.matrices import noise, save_models
from tests.support.faults import Disk, Fail, Kill, Stopped, watching
from tests.support.outputs import digests
from tests.support.waiting import wait_until

Models = tuple[Path, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A model and its base: matrices, a norm, and an unchanged matrix between them."""
    base = {f"model.layers.{layer}.{each}_proj.weight": noise(layer, 24, 40) for layer in range(2) for each in "qkv"}
    base["model.norm.weight"] = noise(9, 1, 40)[0]
    delta = {
        name: np.full(value.shape, 0.25) + noise(5, *np.atleast_2d(value).shape)[0, 0] for name, value in base.items()
    }
    del delta["model.layers.0.v_proj.weight"]
    return save_models(tmp_path_factory.mktemp("models"), base, delta)


@pytest.fixture(scope="module")
def expected(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of all files if nothing goes wrong."""
    out = tmp_path_factory.mktemp("expected") / "out"
    extract(models, out)
    return digests(out)


@pytest.fixture(autouse=True)
def commit_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each job durable at once, as if it had taken long."""
    monkeypatch.setattr(staging, "COMMIT_SECONDS", 0.0)


def extract(models: Models, out: Path, **options: object) -> mergeloom.ExtractedAdapter:
    """Extract an adapter of rank 4."""
    return mergeloom.extract_lora(*models, out, rank=4, threads=1, **options)  # type: ignore[arg-type]


def stopped(models: Models, out: Path, watch: Callable[..., None]) -> bool:
    """Extract until it is stopped; whether it was."""
    with watching(watch):
        try:
            extract(models, out)
        except Stopped:
            return True
    return False


def kill_points() -> Iterator[int]:
    """The numbers of calls after which a run is killed: all of them, up to more than a run makes."""
    yield from range(200)


def test_killed_after_any_call_it_resumes_with_the_same_bytes(
    models: Models, expected: dict[str, str], tmp_path: Path
) -> None:
    for after in kill_points():
        out = tmp_path / f"out{after}"
        if not stopped(models, out, Kill(after, torn=after % 2 == 1)):
            assert after > 40
            break
        extract(models, out)
        assert digests(out) == expected, after
        assert not (out / WORK).exists()
    else:
        pytest.fail("the run never finished")


def test_killed_again_and_again(models: Models, expected: dict[str, str], tmp_path: Path) -> None:
    out, draw = tmp_path / "out", random.Random(0)
    kills = sum(stopped(models, out, Kill(draw.randrange(8, 30))) for _ in range(8))
    assert kills > 3
    extract(models, out)
    assert digests(out) == expected


def kill_when(command: list[str], out: Path, nbytes: int) -> None:
    """Run a command until its unfinished weights have a size in bytes, and kill it with SIGKILL."""
    process = subprocess.Popen(command)
    weights = out / WORK / "out" / "adapter_model.safetensors"

    def reached() -> bool:
        return process.poll() is not None or (weights.exists() and weights.stat().st_size >= nbytes)

    wait_until(reached)
    process.kill()
    process.wait()


def test_a_killed_process_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    base = {f"model.layers.{layer}.q_proj.weight": noise(layer, 600, 700) for layer in range(12)}
    pair = save_models(tmp_path, base, {name: noise(20, 600, 700, 0.1) for name in base})
    command = [*COMMAND, "extract-lora", *map(str, pair)]
    options = ["--rank", "8", "--threads", "1", "--quiet"]
    subprocess.run([*command, str(tmp_path / "expected"), *options], check=True)
    out = tmp_path / "out"
    for parts in (2, 5, 9):
        kill_when([*command, str(out), *options], out, parts * 8 * 1300 * 4)
    subprocess.run([*command, str(out), *options], check=True)
    assert digests(out) == digests(tmp_path / "expected")


def test_finished_matrices_are_not_read_again(models: Models, expected: dict[str, str], tmp_path: Path) -> None:
    whole = extract(models, tmp_path / "whole")
    kill = Kill()
    assert not stopped(models, tmp_path / "counted", kill)
    assert stopped(models, tmp_path / "out", Kill(kill.calls.index("rename") + 15))
    said: list[str] = []
    resumed = extract(models, tmp_path / "out", say=said.append)
    assert 0 < resumed.bytes_read < whole.bytes_read
    assert any("resuming" in text for text in said)
    assert digests(tmp_path / "out") == expected
    assert resumed.matrices == whole.matrices


def test_damaged_bytes_are_made_again(models: Models, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert stopped(models, out, Kill(40))
    weights = out / WORK / "out" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    extract(models, out)
    assert digests(out) == expected


def test_an_interrupt_keeps_finished_work(
    models: Models, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergeloom.engine.run.extract import execution

    calls = 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return decompose(*arguments)  # type: ignore[arg-type]

    decompose = execution.decompose
    monkeypatch.setattr(execution, "decompose", interrupted)
    with pytest.raises(Interrupted, match="run the same command again to resume"):
        extract(models, tmp_path / "out")
    extract(models, tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_an_interrupt_before_anything_is_finished_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergeloom.engine.run.extract import execution

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "decompose", interrupted)
    with pytest.raises(Interrupted, match="nothing is left behind"):
        extract(models, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["write", "sync"])
def test_a_full_disk_is_an_error_and_the_run_resumes(
    models: Models, expected: dict[str, str], tmp_path: Path, call: str
) -> None:
    out = tmp_path / "out"
    with watching(Fail(errno.ENOSPC, 5, call)), pytest.raises(DiskSpaceError):
        extract(models, out)
    extract(models, out)
    assert digests(out) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "--rank 4 instead of 3"),
        ({"seed": 1}, "--seed 0 instead of 1"),
        ({"exclude": "q_proj"}, "--exclude none instead of q_proj"),
    ],
)
def test_an_unfinished_run_with_other_options_is_refused(
    models: Models, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    out = tmp_path / "out"
    assert stopped(models, out, Kill(40))
    before = digests(out)
    with pytest.raises(UsageError, match=f"unfinished extraction with {message}.*--restart"):
        mergeloom.extract_lora(*models, out, **({"rank": 4} | options))  # type: ignore[arg-type]
    assert digests(out) == before
    mergeloom.extract_lora(*models, out, restart=True, **({"rank": 4} | options))  # type: ignore[arg-type]
    assert (out / "adapter_config.json").exists()


def test_another_model_is_refused(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert stopped(models, out, Kill(40))
    model, base = models
    with pytest.raises(UsageError, match="another MODEL, or other contents and another BASE, or other contents"):
        extract((base, model), out)


def test_a_finished_adapter_is_not_made_again(models: Models, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = extract(models, out)
    said: list[str] = []
    again = extract(models, out, say=said.append)
    assert said == [f"{out} is already complete, nothing to do"]
    assert (again.matrices, again.saved, again.nbytes) == (first.matrices, first.saved, first.nbytes)
    assert again.bytes_read == 0
    with pytest.raises(UsageError, match="finished extraction with --rank 4 instead of 2"):
        mergeloom.extract_lora(*models, out, rank=2, say=said.append)
    assert len(said) == 1  # nothing is said to be complete that is then refused


def test_a_merge_and_an_extraction_refuse_the_unfinished_work_of_each_other(models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert stopped(models, out, Kill(40))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {models[0]}}}]\n")
    ended = run("merge", recipe, out)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert "holds an unfinished extraction of an adapter, not a merge" in ended.stderr
    with watching(Kill(25)), pytest.raises(Stopped):
        mergeloom.merge(recipe, tmp_path / "merge")
    assert (tmp_path / "merge" / WORK / "journal").exists()
    with pytest.raises(UsageError, match="an unfinished merge, not an extraction"):
        extract(models, tmp_path / "merge")


def test_a_source_that_changes_during_the_run_is_an_error(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergeloom.engine.run.extract import execution
    from mergeloom.errors import CheckpointError

    copied = tmp_path / "tuned"
    copied.mkdir()
    file = copied / "model.safetensors"
    file.write_bytes((models[0] / "model.safetensors").read_bytes())
    decompose = execution.decompose

    def touched(*arguments: object) -> object:
        factors = decompose(*arguments)  # type: ignore[arg-type]
        os.utime(file, (1, 1))
        return factors

    monkeypatch.setattr(execution, "decompose", touched)
    with pytest.raises(CheckpointError, match="was changed during the"):
        extract((copied, models[1]), tmp_path / "out")
    monkeypatch.undo()
    said: list[str] = []
    extract((copied, models[1]), tmp_path / "out", say=said.append)
    assert said == ["source files were written to or replaced since the extraction began: it starts over"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_power_fails_after_any_call(models: Models, expected: dict[str, str], tmp_path: Path, share: float) -> None:
    for after in range(4, 120, 7):
        root = tmp_path / f"root{after}"
        root.mkdir()
        disk = Disk(root, after)
        if not stopped(models, root / "out", disk):
            assert after > 40
            break
        disk.lose(random.Random(after), share)
        extract(models, root / "out")
        assert digests(root / "out") == expected, after


def test_a_terminated_command_says_that_it_resumes(tmp_path: Path) -> None:
    base = {f"model.layers.{layer}.q_proj.weight": noise(layer, 600, 700) for layer in range(40)}
    pair = save_models(tmp_path, base, {name: noise(20, 600, 700, 0.1) for name in base})
    out = tmp_path / "out"
    command = [*COMMAND, "extract-lora", *map(str, pair), str(out), "--rank", "64", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    weights = out / WORK / "out" / "adapter_model.safetensors"
    wait_until(lambda: weights.exists() and weights.stat().st_size > 3 * 64 * 1300 * 4)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    assert f"stopped: finished work is kept in {out}; run the same command again to resume" in errors
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0
    assert "parts already extracted and checked" in resumed.stderr
