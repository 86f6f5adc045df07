"""What is only passed through shares the inputs' blocks where it can, and comes out the same where it can't."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.cli.app import cli
from mergeloom.engine.run import placement as sharing
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.placement import EDGES, copy_threads, why_not_shared, with_reflinks
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.io import platform
from mergeloom.io.platform import mount_of
from mergeloom.report.plan import plan_text
from mergeloom.report.result import result_text
from tests.support.disks import file_system, used
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.outputs import digests
from tests.support.plans import ROOMY, sliced
from tests.support.stacks import MODEL, WITHOUT, as_planned, mixed, same_as_by_lanes, stacked, weights

# ------------------------------------------------------------------------------------------------ on any file system


def test_a_plan_is_placed_once(llamas: dict[str, Path], tmp_path: Path) -> None:
    first = plan(sliced((llamas["a"], 0, 3), (llamas["b"], 1, 4)), ROOMY)
    assert first.in_lanes is None
    placed = with_reflinks(first, tmp_path / "out")
    assert with_reflinks(placed, tmp_path / "out") is placed
    again = with_reflinks(placed, tmp_path / "another")
    assert (again.transfers, again.moved, again.unshared) == (placed.transfers, placed.moved, placed.unshared)
    assert again.in_lanes is placed.in_lanes is first
    assert (first.out, first.transfers, first.moved, first.unshared) == (None, (), frozenset(), ())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(mount_of(Path("/tmp")).kind not in ("ext4", "tmpfs"), reason="/tmp may share blocks")
def test_where_blocks_cannot_be_shared_the_kernel_copies_what_is_used_once(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sliced((llamas["a"], 0, 3), (llamas["a"], 1, 4))
    first = plan(recipe, ROOMY)
    placed = with_reflinks(first, tmp_path)
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
    assert not with_reflinks(first, tmp_path, digests=True).moved  # the lanes digest on the way
    monkeypatch.setattr(platform, "DISABLED", {"copy_file_range"})
    assert not with_reflinks(first, tmp_path / "other").moved
    monkeypatch.setattr(platform, "DISABLED", set())
    monkeypatch.setattr(sharing, "mount_of", lambda path: mount_of(path if path == tmp_path else Path("/proc")))
    assert not with_reflinks(first, tmp_path).moved  # from another file system everything goes through the lanes
    result = merge(recipe, tmp_path / "out", ROOMY)
    as_planned(result)


@pytest.mark.skipif(mount_of(Path("/dev/shm")).kind != "tmpfs", reason="/dev/shm is not a tmpfs")
def test_files_that_lie_in_memory(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        model = write_checkpoint(Path(memory) / "a", MODEL, fill=4, shard_bytes=3_000_000)
        recipe = sliced((model, 0, 5), (model, 3, 8))
        for out, by_kernel in ((Path(memory) / "out", True), (tmp_path / "out", False)):
            result = merge(recipe, out, ROOMY)
            as_planned(result)
            assert bool(result.plan.bytes_copied) == by_kernel
            ((reason, _),) = result.plan.unshared
            assert reason == (
                "tmpfs doesn't share blocks" if by_kernel else "OUT is on another file system than the input"
            )
        assert weights(Path(memory) / "out") == weights(tmp_path / "out")


def test_a_budget_without_room_for_more_threads_keeps_to_the_lanes(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = sliced((llamas["a"], 0, 4))
    least = plan(recipe, ROOMY).schedule.minimum_ram
    tight = plan(recipe, replace(ROOMY, max_ram=least + (1 << 20)))
    assert copy_threads(tight) * (4 << 20) > 1 << 20
    placed = with_reflinks(tight, tmp_path)
    assert not placed.moved
    assert placed.schedule == tight.schedule
    as_planned(merge(tight, tmp_path / "out"))


def test_nothing_that_is_computed_is_moved(llamas: dict[str, Path], tmp_path: Path) -> None:
    first = plan(sliced((llamas["a"], 0, 4), dtype="float16"), ROOMY)
    placed = with_reflinks(first, tmp_path)
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
    assert words in sharing._reason(number, kind, same)


def test_a_rehearsal_of_a_placed_plan_goes_through_the_lanes(llamas: dict[str, Path], tmp_path: Path) -> None:
    placed = with_reflinks(plan(sliced((llamas["a"], 0, 4)), ROOMY), tmp_path)
    result = merge(placed, None)
    as_planned(result)
    assert result.measured.bytes_read == sum(map(placed.built.graph.nbytes, placed.built.graph))


# ------------------------------------------------------------------------------------------------ on XFS


@pytest.mark.root
@pytest.mark.parametrize("recipe", [stacked, mixed])
def test_a_stack_takes_no_disk(recipe: Callable[[Path], Any], disk: Path, out: Path, tmp_path: Path) -> None:
    sources = digests(disk)
    before = used(disk)
    result = merge(recipe(disk), out, ROOMY)
    as_planned(result)
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
    verdict = verify(out, sources=True)
    assert verdict.whole
    assert not verdict.unverified
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
                as_planned(result)
                assert (result.measured.bytes_shared > 0) == (directory == out and not disabled)
                assert bool(result.plan.bytes_copied) == (directory == out and disabled != WITHOUT[1])
                found.append(weights(directory))
                shutil.rmtree(directory)
        assert all(each == found[0] for each in found)


@pytest.mark.root
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
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
        as_planned(result)
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
    (disk / "outs" / "link").mkdir()  # as the Hub's cache has its files
    for file in tied.iterdir():
        (disk / "outs" / "link" / file.name).symlink_to(file)
    recipe = sliced((tied, 0, 3), (disk / "outs" / "link", 1, 4))
    result = merge(recipe, out, ROOMY)
    as_planned(result)
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
        as_planned(result)
        if result.plan.bytes_shared:  # since Linux 5.18
            assert result.plan.bytes_shared > 0.98 * result.plan.layout.nbytes
        else:
            assert "across mounts" in result.plan.unshared[0][0]
        same_as_by_lanes(recipe, out, tmp_path)
        guessed = with_reflinks(plan(stacked(disk), ROOMY), here / "out")  # where nothing can be written, types must do
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
        as_planned(result)
        assert result.plan.bytes_shared == 0
        assert result.plan.bytes_copied > 0
        ((reason, _),) = result.plan.unshared
        assert words in reason
        assert words in result_text(result)
        same_as_by_lanes(recipe, disk / "out", tmp_path)


@pytest.mark.root
def test_btrfs_shares_between_subvolumes(tmp_path: Path) -> None:
    with file_system(tmp_path, "btrfs") as disk:
        subprocess.run(["btrfs", "-q", "subvolume", "create", str(disk / "sub")], check=True)
        model = write_checkpoint(disk / "sub" / "a", MODEL, fill=1, shard_bytes=3_000_000)
        recipe = sliced((model, 0, 5), (model, 3, 8))
        result = merge(recipe, disk / "out", ROOMY)
        as_planned(result)
        assert result.plan.bytes_shared > 0.98 * result.plan.layout.nbytes
        same_as_by_lanes(recipe, disk / "out", tmp_path)


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
    assert text.count("as planned") == 3
    shown = plan_text(with_reflinks(plan(mixed(disk), ROOMY), out))
    for line in ("reflinked", "not reflinked", "disk"):
        assert f"\n  {line}" in shown


def test_a_plan_without_out_says_what_could_be_shared(llamas: dict[str, Path]) -> None:
    found = plan(sliced((llamas["a"], 0, 4)), ROOMY)
    assert found.out is None
    assert "pass OUT to check" in plan_text(found)
    assert "pass OUT to check" not in plan_text(plan(sliced((llamas["a"], 0, 4), dtype="float32"), ROOMY))
