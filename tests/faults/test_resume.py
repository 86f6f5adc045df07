"""Resuming an unfinished merge: what is kept, what is refused, and what may change in between."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.execute.measurements import Progress
from mergeloom.engine.run.manifest import MANIFEST
from mergeloom.errors import CheckpointError, EnvironmentFailure, UsageError
from mergeloom.io.output.directory import OutputDirectory
from mergeloom.io.output.lock import WORK
from mergeloom.report.result import result_sections
from tests.support.faults import Kill, Stopped, watching
from tests.support.merges.resumable import OPTIONS, SHAPES, interrupt, recipe, run, write_models
from tests.support.merges.small import make_blocks_small
from tests.support.models import FineTune, Random, write_checkpoint
from tests.support.outputs import digests


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        make_blocks_small(patch)
        yield


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base model and two fine-tunes."""
    return write_models(tmp_path)


def test_what_was_done_is_not_done_again(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = run(recipe(models), tmp_path / "whole")
    interrupt(recipe(models), out, 10)
    said: list[str] = []
    shown: list[Progress] = []
    result = run(recipe(models), out, say=said.append, notify=lambda p: shown.append(replace(p)))
    assert digests(out) == digests(tmp_path / "whole")
    assert result.earlier.bytes_written > 0  # how much ten commits hold depends on the writers
    assert 0 < result.measured.bytes_written < expected.measured.bytes_written
    for key in ("bytes_read", "bytes_written", "bytes_shared"):
        told = result.to_dict()
        assert told["measured"][key] + told["measured"]["earlier"][key] == told[key], key
    assert len(said) == 1
    assert re.fullmatch(r"resuming: \S+KB of 402KB already written and checked, \S+KB left", said[0])
    merged = [progress for progress in shown if not progress.bytes_to_check]
    assert merged[0].bytes_written >= result.earlier.bytes_written  # the display shows the complete merge
    checked = [progress for progress in shown if progress.bytes_to_check]
    assert checked[-1].bytes_checked == checked[-1].bytes_to_check == result.measured.bytes_checked
    assert checked[-1].bytes_checked >= result.earlier.bytes_written
    assert expected.to_dict()["measured"]["earlier"] == {"bytes_read": 0, "bytes_written": 0, "bytes_shared": 0}


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "passthrough"])
def test_everything_that_may_change_changes_nothing(
    method: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, budget and with it the pieces that tensors are cut into, at each of several restarts."""
    what = recipe(models, method)
    if method == "passthrough":
        what = {"merge_method": method, "models": [{"model": str(models[1])}]}
    elif method == "linear":
        del what["base_model"]
    elif method == "slerp":
        what = {**what, "models": what["models"][:1], "parameters": {"t": 0.3}}
    run(what, tmp_path / "whole")
    for number in range(4):
        out = tmp_path / f"out{number}"
        restarts = 0
        while True:
            monkeypatch.setattr(
                "mergeloom.engine.schedule.schedule.SLOT_BYTES", (64, 128, 4096, 1024)[restarts % 4] << 10
            )
            options = replace(OPTIONS, threads=1 + restarts % 3, max_ram=(4 + restarts % 2) << 30)
            try:
                with watching(Kill(34 + 3 * number + 2 * restarts)):
                    run(what, out, options)
            except Stopped:
                restarts += 1
            else:
                break
        assert restarts > 1
        assert digests(out) == digests(tmp_path / "whole")


def test_models_may_have_moved(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe(models), tmp_path / "whole")
    interrupt(recipe(models), out)
    (tmp_path / "elsewhere").mkdir()
    moved = [model.rename(tmp_path / "elsewhere" / model.name) for model in models]
    said: list[str] = []
    run(recipe(moved), out, say=said.append)
    found, expected = digests(out), digests(tmp_path / "whole")
    assert {name for name in expected if found[name] != expected[name]} <= {
        MANIFEST,
        "README.md",
        "mergekit_config.yml",
    }
    assert not any("warning" in text for text in said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed", "the seed: it was 0, and is 1"),
        ("shard_size", "the shard size: it was 400000, and is 500000"),
        ("weight", r'the recipe: .*"weight": 0.5.*0.25|the recipe'),
        ("dtype", "the recipe"),
        ("order", "the source file model.safetensors of .*/b; "),
        ("source", "the source file model.safetensors of .*/a"),
        ("header", "the source file model.safetensors of .*/a"),
    ],
)
def test_what_changes_bytes_is_refused_with_the_difference(
    change: str, said: str, models: list[Path], tmp_path: Path
) -> None:
    out, what, options = tmp_path / "out", recipe(models), OPTIONS
    interrupt(what, out)
    before = digests(out)
    if change in ("seed", "shard_size"):
        options = replace(options, **{"seed": {"seed": 1}, "shard_size": {"shard_size": 500_000}}[change])
    elif change == "weight":
        what["models"][0]["parameters"]["weight"] = 0.25
    elif change == "dtype":
        what["dtype"] = "bfloat16"
    elif change == "order":
        what["models"].reverse()
    elif change == "source":
        write_checkpoint(models[1], SHAPES, dtype="F32", fill=9)
    else:
        write_checkpoint(models[1], SHAPES, dtype="F32", fill=FineTune(Random(0), 1), metadata={"a": "b"})
    with pytest.raises(UsageError, match=f"this one differs from it: .*{said}") as refused:
        run(what, out, options)
    assert "--restart" in str(refused.value)
    assert digests(out) == {**before, f"{WORK}/pid": digests(out)[f"{WORK}/pid"]}  # nothing was touched
    run(what, out, options, fresh=True)
    run(what, tmp_path / "whole", options)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_stage_inside_that_changes_is_seen(models: list[Path], tmp_path: Path) -> None:
    """Rounding an intermediate changes no name, type or method of the output."""
    texts = []
    for rounding in ("", "out_dtype: float16\n"):
        texts.append(
            f"name: inner\nmerge_method: linear\n{rounding}models:\n"
            f"  - model: {models[1]}\n    parameters: {{weight: 1}}\n"
            f"  - model: {models[2]}\n    parameters: {{weight: 1}}\n---\nmerge_method: linear\nmodels:\n"
            f"  - model: inner\n    parameters: {{weight: 1}}\n  - model: {models[0]}\n    parameters: {{weight: 1}}\n"
        )
    file = tmp_path / "recipe.yml"
    file.write_text(texts[0])
    interrupt(file, tmp_path / "out")
    file.write_text(texts[1])
    with pytest.raises(UsageError, match=r"the recipe: .*out_dtype"):
        run(file, tmp_path / "out")


def test_a_source_that_was_touched_is_told(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(recipe(models), out)
    os.utime(models[1] / "model.safetensors")
    said: list[str] = []
    run(recipe(models), out, say=said.append)
    assert re.fullmatch(
        r"warning: written to or replaced since the merge began: model\.safetensors; the [\d.]+KB read from them "
        r"are unchanged, so the merge resumes",
        said[0],
    )


def test_a_damaged_journal_is_refused_and_kept(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(recipe(models), out)
    journal = out / WORK / "journal"
    for content in (b"", b"damaged\n" + journal.read_bytes(), journal.read_bytes()[5:]):
        journal.write_bytes(content)
        with pytest.raises(UsageError, match=r"an unfinished merge with a damaged journal: .*--restart"):
            run(recipe(models), out)
        assert journal.read_bytes() == content
    run(recipe(models), out, fresh=True)


# ------------------------------------------------------------------------------------------------ finished


def test_a_finished_merge_is_left_as_it_is(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe(models), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said: list[str] = []
    result = run(recipe(models), out, say=said.append)
    assert [text.partition(": ")[0] for text in said] == [f"{out} is already complete, nothing to do"]
    assert result.measured.bytes_written == 0
    assert result_sections(result) == []
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / WORK).mkdir()  # what is left where it was killed in the very last moment
    (out / WORK / "pid").write_text("1\n")
    run(recipe(models), out)
    assert not (out / WORK).exists()
    with pytest.raises(UsageError, match="holds a finished merge, and this one differs from it: the seed: it was 0"):
        run(recipe(models), out, replace(OPTIONS, seed=1))
    with pytest.raises(UsageError, match="this one differs from it"):
        run(recipe(models), out, replace(OPTIONS, seed=1), fresh=True)
    os.truncate(out / "model-00001-of-00002.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors: has 100 bytes instead of"):
        run(recipe(models), out)
    (out / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="was changed since it was written"):
        run(recipe(models), out)


# ------------------------------------------------------------------------------------------------ two at a time


def test_an_out_that_was_removed_meanwhile_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One merge removes its OUT at its end while another one has it open, and a third one makes it anew."""
    from mergeloom.io.output import lock as claim

    flock = claim.fcntl.flock
    first = OutputDirectory.open(tmp_path / "out")
    third: list[OutputDirectory] = []

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(claim.fcntl, "flock", flock)
        first.abandon()
        first.close()
        third.append(OutputDirectory.open(tmp_path / "out"))
        flock(descriptor, operation)

    monkeypatch.setattr(claim.fcntl, "flock", late)
    with pytest.raises(EnvironmentFailure, match="another merge has just removed it; try again"):
        OutputDirectory.open(tmp_path / "out")
    third[0].close()


def test_the_holder_is_named(tmp_path: Path) -> None:
    held = OutputDirectory.open(tmp_path / "out")
    with pytest.raises(
        EnvironmentFailure, match=rf"another run of mergeloom is writing here \(process {os.getpid()}\)"
    ) as refused:
        OutputDirectory.open(tmp_path / "out")
    assert refused.value.exit_code == 5
    held.close()
