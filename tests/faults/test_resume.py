"""Going on with an unfinished merge: what is kept, what is refused, what is said, and that the bytes are the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.cli.signals import GRACE_SECONDS
from mergeloom.engine.execute.lane import Lane
from mergeloom.engine.execute.tasks import Progress
from mergeloom.engine.run.manifest import MANIFEST
from mergeloom.engine.run.merge import Result, merge
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, EnvironmentFailure, Interrupted, MergeloomError, UsageError
from mergeloom.io.output.directory import WORK, OutputDirectory
from mergeloom.io.output.journal import Journal, read_journal
from mergeloom.report.result import result_sections
from tests.support.faults import Kill, Stopped, watching
from tests.support.models.write import FineTune, Random, write_checkpoint
from tests.support.outputs import digests
from tests.support.small_merge import make_blocks_small
from tests.support.waiting import HANG_SECONDS, no_hang

OPTIONS = Options(max_ram=4 << 30, device="cpu", threads=1, shard_size=400_000)
GROUP = 40 << 10
SHAPES = {
    "model.embed_tokens.weight": (400, 128),
    **{f"model.layers.{layer}.w.weight": (96, 128) for layer in range(4)},
    "model.norm.weight": (128,),
}


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        make_blocks_small(patch)
        yield


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two fine-tunes."""
    found = [
        write_checkpoint(tmp_path / name, SHAPES, dtype="F32", fill=FineTune(Random(0), seed))
        for seed, name in enumerate(("base", "a", "b"))
    ]
    (found[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    return found


def recipe(models: list[Path], method: str = "dare_ties", **more: object) -> dict[str, Any]:
    """A random method, of several passes."""
    named = [{"model": str(model), "parameters": {"weight": 0.5, "density": 0.5}} for model in models[1:]]
    return {"merge_method": method, "base_model": str(models[0]), "models": named, **more}


def run(what: Any, out: Path, options: Options = OPTIONS, **more: Any) -> Result:
    """Merge."""
    return merge(what, out, None if isinstance(what, Plan) else options, group_bytes=GROUP, **more)


def begun(what: Any, out: Path, records: int = 3, options: Options = OPTIONS) -> list[dict[str, Any]]:
    """Merge until so many commits were made; the journal's records then."""
    commits = 0

    class Done(BaseException):
        pass

    append = Journal.append

    def count(self: Journal, added: Any) -> None:
        nonlocal commits
        append(self, added)
        commits += 1
        if commits == records + 1:  # the first one begins the journal
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", count)
        with pytest.raises(Stopped):
            run(what, out, options)
    found = read_journal(out / WORK / "journal")
    assert found is not None
    return [dict(record) for record in found.records]


def test_what_was_done_is_not_done_again(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = run(recipe(models), tmp_path / "whole")
    begun(recipe(models), out, 10)
    said: list[str] = []
    shown: list[Progress] = []
    result = run(recipe(models), out, say=said.append, notify=lambda p: shown.append(replace(p)))
    assert digests(out) == digests(tmp_path / "whole")
    assert result.earlier.bytes_written >= 400 * 128 * 4
    assert 0 < result.measured.bytes_written < expected.measured.bytes_written
    for key in ("bytes_read", "bytes_written", "bytes_shared"):
        told = result.to_dict()
        assert told["measured"][key] + told["measured"]["earlier"][key] == told[key], key
    assert len(said) == 1
    assert re.fullmatch(r"resuming: \d+KB of 402KB already written and checked, \S+KB left", said[0])
    merged = [progress for progress in shown if not progress.bytes_to_check]
    assert merged[0].bytes_written >= result.earlier.bytes_written  # the display shows the whole merge
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
    begun(recipe(models), out)
    (tmp_path / "elsewhere").mkdir()
    moved = [model.rename(tmp_path / "elsewhere" / model.name) for model in models]
    said: list[str] = []
    run(recipe(moved), out, say=said.append)
    found, expected = digests(out), digests(tmp_path / "whole")
    assert {name for name in expected if found[name] != expected[name]} <= {MANIFEST, "README.md"}
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
    begun(what, out)
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
    begun(file, tmp_path / "out")
    file.write_text(texts[1])
    with pytest.raises(UsageError, match=r"the recipe: .*out_dtype"):
        run(file, tmp_path / "out")


def test_a_source_that_was_touched_is_told(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(recipe(models), out)
    os.utime(models[1] / "model.safetensors")
    said: list[str] = []
    run(recipe(models), out, say=said.append)
    assert re.fullmatch(
        r"warning: written to or replaced since the merge began: model\.safetensors; the \d+KB read from them "
        r"are unchanged, so the merge resumes",
        said[0],
    )


def test_a_damaged_journal_is_refused_and_kept(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(recipe(models), out)
    journal = out / WORK / "journal"
    for content in (b"", b"damaged\n" + journal.read_bytes(), journal.read_bytes()[5:]):
        journal.write_bytes(content)
        with pytest.raises(UsageError, match=r"an unfinished merge with a damaged journal: .*--restart"):
            run(recipe(models), out)
        assert journal.read_bytes() == content
    run(recipe(models), out, fresh=True)


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("where", ["the newest block", "a tail", "an old block, too", "an old block"])
def test_what_the_disk_has_lost_is_made_again(where: str, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe(models), tmp_path / "whole")
    records = 4
    newest: dict[str, Any] = {}
    while not newest.get("blocks") or ("tail" in newest) != (where == "a tail"):
        shutil.rmtree(out, ignore_errors=True)
        found = begun(recipe(models), out, records)
        newest = found[-1]
        records += 1
    end = newest["first"] + len(newest["blocks"])
    if where != "an old block":
        damage(out, models, newest["node"], end if where == "a tail" else end - 1)
    if where in ("an old block", "an old block, too"):
        damage(out, models, next(record["node"] for record in found if "node" in record), 0)
    said: list[str] = []
    run(recipe(models), out, say=said.append)
    count = "2 blocks" if where == "an old block, too" else "1 block"
    assert any(f"warning: {count} of the unfinished merge differ from the journal" in text for text in said), said
    assert digests(out) == digests(tmp_path / "whole")


def damage(out: Path, models: list[Path], node: int, block: int) -> None:
    """Change the first byte of a block that is durable."""
    planned = plan(recipe(models), OPTIONS)
    output = planned.built.graph.destinations()[node][0]
    place = planned.layout.offset_of[output] + (16 << 10) * block
    file = out / WORK / "out" / planned.layout.shards[planned.layout.shard_of[output]].name
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["gone", "short", "header"])
def test_a_shard_that_was_tampered_with_is_refused(how: str, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(recipe(models), out)
    shard = next((out / WORK / "out").glob("*.safetensors"))
    if how == "gone":
        shard.unlink()
    elif how == "short":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        with shard.open("r+b") as stream:
            stream.write(b"\xff")
    with pytest.raises(
        EnvironmentFailure, match=f"{shard.name} of the unfinished merge was removed or changed.*--restart"
    ):
        run(recipe(models), out)
    run(recipe(models), out, fresh=True)


def test_hostile_records_are_passed_over(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe(models), tmp_path / "whole")
    begun(recipe(models), out)
    found = read_journal(out / WORK / "journal")
    assert found is not None
    hostile: list[dict[str, Any]] = [
        {"node": node, "first": first, "blocks": blocks, "tail": tail}
        for node in (-1, 10**9, "0", None, 1.5)
        for first in (0, -5, 10**20)
        for blocks, tail in ((["00" * 16] * 3, [5, "00" * 16]), ("abc", [10**20, "x"]), ([1, None], {}), (None, [1]))
    ]
    hostile += [{"node": 0, "first": 10**6, "blocks": ["00" * 16], "tail": [10**9, "00" * 16]}]
    hostile += [{"copied": value} for value in ([99, 0, 1], [0, 1], "abc", None, [-1, 0, 5], [0, "a", 3], [0, 9, 3])]
    hostile += [
        {"publish": value} for value in ("abc", [1, None], ["../../../etc/passwd", "/etc/passwd", ".mergeloom/x"])
    ]
    Journal(out / WORK / "journal", found.facts, [*hostile, *found.records]).close()
    run(recipe(models), out)
    assert digests(out) == digests(tmp_path / "whole")
    assert Path("/etc/passwd").exists()


# ------------------------------------------------------------------------------------------------ publishing


def publishing(models: list[Path], out: Path, renames: int) -> None:
    """Merge until so many files have got their names."""
    from mergeloom.io.output import directory as output

    rename, left = output.rename, renames

    def stop(path: Path, target: Path) -> None:
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 1
        rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "rename", stop)
        with pytest.raises(Stopped):
            run(recipe(models), out)


@pytest.mark.parametrize("renames", [1, 2, 4])
def test_half_published_files_are_nobody_elses(models: list[Path], tmp_path: Path, renames: int) -> None:
    out = tmp_path / "out"
    run(recipe(models), tmp_path / "whole")
    (models[0] / "chat_templates").mkdir()
    (models[0] / "chat_templates" / "tool.jinja").write_text("{{ messages }}")
    publishing(models, out, renames)
    assert len([path for path in out.rglob("*") if path.is_file() and WORK not in path.parts]) == renames
    other = recipe(models)
    other["models"][0]["parameters"]["weight"] = 0.1
    with pytest.raises(UsageError, match="this one differs from it"):
        run(other, out)
    shutil.copytree(out, tmp_path / "copy")
    shutil.rmtree(models[0] / "chat_templates")  # so that what is published already isn't part of it any more
    run(recipe(models), out)
    assert digests(out) == digests(tmp_path / "whole")
    run(other, tmp_path / "copy", fresh=True)
    run(other, tmp_path / "other")
    assert digests(tmp_path / "copy") == digests(tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(
        path.name for path in (tmp_path / "other").iterdir()
    )


def test_a_file_that_was_put_in_the_way_is_not_overwritten(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        validate_shard = OutputDirectory.small_files

        def put(self: OutputDirectory) -> dict[str, str]:
            (out / "README.md").write_text("mine")
            return validate_shard(self)

        patch.setattr(OutputDirectory, "small_files", put)
        with pytest.raises(EnvironmentFailure, match=r"README.md was put there during the merge; move it away"):
            run(recipe(models), out)
    assert (out / "README.md").read_text() == "mine"
    with pytest.raises(UsageError, match="is not empty"):
        run(recipe(models), out)
    (out / "README.md").unlink()
    run(recipe(models), out)
    again = tmp_path / "again"
    publishing(models, again, 2)
    name = next(path.name for path in again.iterdir() if path.name != WORK)
    shutil.copy(again / name, again / WORK / "out" / name)
    with pytest.raises(UsageError, match="was put there since the merge was interrupted"):
        run(recipe(models), again)


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
    first = OutputDirectory(tmp_path / "out")
    third: list[OutputDirectory] = []

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(claim.fcntl, "flock", flock)
        first.abandon()
        first.close()
        third.append(OutputDirectory(tmp_path / "out"))
        flock(descriptor, operation)

    monkeypatch.setattr(claim.fcntl, "flock", late)
    with pytest.raises(EnvironmentFailure, match="another merge has just removed it; try again"):
        OutputDirectory(tmp_path / "out")
    third[0].close()


def test_the_holder_is_named(tmp_path: Path) -> None:
    held = OutputDirectory(tmp_path / "out")
    with pytest.raises(
        EnvironmentFailure, match=rf"another merge is writing here \(process {os.getpid()}\)"
    ) as refused:
        OutputDirectory(tmp_path / "out")
    assert refused.value.exit_code == 5
    held.close()


# ------------------------------------------------------------------------------------------------ signals

BLOCKED = """
import os, sys, threading
from pathlib import Path
from mergeloom.cli import signals
from mergeloom.engine.run import merge as merging
from mergeloom.__main__ import main
from mergeloom.engine.execute.lane import Lane
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
    assert process.returncode == 130, errors
    assert f"finished work is kept in {out}; run the same command again to resume" in errors
    assert "Traceback" not in errors
    file = tmp_path / "recipe.yml"
    said: list[str] = []
    merge(file, out, OPTIONS, say=said.append)
    assert said[0].startswith("resuming: ")
    merge(file, tmp_path / "whole", OPTIONS)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_second_signal_ends_it_at_once_and_so_does_a_disk_that_hangs(models: list[Path], tmp_path: Path) -> None:
    """Every lane hangs in a write, as on a network file system that has gone."""
    outs = [tmp_path / "twice", tmp_path / "once"]
    for out in outs:
        twice = out.name == "twice"
        process = spawn(models, out, tmp_path, released=False, grace=10 * HANG_SECONDS if twice else 0.1)
        process.send_signal(signal.SIGINT)
        if twice:
            wait_for_line(process, "stopping\n")
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 130
        assert ("mergeloom: killed" in errors) == (not twice)
        assert "Traceback" not in errors
        merge(tmp_path / "recipe.yml", out, OPTIONS)
    assert digests(outs[0]) == digests(outs[1])


def test_from_python_too_an_interrupt_can_be_gone_on_from(models: list[Path], tmp_path: Path) -> None:
    journal = tmp_path / "out" / WORK / "journal"
    stop_at_once, stopped = Lane.stop, threading.Event()

    def committed() -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") > 3

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
            patch.setattr("mergeloom.engine.run.lanes.run_graph", fail)
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
