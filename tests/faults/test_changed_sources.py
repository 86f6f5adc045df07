"""Source files that change while a merge runs, or between its plan and its start: no output mixes two versions."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Plan
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.recovery import source_files
from mergeloom.errors import CheckpointError, UsageError
from mergeloom.io.output.lock import WORK
from mergeloom.io.reading import FilePool, FileStamp, Reader, stat_fingerprints
from tests.support.merges.small import GROUP, OPTIONS, make_blocks_small
from tests.support.models import write_checkpoint
from tests.support.outputs import digests
from tests.support.waiting import wait_until


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Digest blocks of 16 KiB and chunks of 4 KiB: small tensors have several."""
    with pytest.MonkeyPatch.context() as patch:
        make_blocks_small(patch)
        yield


def run(planned: Plan, out: Path) -> None:
    """Merge."""
    merge(planned, out, group_bytes=GROUP)


@pytest.mark.parametrize("what", ["replaced", "written to", "truncated", "gone"])
def test_a_source_that_changes_during_the_merge(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"model.layers.{layer}.w.weight": (96, 64) for layer in range(8)}
    models = [write_checkpoint(tmp_path / name, shapes, dtype="F32", fill=seed) for seed, name in enumerate("ab")]
    other = write_checkpoint(tmp_path / "other", shapes, dtype="F32", fill=7) / "model.safetensors"
    named = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    recipe = {"merge_method": "linear", "models": named}
    planned = plan(recipe, OPTIONS)
    run(planned, tmp_path / "whole")
    out = tmp_path / "out"
    file = models[0] / "model.safetensors"
    saved = tmp_path / "saved"
    read, reads, done, lock = Reader.read, 0, threading.Event(), threading.Lock()

    def replace_source(files: FilePool) -> None:
        os.link(file, saved)
        if what in ("replaced", "gone"):
            files.close()
            file.unlink()
            if what == "replaced":
                os.link(other, file)
        else:
            saved.unlink()
            saved.write_bytes(file.read_bytes())
            with file.open("r+b") as stream:
                stream.seek(-40_000, os.SEEK_END)
                if what == "truncated":
                    stream.truncate()
                else:
                    stream.write(b"\xff" * 40_000)  # NaNs
        done.set()

    def change(self: Reader, source: Path, offset: int, buffer: memoryview) -> None:
        nonlocal reads
        with lock:
            reads += 1
            tenth = reads == 10
        if tenth:
            wait_until(lambda: (out / WORK / "journal").read_bytes().count(b"\n") > 1)
        with lock:  # no other thread reads from a descriptor that is being closed
            if tenth:
                replace_source(self._files)
            read(self, source, offset, buffer)

    monkeypatch.setattr(Reader, "read", change)
    with pytest.raises(CheckpointError, match=str(file)):
        run(planned, out)
    monkeypatch.setattr(Reader, "read", read)
    if what in ("replaced", "written to"):
        with pytest.raises(UsageError, match=r"differs from it: the source file model.safetensors of .*/a"):
            run(plan(recipe, OPTIONS), out)
    file.unlink(missing_ok=True)
    os.link(saved, file)
    run(plan(recipe, OPTIONS), out)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("rehearsal", [False, True])
def test_nans_in_a_source_that_changes_are_blamed_on_the_change(
    rehearsal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"model.layers.{layer}.w.weight": (96, 64) for layer in range(2)}
    models = [write_checkpoint(tmp_path / name, shapes, dtype="F32", fill=seed) for seed, name in enumerate("ab")]
    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models]}
    file, read, lock = models[0] / "model.safetensors", Reader.read, threading.Lock()
    intact = file.read_bytes()

    def overwrite() -> None:
        with file.open("r+b") as stream:
            stream.seek(-2 * 96 * 64 * 4, os.SEEK_END)
            stream.write(b"\xff" * (2 * 96 * 64 * 4))

    def change(self: Reader, source: Path, offset: int, buffer: memoryview) -> None:
        with lock:
            read(self, source, offset, buffer)
            if source == file and file.read_bytes() == intact:  # open now: its stamp isn't compared again
                overwrite()
                read(self, source, offset, buffer)

    planned = plan(recipe, OPTIONS)
    out = None if rehearsal else tmp_path / "out"
    monkeypatch.setattr(Reader, "read", change)
    with pytest.raises(CheckpointError, match=f"^{file} was changed during the merge"):
        merge(planned, out)
    with pytest.raises(CheckpointError, match=f"^{file} was changed since the merge was planned"):
        merge(planned, out)
    with pytest.raises(CheckpointError, match=r"^recipe: models\[0\]\S*: tensor model\.layers\..* of .*/a holds NaN"):
        merge(plan(recipe, OPTIONS), out)


def test_a_source_that_was_replaced_since_it_was_planned(tmp_path: Path) -> None:
    """Its tensors may lie elsewhere now."""
    shapes = {f"model.layers.{layer}.w.weight": (96, 64) for layer in range(2)}
    models = [write_checkpoint(tmp_path / name, shapes, dtype="F32", fill=seed) for seed, name in enumerate("ab")]
    other = write_checkpoint(tmp_path / "other", {**shapes, "model.norm.weight": (64,)}, dtype="F32", fill=7)
    named = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    planned = plan({"merge_method": "linear", "models": named}, OPTIONS)
    file = models[0] / "model.safetensors"
    (other / "model.safetensors").rename(file)
    with pytest.raises(CheckpointError, match=rf"{file} was changed since the merge was planned"):
        run(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["replaced", "overwritten"])
def test_a_source_that_changes_and_is_put_back(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been read meanwhile, so the merge ends; run again, it finds that what it had used is the same."""
    shapes = {f"model.layers.{layer}.w.weight": (96, 64) for layer in range(8)}
    models = [write_checkpoint(tmp_path / name, shapes, dtype="F32", fill=seed) for seed, name in enumerate("ab")]
    other = write_checkpoint(tmp_path / "other", shapes, dtype="F32", fill=7) / "model.safetensors"
    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models]}
    run(plan(recipe, OPTIONS), tmp_path / "whole")
    file, saved = models[0] / "model.safetensors", tmp_path / "saved"
    whole = file.read_bytes()
    read, lock, reads = Reader.read, threading.Lock(), 0

    def change(self: Reader, source: Path, offset: int, buffer: memoryview) -> None:
        nonlocal reads
        with lock:
            reads += 1
            if reads != 10:
                read(self, source, offset, buffer)
            elif what == "replaced":
                file.rename(saved)
                os.link(other, file)
                read(self, source, offset, buffer)
                saved.replace(file)
            else:
                file.write_bytes(other.read_bytes())
                read(self, source, offset, buffer)
                file.write_bytes(whole)

    def look(files: Iterable[Path]) -> dict[Path, FileStamp]:
        with lock:  # a commit looks at the sources too: not while the file is away
            return stat_fingerprints(files)

    monkeypatch.setattr(Reader, "read", change)
    monkeypatch.setattr(source_files, "stat_fingerprints", look)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=f"{file} was changed during the merge"):
        run(plan(recipe, OPTIONS), out)
    assert not (out / "mergeloom.json").exists()
    assert reads >= 10
    monkeypatch.setattr(Reader, "read", read)
    run(plan(recipe, OPTIONS), out)
    assert digests(out) == digests(tmp_path / "whole")
