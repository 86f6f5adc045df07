"""What is only passed through shares the inputs' blocks where it can, and comes out the same where it can't."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.passthrough import WINDOWS, make_sparse
from mergeloom import copies, sharing
from mergeloom.cli import cli
from mergeloom.errors import CheckpointError, DiskSpaceError, Interrupted
from mergeloom.io import copying, platform
from mergeloom.io.platform import clone_range, mount_of
from mergeloom.merging import Result, merge
from mergeloom.planning import Options, plan
from mergeloom.report import plan_text, summary_text
from mergeloom.sharing import EDGES, copy_threads, place, unplaced, why_not_shared
from mergeloom.verifying import verify
from tests.disks import file_system, used
from tests.faults import Kill, Stopped, watching
from tests.models import tiny_llama, write_checkpoint
from tests.outputs import digests, read_model, same_tensors
from tests.test_merge import sliced

ROOMY = Options(max_ram=4 << 30, device="cpu", threads=2)
WITHOUT = ({"clone"}, {"clone", "copy_file_range"})
REFUSALS = [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC]
MODEL = tiny_llama(layers=8, hidden=256, vocabulary=2048)
"""12 MB in bfloat16, 1.2 MB a layer."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """XFS, with models ``a`` and ``b`` on it, not to be changed."""
    with file_system(tmp_path_factory.mktemp("sharing"), "xfs") as found:
        for seed, name in enumerate("ab"):
            write_checkpoint(found / name, MODEL, shard_bytes=3_000_000, fill=seed)
        yield found


@pytest.fixture
def out(disk: Path) -> Iterator[Path]:
    """An OUT on it; what was made there is removed again."""
    yield disk / "outs" / "out"
    shutil.rmtree(disk / "outs", ignore_errors=True)


def stacked(disk: Path, **more: object) -> dict[str, object]:
    """A recipe as of a frankenmerge: windows of two models, in which most layers are used twice."""
    return sliced((disk / "a", 0, 5), (disk / "b", 2, 6), (disk / "a", 3, 8), **more)


def mixed(disk: Path) -> dict[str, Any]:
    """Layers that are passed through, layers that are computed, and layers of which some tensors are."""
    recipe = stacked(disk)
    slices: Any = recipe["slices"]
    slices[1]["sources"][0]["parameters"] = {"scale": 0.5}
    slices[2]["sources"][0]["parameters"] = {"scale": [{"filter": "down_proj", "value": 0}, {"value": 1}]}
    return recipe


def weights(out: Path) -> dict[str, str]:
    """The digests of everything but the manifest, which says how each tensor is vouched for."""
    return {name: digest for name, digest in digests(out).items() if name != "mergeloom.json"}


def same_as_by_lanes(recipe: Any, out: Path, beside: Path, options: Options = ROOMY) -> None:
    """Whether a merge's files are those that come out where every byte goes through the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "DISABLED", {"clone", "copy_file_range"})
        merge(recipe, beside / "by lanes", options)
    assert weights(out) == weights(beside / "by lanes")
    shutil.rmtree(beside / "by lanes")


def as_foretold(result: Result) -> None:
    """Whether what was measured is what was foretold."""
    plan, measured = result.plan, result.measured
    assert measured.bytes_read == plan.bytes_read
    assert measured.bytes_written == plan.bytes_written
    assert measured.bytes_shared == plan.bytes_shared


# ------------------------------------------------------------------------------------------------ placing, anywhere


def test_a_plan_is_placed_once(llamas: dict[str, Path], tmp_path: Path) -> None:
    first = plan(sliced((llamas["a"], 0, 3), (llamas["b"], 1, 4)), ROOMY)
    assert unplaced(first) is first
    placed = place(first, tmp_path / "out")
    assert place(placed, tmp_path / "out") is placed
    again = place(placed, tmp_path / "another")
    assert (again.transfers, again.moved, again.unshared) == (placed.transfers, placed.moved, placed.unshared)
    back = unplaced(placed)
    assert (back.out, back.transfers, back.moved, back.unshared) == (None, (), frozenset(), ())
    assert back.schedule.bytes_read == first.schedule.bytes_read
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(mount_of(Path("/tmp")).kind not in ("ext4", "tmpfs"), reason="/tmp may share blocks")
def test_where_blocks_cannot_be_shared_the_kernel_copies_what_is_used_once(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sliced((llamas["a"], 0, 3), (llamas["a"], 1, 4))
    first = plan(recipe, ROOMY)
    placed = place(first, tmp_path)
    graph = first.built.graph
    used = [len(outputs) for outputs in graph.destinations()]
    assert placed.moved == {node for node in graph if used[node] == 1}
    assert 0 < len(placed.moved) < len(used)
    assert placed.bytes_shared == placed.bytes_computed == 0
    assert placed.bytes_copied == sum(graph.nbytes(node) for node in placed.moved)
    assert placed.bytes_read == first.bytes_read  # a tensor with two places is still read once
    assert placed.bytes_written == first.bytes_written
    assert placed.disk == placed.layout.nbytes
    ((reason, nbytes),) = placed.unshared
    assert "doesn't share blocks" in reason
    assert nbytes == placed.bytes_written
    assert not place(first, tmp_path, digests=True).moved  # the lanes digest on the way
    monkeypatch.setattr(platform, "DISABLED", {"copy_file_range"})
    assert not place(first, tmp_path / "other").moved
    monkeypatch.setattr(platform, "DISABLED", set())
    monkeypatch.setattr(sharing, "mount_of", lambda path: mount_of(path if path == tmp_path else Path("/proc")))
    assert not place(first, tmp_path).moved  # from another file system everything goes through the lanes
    result = merge(recipe, tmp_path / "out", ROOMY)
    as_foretold(result)


def test_a_budget_without_room_for_more_threads_keeps_to_the_lanes(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = sliced((llamas["a"], 0, 4))
    least = plan(recipe, ROOMY).schedule.minimum_ram
    tight = plan(recipe, replace(ROOMY, max_ram=least + (1 << 20)))
    assert copy_threads(tight) * (4 << 20) > 1 << 20
    placed = place(tight, tmp_path)
    assert not placed.moved
    assert placed.schedule == tight.schedule
    as_foretold(merge(tight, tmp_path / "out"))


def test_nothing_that_is_computed_is_moved(llamas: dict[str, Path], tmp_path: Path) -> None:
    first = plan(sliced((llamas["a"], 0, 4), dtype="float16"), ROOMY)
    placed = place(first, tmp_path)
    assert not placed.moved
    assert not placed.unshared
    assert (
        placed.bytes_computed
        == placed.bytes_written
        == first.layout.nbytes - sum(len(shard.header) for shard in first.layout.shards)
    )


def test_what_a_file_system_cannot_be_asked_its_type_tells(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next(llamas["a"].glob("*.safetensors"))
    monkeypatch.setattr(sharing, "scratch_file", lambda directory: None)
    monkeypatch.setattr(sharing, "SHARING", {mount_of(tmp_path).kind})
    assert why_not_shared([file], tmp_path / "not" / "there") == {file: ""}
    assert "another file system" in why_not_shared([Path("/proc/version")], tmp_path)[Path("/proc/version")]
    monkeypatch.setattr(sharing, "SHARING", ())
    assert "doesn't share" in why_not_shared([file], tmp_path)[file]


@pytest.mark.parametrize(
    ("number", "kind", "same", "words"),
    [
        (errno.EXDEV, "xfs", True, "across mounts"),
        (errno.EXDEV, "xfs", False, "another file system"),
        (errno.EOPNOTSUPP, "xfs", True, "reflink=1"),
        (errno.EOPNOTSUPP, "ext4", True, "ext4 doesn't share blocks"),
        (errno.ENOTTY, "", True, "the file system doesn't share blocks"),
        (errno.EPERM, "btrfs", True, "not permitted"),
    ],
)
def test_refusals_in_words(number: int, kind: str, same: bool, words: str) -> None:
    assert words in sharing._words(number, kind, same)


# ------------------------------------------------------------------------------------------------ on XFS


@pytest.mark.root
@pytest.mark.parametrize("recipe", [stacked, mixed])
def test_a_stack_takes_no_disk(recipe: Callable[[Path], Any], disk: Path, out: Path, tmp_path: Path) -> None:
    sources = digests(disk)
    before = used(disk)
    result = merge(recipe(disk), out, ROOMY)
    as_foretold(result)
    planned = result.plan
    total = planned.layout.nbytes
    assert planned.bytes_shared + planned.bytes_copied + planned.schedule.bytes_written == sum(
        planned.built.graph.nbytes(output.node) for output in planned.built.graph.outputs
    )
    if recipe is stacked:
        assert planned.bytes_shared > 0.98 * total
        assert not planned.schedule.steps
    else:
        assert planned.bytes_shared > 0.4 * total
        assert planned.bytes_computed > 0.2 * total
    assert used(disk) - before < planned.disk + (1 << 20)  # the other files, and the file system's own
    assert planned.disk - planned.bytes_computed < total // (50 if recipe is stacked else 5)
    same_as_by_lanes(recipe(disk), out, tmp_path)
    verdict = verify(out)
    assert verdict.whole
    assert verdict.tensors == len(planned.built.graph.outputs)
    assert {name: digest for name, digest in digests(disk).items() if not name.startswith("outs/")} == sources


@pytest.mark.root
def test_the_bytes_are_the_same_everywhere(disk: Path, out: Path, tmp_path: Path) -> None:
    for size in (2_000_000, 5 * 10**9):
        options = replace(ROOMY, shard_size=size)
        found = []
        for directory in (out, tmp_path / "ext4"):
            for disabled in (set(), *WITHOUT):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(platform, "DISABLED", disabled)
                    result = merge(mixed(disk), directory, options)
                as_foretold(result)
                assert (result.measured.bytes_shared > 0) == (directory == out and not disabled)
                assert bool(result.plan.bytes_copied) == (directory == out and disabled != WITHOUT[1])
                found.append(weights(directory))
                shutil.rmtree(directory)
        assert all(each == found[0] for each in found)


@pytest.mark.root
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 1_500_000), min_size=2, max_size=6),
    shard_bytes=st.sampled_from([None, 2_000_000, 4_000_000]),
    shard_size=st.sampled_from([500_000, 3_000_000, 10**9]),
    padding=st.integers(0, 9),
)
def test_sizes_that_are_no_multiples_of_a_block(
    sizes: list[int], shard_bytes: int | None, shard_size: int, padding: int, disk: Path, tmp_path: Path
) -> None:
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes[0],)}
    for layer in range(4):
        tensors |= {f"model.layers.{layer}.w{n}.weight": (size,) for n, size in enumerate(sizes)}
        tensors[f"model.layers.{layer}.empty"] = (0, 3)
    dtypes = dict.fromkeys(tensors, "BF16") | {name: "U8" for name in tensors if name.endswith("w1.weight")}
    work = disk / "odd"
    try:
        model = write_checkpoint(
            work / "m", tensors, dtype=dtypes, fill=3, shard_bytes=shard_bytes, metadata={"x": "y" * padding}
        )
        recipe = sliced((model, 0, 3), (model, 1, 4))
        options = replace(ROOMY, shard_size=shard_size)
        result = merge(recipe, work / "out", options)
        as_foretold(result)
        same_as_by_lanes(recipe, work / "out", tmp_path, options)
        assert result.measured.bytes_read + result.measured.bytes_shared >= sum(
            result.plan.built.graph.nbytes(node) for node in result.plan.built.graph
        )
    finally:
        shutil.rmtree(work)


@pytest.mark.root
def test_a_model_that_is_used_twice_under_two_names_and_a_tied_head(disk: Path, out: Path, tmp_path: Path) -> None:
    tied = write_checkpoint(
        disk / "outs" / "tied", tiny_llama(layers=4, hidden=256, vocabulary=4096, tied=True), fill=1
    )
    (disk / "outs" / "link").symlink_to(tied)
    recipe = sliced((tied, 0, 3), (disk / "outs" / "link", 1, 4))
    result = merge(recipe, out, ROOMY)
    as_foretold(result)
    assert result.plan.bytes_shared > 0.9 * result.plan.layout.nbytes
    same_as_by_lanes(recipe, out, tmp_path)


@pytest.mark.root
def test_sources_are_never_opened_for_writing(disk: Path, out: Path) -> None:
    opened: list[tuple[str, int]] = []
    listening = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str | Path):
            opened.append((str(arguments[0]), arguments[2]))

    sys.addaudithook(hook)  # it can't be taken away again
    try:
        merge(mixed(disk), out, ROOMY)
    finally:
        listening = False
    sources = [flags for file, flags in opened if file.startswith(str(disk)) and "/outs/" not in file]
    assert len(sources) > 8
    assert all(flags & os.O_ACCMODE == os.O_RDONLY for flags in sources)
    assert any(flags & os.O_ACCMODE == os.O_RDWR for file, flags in opened if "/outs/" in file)


@pytest.mark.root
def test_other_mounts_of_the_same_file_system(disk: Path, out: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    subprocess.run(["mount", "--bind", str(disk), str(here)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(here)], check=True)
        recipe = stacked(here)
        result = merge(recipe, out, ROOMY)
        as_foretold(result)
        if result.plan.bytes_shared:  # since Linux 5.18
            assert result.plan.bytes_shared > 0.98 * result.plan.layout.nbytes
        else:
            assert "across mounts" in result.plan.unshared[0][0]
        same_as_by_lanes(recipe, out, tmp_path)
        guessed = place(plan(stacked(disk), ROOMY), here / "out")  # where nothing can be written, types must do
        assert guessed.bytes_shared == result.plan.bytes_shared
    finally:
        subprocess.run(["umount", "-l", str(here)], check=True)


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "words"), [(["-m", "reflink=0"], "reflink=1"), (["-b", "size=16384"], "larger than 4KiB")]
)
def test_an_xfs_that_does_not_share(options: list[str], words: str, tmp_path: Path) -> None:
    with file_system(tmp_path, "xfs", *options) as disk:
        model = write_checkpoint(disk / "a", MODEL, fill=1, shard_bytes=3_000_000)
        recipe = sliced((model, 0, 5), (model, 3, 8))
        result = merge(recipe, disk / "out", ROOMY)
        as_foretold(result)
        assert result.plan.bytes_shared == 0
        assert result.plan.bytes_copied > 0
        ((reason, _),) = result.plan.unshared
        assert words in reason
        assert words in summary_text(result)
        same_as_by_lanes(recipe, disk / "out", tmp_path)


@pytest.mark.root
def test_btrfs_shares_between_subvolumes(tmp_path: Path) -> None:
    with file_system(tmp_path, "btrfs") as disk:
        subprocess.run(["btrfs", "-q", "subvolume", "create", str(disk / "sub")], check=True)
        model = write_checkpoint(disk / "sub" / "a", MODEL, fill=1, shard_bytes=3_000_000)
        recipe = sliced((model, 0, 5), (model, 3, 8))
        result = merge(recipe, disk / "out", ROOMY)
        as_foretold(result)
        assert result.plan.bytes_shared > 0.98 * result.plan.layout.nbytes
        same_as_by_lanes(recipe, disk / "out", tmp_path)


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
    assert measured.refused == {number: missed}
    assert measured.bytes_read == planned.bytes_read + missed  # what has several places is read several times
    assert measured.bytes_written == planned.bytes_written + missed
    text = summary_text(result)
    assert f"refused by the file system ({os.strerror(number)})" in text
    assert f"{planned.bytes_shared:,} were foretold" in text
    same_as_by_lanes(mixed(disk), out, tmp_path)
    assert verify(out).whole


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
        assert used(disk) - before < total // 4  # long before the disk was full
    result = merge(recipe, out, ROOMY)
    assert result.plan.bytes_shared == result.measured.bytes_shared + result.earlier.bytes_shared
    assert verify(out).whole


@pytest.mark.root
def test_a_single_file_that_refuses_does_not_end_it(disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = stacked(disk)
    file = min(place(plan(recipe, ROOMY), out).transfers, key=lambda transfer: transfer.file).file
    inode = file.stat().st_ino
    total = file.stat().st_size * 3

    def refuse(source: int, *arguments: int) -> int:
        return errno.ETXTBSY if os.fstat(source).st_ino == inode else clone_range(source, *arguments)

    usage = shutil.disk_usage
    monkeypatch.setattr(copying, "clone_range", refuse)
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: usage(path)._replace(free=total))
    result = merge(recipe, out, ROOMY)
    assert set(result.measured.refused) == {errno.ETXTBSY}
    assert result.measured.bytes_shared > result.plan.bytes_shared // 2
    assert verify(out).whole


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
    assert verify(out).whole


@pytest.mark.root
@pytest.mark.parametrize("elsewhere", [True, False])
def test_going_on_in_another_way(elsewhere: bool, disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge begun with clones is finished without them, and the other way round."""
    merge(mixed(disk), out, ROOMY)
    expected = weights(out)
    shutil.rmtree(out)
    ways: list[set[str]] = [set(), {"clone", "copy_file_range"}]
    first, second = ways if elsewhere else ways[::-1]
    monkeypatch.setattr(platform, "DISABLED", first)
    kill = Kill(120 if elsewhere else 90)
    with watching(kill), pytest.raises((Stopped, Exception)):
        merge(mixed(disk), out, ROOMY, group_bytes=2 << 20)
    assert (out / ".mergeloom" / "journal").exists()
    monkeypatch.setattr(platform, "DISABLED", second)
    merge(mixed(disk), out, ROOMY)
    assert weights(out) == expected
    assert verify(out).whole


@pytest.mark.root
def test_stopping_while_blocks_are_shared(disk: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        merge(mixed(disk), out, ROOMY, notify=stop)
    merge(mixed(disk), out, ROOMY)
    assert verify(out).whole


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


# ------------------------------------------------------------------------------------------------ vouched for


@pytest.mark.root
def test_full_digests_vouch_without_the_sources(disk: Path, out: Path) -> None:
    shutil.copytree(disk / "a", disk / "outs" / "mine")
    recipe = sliced((disk / "outs" / "mine", 0, 5), (disk / "outs" / "mine", 3, 8))
    for full in (True, False):
        target = out.with_name(f"out{full}")
        result = merge(recipe, target, ROOMY, digests=full)
        as_foretold(result)
        assert result.plan.bytes_shared > 0
        assert (result.plan.bytes_digested > 0) == full
    assert weights(out.with_name("outTrue")) == weights(out.with_name("outFalse"))
    assert verify(out.with_name("outTrue")).whole
    assert verify(out.with_name("outFalse")).whole
    shutil.rmtree(disk / "outs" / "mine")
    assert verify(out.with_name("outTrue")).whole
    verdict = verify(out.with_name("outFalse"))
    assert not verdict.damaged
    assert len(verdict.unvouched) == len(result.plan.built.graph.outputs)
    shard = next(out.with_name("outTrue").glob("*.safetensors"))
    with shard.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        stream.write(b"damaged")
    assert len(verify(out.with_name("outTrue")).damaged) == 1


def test_full_digests_where_nothing_is_shared(llamas: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(llamas["a"], source)
    result = merge(sliced((source, 0, 3), (source, 1, 4)), tmp_path / "out", ROOMY, digests=True)
    as_foretold(result)
    shutil.rmtree(source)
    assert verify(tmp_path / "out").whole


@pytest.mark.root
def test_a_source_that_changed_since_vouches_for_nothing(disk: Path, out: Path) -> None:
    shutil.copytree(disk / "a", disk / "outs" / "mine")
    merge(sliced((disk / "outs" / "mine", 0, 8)), out, ROOMY)
    with sorted((disk / "outs" / "mine").glob("*.safetensors"))[0].open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"trained on")
    verdict = verify(out)
    assert not verdict.damaged  # OUT still holds what it held
    assert len(verdict.unvouched) == 1


# ------------------------------------------------------------------------------------------------ said


@pytest.mark.root
def test_the_plan_says_what_will_be_shared(disk: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = disk / "outs" / "recipe.yml"
    recipe.parent.mkdir()
    recipe.write_text(json.dumps(mixed(disk)))
    stamp = recipe.parent.stat().st_mtime_ns
    planned: dict[str, Any] = {}
    for arguments in ([str(recipe)], [str(recipe), str(out)]):
        cli.main(["plan", *arguments, "--json", "--device", "cpu"], standalone_mode=False)
        planned = json.loads(capsys.readouterr().out)
        assert planned["bytes_shared"] == 0 or len(arguments) == 2
    assert recipe.parent.stat().st_mtime_ns == stamp  # and it writes nothing
    total = planned["output"]["bytes"]
    lanes = planned["bytes_written"] - planned["bytes_copied"]
    assert planned["bytes_shared"] + planned["bytes_copied"] + lanes == total
    assert planned["bytes_computed"] == lanes
    assert planned["disk"] == planned["destination"]["needed"] < 0.6 * total
    assert planned["not_shared"] == [{"reason": EDGES, "bytes": planned["bytes_copied"]}]
    report = recipe.with_suffix(".json")
    cli.main(["merge", str(recipe), str(out), "--device", "cpu", "--report", str(report)], standalone_mode=False)
    text = capsys.readouterr().out
    found = json.loads(report.read_text())
    for key in ("bytes_read", "bytes_written", "bytes_shared"):
        assert found[key] == planned[key] == found["measured"][key]
    assert text.count("as foretold") == 3
    shown = plan_text(place(plan(mixed(disk), ROOMY), out))
    for line in ("shares", "not shared", "disk"):
        assert f"\n  {line}" in shown


def test_a_plan_without_out_says_what_could_be_shared(llamas: dict[str, Path]) -> None:
    found = plan(sliced((llamas["a"], 0, 4)), ROOMY)
    assert found.out is None
    assert "give OUT to see" in plan_text(found)
    assert "give OUT to see" not in plan_text(plan(sliced((llamas["a"], 0, 4), dtype="float32"), ROOMY))


# ------------------------------------------------------------------------------------------------ at full size


def write_some(model: Path, names: list[str], seed: int = 5) -> None:
    """Put random bytes into some tensors of a sparse checkpoint."""
    import numpy as np

    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    for number, name in enumerate(names):
        with (model / index[name]).open("r+b") as stream:
            size = int.from_bytes(stream.read(8), "little")
            begin, end = json.loads(stream.read(size))[name]["data_offsets"]
            stream.seek(8 + size + begin)
            stream.write(np.random.default_rng([seed, number]).bytes(end - begin))


def tensor_bytes(model: Path, name: str) -> bytes:
    """A tensor's bytes, by nothing but the format."""
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    with (model / index[name]).open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(size))[name]["data_offsets"]
        stream.seek(8 + size + begin)
        return stream.read(end - begin)


@pytest.mark.root
@pytest.mark.slow
def test_published_stacks_at_full_size(tmp_path: Path) -> None:
    """120B from 70B, 681B from 405B, a trillion parameters from that and in one go: seconds, and next to no disk."""
    with file_system(tmp_path, "xfs", nbytes=6 << 30) as disk:
        make_sparse(disk)
        filled = [
            f"model.layers.{layer}.{part}.weight"
            for layer in (0, 41, 60, 125)
            for part in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm", "post_attention_layernorm")
        ]
        write_some(disk / "405B", filled)
        write_some(disk / "70B", names70 := [name for name in filled if ".125." not in name and ".41." not in name])
        sources = digests_of_some(disk)
        recipes = {
            name: sliced(*((disk / source, *part) for part in parts)) for name, (source, parts) in WINDOWS.items()
        }
        fused = [{**recipes["681B"], "name": "681B"}, recipes["1T"]]
        origin = {layer: layer for layer in range(126)}
        layers = {"405B": origin, "70B": {layer: layer for layer in range(80)}}
        for name, recipe in {**recipes, "1T fused": None}.items():
            before = used(disk)
            file = tmp_path / "recipe.yml"
            texts = fused if recipe is None else [recipe]
            text = "\n---\n".join(json.dumps({"dtype": "bfloat16", **each}) for each in texts)
            file.write_text(text.replace(str(disk / "681B"), "681B") if recipe is None else text)
            command = [sys.executable, "-m", "mergeloom", "merge", str(file), str(disk / name), "--quiet"]
            report = tmp_path / "report.json"
            subprocess.run([*command, "--report", str(report)], check=True, timeout=120)
            found = json.loads(report.read_text())
            assert found["measured"]["bytes_shared"] == found["bytes_shared"]
            assert found["measured"]["seconds"] < 10
            assert used(disk) - before < found["output"]["bytes"] // 100
            source, parts = WINDOWS[name.removesuffix(" fused")]
            layers[name] = {
                n: layers[source][layer] for n, layer in enumerate(x for a, b in parts for x in range(a, b))
            }
            parent = disk / ("70B" if name == "120B" else "405B")
            checked = 0
            for target, layer in layers[name].items():
                for wanted in (n for n in (names70 if name == "120B" else filled) if f".{layer}." in n):
                    ours = tensor_bytes(disk / name, wanted.replace(f".{layer}.", f".{target}."))
                    assert ours == tensor_bytes(parent, wanted)
                    checked += 1
            assert checked >= 8
        assert digests_of_some(disk) == sources


def digests_of_some(disk: Path) -> list[tuple[str, int, int, bytes]]:
    """Sizes, times and first bytes of the source files, which are too large to be read as a whole."""
    files = sorted(file for name in ("70B", "405B") for file in (disk / name).iterdir())
    found = []
    for file in files:
        with file.open("rb") as stream:
            stat = file.stat()
            found.append((str(file), stat.st_size, stat.st_mtime_ns, stream.read(1 << 16)))
    return found


@pytest.mark.root
@pytest.mark.slow
def test_a_larger_model_full_of_data(tmp_path: Path) -> None:
    with file_system(tmp_path, "xfs", nbytes=6 << 30) as disk:
        shapes = tiny_llama(layers=12, hidden=2048, vocabulary=32000)
        model = write_checkpoint(disk / "a", shapes, fill=9, shard_bytes=400_000_000)
        recipe = sliced((model, 0, 8), (model, 4, 12))
        before = used(disk)
        result = merge(recipe, disk / "out", ROOMY)
        as_foretold(result)
        assert used(disk) - before < result.plan.layout.nbytes // 100
        source, found = read_model(model), read_model(disk / "out")
        expected = {name: tensor for name, tensor in source.items() if ".layers." not in name}
        for target, layer in enumerate([*range(8), *range(4, 12)]):
            old, new = f"model.layers.{layer}.", f"model.layers.{target}."
            expected |= {new + name.removeprefix(old): x for name, x in source.items() if name.startswith(old)}
        assert same_tensors(found, expected)
