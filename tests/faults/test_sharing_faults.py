"""Sharing that is refused, killed or stopped half-way, and sources that change: the same bytes, or a clear no."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run import bulk_copy as copies
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.placement import with_reflinks
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.errors import CheckpointError, DiskSpaceError, Interrupted
from mergeloom.io import platform
from mergeloom.io.output import clone as copying
from mergeloom.io.platform import clone_range
from mergeloom.report.result import result_text
from tests.support.disks import used
from tests.support.faults import Kill, Stopped, watching
from tests.support.models import write_checkpoint
from tests.support.plans import ROOMY, sliced
from tests.support.stacks import as_planned, mixed, same_as_by_lanes, stacked, weights

REFUSALS = [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC]


def intact(out: Path) -> bool:
    """Whether every tensor in OUT matches its digest, or the source that it was made from."""
    verdict = verify(out, sources=True)
    return verdict.whole and not verdict.unverified and not verdict.changed_sources


# ------------------------------------------------------------------------------------------------ refused half-way


def refusing(number: int, after: int) -> Callable[..., int]:
    """A clone_range that refuses all calls after some."""
    calls = 0

    def refuse(*arguments: int) -> int:
        nonlocal calls
        calls += 1
        return clone_range(*arguments) if calls <= after else number

    return refuse


@pytest.mark.root
@pytest.mark.parametrize("number", REFUSALS)
def test_what_is_refused_half_way_is_copied(
    number: int, disk: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "clone_range", refusing(number, 3))
    result = merge(mixed(disk), out, ROOMY)
    planned, measured = result.plan, result.measured
    assert 0 < measured.bytes_shared < planned.bytes_shared
    missed = planned.bytes_shared - measured.bytes_shared
    assert measured.io.refused == {number: missed}
    assert result.to_dict()["measured"]["refused"] == {errno.errorcode[number]: missed}
    assert measured.bytes_read == planned.bytes_read + missed  # what has several places is read several times
    assert measured.bytes_written == planned.bytes_written + missed
    text = result_text(result)
    assert f"refused by the file system ({os.strerror(number)})" in text
    assert f"; planned {planned.bytes_shared:,}" in text
    same_as_by_lanes(mixed(disk), out, tmp_path)
    assert intact(out)


@pytest.mark.root
def test_a_refusal_looks_again_if_there_is_room(disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = stacked(disk)
    total = plan(recipe, ROOMY).layout.nbytes
    usage = shutil.disk_usage

    def little(path: Path) -> Any:
        found = usage(path)
        return found._replace(free=total // 2)

    with monkeypatch.context() as patch:
        patch.setattr(copying, "clone_range", refusing(errno.EOPNOTSUPP, 2))
        patch.setattr(copies.shutil, "disk_usage", little)
        before = used(disk)
        with pytest.raises(DiskSpaceError, match=r"refuses to share .* make room and run the same"):
            merge(recipe, out, ROOMY)
        assert used(disk) - before < total // 2  # before the disk was full: only ranges in flight were copied
    result = merge(recipe, out, ROOMY)
    assert result.plan.bytes_shared == result.measured.bytes_shared + result.earlier.bytes_shared
    assert intact(out)


@pytest.mark.root
def test_a_single_file_that_refuses_does_not_end_it(disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = stacked(disk)
    file = min(with_reflinks(plan(recipe, ROOMY), out).transfers, key=lambda transfer: transfer.file).file
    inode = file.stat().st_ino
    total = file.stat().st_size * 3

    def refuse(source: int, *arguments: int) -> int:
        return errno.ETXTBSY if os.fstat(source).st_ino == inode else clone_range(source, *arguments)

    usage = shutil.disk_usage
    monkeypatch.setattr(copying, "clone_range", refuse)
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: usage(path)._replace(free=total))
    result = merge(recipe, out, ROOMY)
    assert set(result.measured.io.refused) == {errno.ETXTBSY}
    assert result.measured.bytes_shared > result.plan.bytes_shared // 2
    assert intact(out)


@pytest.mark.root
def test_the_disk_needs_no_room_for_what_is_shared_and_has_to_for_what_is_not(
    disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(disk).free
    shapes = {f"model.layers.{layer}.w.weight": (free // 8, 2) for layer in range(4)}
    model = write_checkpoint(disk / "outs" / "large", shapes, fill=None)  # twice what is free
    recipe = sliced((model, 0, 3), (model, 1, 4))
    result = merge(recipe, out, ROOMY)
    assert result.plan.layout.nbytes > 2 * free
    assert result.plan.disk < 1 << 20
    shutil.rmtree(out)
    monkeypatch.setattr(platform, "DISABLED", {"clone"})
    with pytest.raises(DiskSpaceError, match="are free"):
        merge(recipe, out, ROOMY)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------ killed, stopped


@pytest.mark.root
def test_a_merge_killed_between_any_two_calls_goes_on_to_the_same_bytes(disk: Path, out: Path, tmp_path: Path) -> None:
    options = replace(ROOMY, threads=1, shard_size=4_000_000)
    first = plan(mixed(disk), options)
    everything = Kill()
    with watching(everything):
        merge(first, out, options, group_bytes=4 << 20)
    expected = weights(out)
    clones = [number for number, call in enumerate(everything.calls) if call in ("clone", "copy")]
    assert len(clones) > 20
    for after in [*clones[:3], *clones[3::7], clones[-1] + 1, clones[-1] + 3]:
        shutil.rmtree(out)
        with watching(Kill(after)), pytest.raises((Stopped, Exception)):
            merge(first, out, options, group_bytes=4 << 20)
        result = merge(first, out, options)
        assert weights(out) == expected, after
        measured, earlier = result.measured, result.earlier
        assert measured.bytes_shared + earlier.bytes_shared == result.plan.bytes_shared
        assert measured.bytes_written + earlier.bytes_written == result.plan.bytes_written
    assert intact(out)


@pytest.mark.root
@pytest.mark.parametrize("elsewhere", [True, False])
def test_going_on_in_another_way(elsewhere: bool, disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge begun with clones is finished without them, and the other way round."""
    ways: list[set[str]] = [set(), {"clone", "copy_file_range"}]
    first, second = ways if elsewhere else ways[::-1]
    monkeypatch.setattr(platform, "DISABLED", first)
    everything = Kill()
    with watching(everything):
        merge(mixed(disk), out, ROOMY, group_bytes=2 << 20)
    expected = weights(out)
    shutil.rmtree(out)
    moving = [number for number, call in enumerate(everything.calls) if call in ("clone", "copy", "write")]
    with watching(Kill(moving[len(moving) * 3 // 4])), pytest.raises((Stopped, Exception)):
        merge(mixed(disk), out, ROOMY, group_bytes=2 << 20)
    assert (out / ".mergeloom" / "journal").exists()
    monkeypatch.setattr(platform, "DISABLED", second)
    merge(mixed(disk), out, ROOMY)
    assert weights(out) == expected
    assert intact(out)


@pytest.mark.root
@pytest.mark.parametrize("ways", [set(), {"clone"}, {"clone", "copy_file_range"}])
def test_a_flipped_bit_in_any_durable_range_does_not_survive(
    ways: set[str], disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared ranges are shared again, the kernel's copies compared with their sources, and all others with digests."""
    monkeypatch.setattr(platform, "DISABLED", ways)
    everything = Kill()
    with watching(everything):
        merge(mixed(disk), out, ROOMY, group_bytes=2 << 20)
    expected = weights(out)
    shutil.rmtree(out)
    moving = [number for number, call in enumerate(everything.calls) if call in ("clone", "copy", "write")]
    with watching(Kill(moving[len(moving) * 3 // 4])), pytest.raises((Stopped, Exception)):
        merge(mixed(disk), out, ROOMY, group_bytes=2 << 20)
    shards = sorted((out / ".mergeloom" / "out").rglob("*.safetensors"))
    for shard in shards:
        start = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        with shard.open("r+b") as stream:
            for offset in range(start, shard.stat().st_size, 50_000):
                stream.seek(offset)
                byte = stream.read(1)[0]
                stream.seek(offset)
                stream.write(bytes([byte ^ 1]))
    said: list[str] = []
    result = merge(mixed(disk), out, ROOMY, say=said.append)
    assert weights(out) == expected
    assert verify(out).whole
    measured, earlier = result.measured, result.earlier
    assert measured.bytes_shared + earlier.bytes_shared == result.plan.bytes_shared
    assert measured.bytes_written + earlier.bytes_written == result.plan.bytes_written
    assert any("of copied tensors differ from their sources" in text for text in said) == (ways == {"clone"}), said
    if len(ways) == 2:  # the process read every byte
        assert any("blocks of the unfinished merge differ from the journal" in text for text in said), said


@pytest.mark.root
def test_stopping_while_blocks_are_shared(disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        merge(mixed(disk), out, ROOMY, notify=stop)
    merge(mixed(disk), out, ROOMY)
    assert intact(out)


@pytest.mark.root
@pytest.mark.parametrize("what", ["written", "cut short", "replaced"])
def test_a_source_that_changes_meanwhile(what: str, disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(disk / "a", disk / "outs" / "mine")
    file = sorted((disk / "outs" / "mine").glob("*.safetensors"))[-1]
    changed = False

    def change(*arguments: int) -> int:
        nonlocal changed
        if not changed:
            changed = True
            if what == "written":
                with file.open("r+b") as stream:
                    stream.seek(100_000)
                    stream.write(b"changed")
            elif what == "cut short":
                os.truncate(file, file.stat().st_size - 5000)
            else:
                shutil.copy(disk / "b" / file.name, file.with_name("new"))
                file.with_name("new").rename(file)
        return clone_range(*arguments)

    monkeypatch.setattr(copying, "clone_range", change)
    with pytest.raises(CheckpointError, match=file.name):
        merge(sliced((disk / "outs" / "mine", 0, 8)), out, ROOMY)
    assert not (out / "mergeloom.json").exists()


# ------------------------------------------------------------------------------------------------ digests and sources


@pytest.mark.root
def test_full_digests_verify_without_the_sources(disk: Path, out: Path) -> None:
    shutil.copytree(disk / "a", disk / "outs" / "mine")
    recipe = sliced((disk / "outs" / "mine", 0, 5), (disk / "outs" / "mine", 3, 8))
    for full in (True, False):
        target = out.with_name(f"out{full}")
        result = merge(recipe, target, ROOMY, digests=full)
        as_planned(result)
        assert result.plan.bytes_shared > 0
        assert (result.plan.bytes_digested > 0) == full
    assert weights(out.with_name("outTrue")) == weights(out.with_name("outFalse"))
    assert verify(out.with_name("outTrue")).whole
    assert verify(out.with_name("outFalse")).whole
    shutil.rmtree(disk / "outs" / "mine")
    assert verify(out.with_name("outTrue")).whole
    verdict = verify(out.with_name("outFalse"))
    assert not verdict.damaged
    assert verdict.whole
    assert {found.tensor for found in verdict.unverified} == {
        output.label for output in result.plan.built.graph.outputs
    }
    origins = {found.origin for found in verdict.unverified}
    assert origins == {f"shared with {disk / 'outs' / 'mine'}"}
    shard = next(out.with_name("outTrue").glob("*.safetensors"))
    with shard.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        stream.write(b"damaged")
    assert len(verify(out.with_name("outTrue")).damaged) == 1


def test_full_digests_where_nothing_is_shared(llamas: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(llamas["a"], source)
    result = merge(sliced((source, 0, 3), (source, 1, 4)), tmp_path / "out", ROOMY, digests=True)
    as_planned(result)
    shutil.rmtree(source)
    verdict = verify(tmp_path / "out")
    assert verdict.whole
    assert not verdict.unverified


@pytest.mark.root
def test_a_source_that_changed_since_verifies_nothing(disk: Path, out: Path) -> None:
    shutil.copytree(disk / "a", disk / "outs" / "mine")
    merge(sliced((disk / "outs" / "mine", 0, 8)), out, ROOMY)
    everything = verify(out, sources=True)
    assert everything.whole
    assert not everything.unverified
    assert everything.tensors == len(verify(out).unverified)
    with sorted((disk / "outs" / "mine").glob("*.safetensors"))[0].open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"trained on")
    verdict = verify(out, sources=True)
    assert verdict.whole  # OUT still holds what it held
    assert len(verdict.unverified) == len(verdict.changed_sources) == 1
    assert "has changed since the merge" in verdict.unverified[0].reason


@pytest.mark.root
def test_a_source_that_is_gone_is_no_damage_whatever_it_is_called(
    disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = out.with_name(f"mine{out.name}")  # its files' paths end as those of the output do
    shutil.copytree(disk / "a", mine)
    merge(sliced((mine, 0, 8)), out, ROOMY)
    shutil.rmtree(mine)
    monkeypatch.chdir(out.parent)
    verdict = verify(Path(out.name), sources=True)
    assert verdict.whole
    assert verdict.unverified
