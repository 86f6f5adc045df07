"""The output directory during a merge: its lock, foreign files, publishing, a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.errors import CheckpointError, DiskSpaceError, EnvironmentFailure, UsageError
from mergeloom.io import platform
from mergeloom.io.output.directory import OutputDirectory
from mergeloom.io.output.journal import Journal
from mergeloom.io.output.lock import WORK, DirectoryStatus, OutputLock
from mergeloom.io.output.shards import ShardFile, index_bytes
from mergeloom.io.safetensors.header import build_header
from mergeloom.io.tensors.dtypes import F32
from tests.support.faults import Fail, watching
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.outputs import open_files

DATA = bytes(range(200)) * 2


def shard(name: str = "model.safetensors", nbytes: int = 400) -> ShardFile:
    """A shard of one float32 tensor."""
    header = build_header([("x", F32, (nbytes // 4,))], {"format": "pt"})
    return ShardFile(name, header, len(header) + nbytes, ((len(header), nbytes),))


def fill(out: OutputDirectory, *shards: ShardFile) -> None:
    """Create the shards and write all their data."""
    out.begin(shards)
    for number, each in enumerate(shards):
        offset, nbytes = each.computed[0]
        out.write(number, offset, memoryview(bytes(nbytes)))
        out.write(number, offset + nbytes - len(DATA), memoryview(DATA))
    out.sync(range(len(shards)))


def publish(out: OutputDirectory, *last: str) -> None:
    """Publish all files."""
    out.publish(last, lambda names: None)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[OutputDirectory]:
    """A locked output directory."""
    out = OutputDirectory.open(tmp_path / "out")
    yield out
    out.close()


def test_publishing_renames_all_files(made: OutputDirectory, tmp_path: Path) -> None:
    source = tmp_path / "vocab.txt"
    source.write_text("a\nb\n")
    fill(made, shard("one.safetensors"), shard("two.safetensors", 800))
    made.write_file("config.json", b"{}")
    made.copy_file("1_Pooling/vocab.txt", source)
    assert [path.name for path in made.path.iterdir()] == [WORK]
    publish(made, "config.json")
    names = sorted(str(path.relative_to(made.path)) for path in made.path.rglob("*") if path.is_file())
    assert names == ["1_Pooling/vocab.txt", "config.json", "one.safetensors", "two.safetensors"]
    assert (made.path / "two.safetensors").read_bytes() == shard(nbytes=800).header + bytes(400) + DATA
    assert not made.work.exists()


def test_publishing_keeps_the_order_of_the_last_files(made: OutputDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    rename = Path.rename

    def note(path: Path, target: Path) -> Path:
        order.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", note)
    fill(made, shard())
    for name in ("a.json", "config.json", "z.txt"):
        made.write_file(name, b"{}")
    publish(made, "config.json", "a.json", "never.json")
    assert order == ["model.safetensors", "z.txt", "config.json", "a.json"]


def test_a_damaged_shard_is_never_published(made: OutputDirectory) -> None:
    fill(made, shard())
    with (made.stage / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(EnvironmentFailure, match=r"model.safetensors: the safetensors library rejects"):
        publish(made)
    made.abandon()
    assert not made.path.exists()


# ------------------------------------------------------------------------------------------------ the lock


@pytest.mark.parametrize("kind", ["file", "other", "model", "broken link"])
def test_foreign_files_are_left_alone(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "broken link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        (out / ("notes.txt" if kind == "other" else "model.safetensors")).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"{out}: is .*; OUT must be a new or empty directory"):
        OutputDirectory.open(out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("link", [WORK, f"{WORK}/pid", f"{WORK}/out", f"{WORK}/out/a", "published", "published/file"])
def test_no_link_in_it_leads_out_of_it(link: str, fresh: bool, tmp_path: Path) -> None:
    """An OUT may have been unpacked from anywhere."""
    target = tmp_path / "mine"
    target.mkdir()
    (target / "file").write_text("keep me")
    out = tmp_path / "out"
    place = out / link
    place.parent.mkdir(parents=True)
    if link != WORK:
        (out / WORK).mkdir(exist_ok=True)
        Journal(out / WORK / "journal", {}, [{"publish": ["published/file"]}]).close()
    place.symlink_to(target / "file" if link.endswith(("pid", "file")) else target)
    with pytest.raises(UsageError, match=f"holds {link}.*remove it"):
        made = OutputDirectory.open(out)
        if fresh:
            made.start_over()
    assert (target / "file").read_text() == "keep me"
    assert place.is_symlink()


def test_cleaning_up_a_finished_merge_does_not_follow_links(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "file").write_text("keep me")
    out = tmp_path / "out"
    out.mkdir()
    (out / "sign").write_text("")
    (out / WORK).symlink_to(target)
    OutputDirectory.open(out, "sign").close()
    assert (target / "file").read_text() == "keep me"
    assert not (out / WORK).is_symlink()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left while .*make room"),
        (errno.EDQUOT, "quota is used up while .*make room"),
        (errno.EFBIG, "the file is too large .*: use a smaller --shard-size"),
    ],
)
def test_disk_space_errors_name_the_reason(number: int, message: str, made: OutputDirectory) -> None:
    with watching(Fail(number, 0, "truncate")), pytest.raises(DiskSpaceError, match=message):
        made.begin([shard()])


def test_an_invalid_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match="the output directory failed"):
        OutputDirectory.open(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 256, "a name of 256 bytes is too long: file systems allow 255"),
        ("new/" + "é" * 128, "a name of 256 bytes is too long"),
        ("d/" * 2000, "bytes is too long: choose one of at most 3,584"),
    ],
)
def test_a_name_that_is_too_long_creates_nothing(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        OutputDirectory.open(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 255, "two\nlines", "\x1b[31m"])
def test_an_unusual_name_is_used(name: str, tmp_path: Path) -> None:
    out = OutputDirectory.open(tmp_path / name)
    fill(out, shard())
    publish(out)
    out.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_existing_empty_directory_is_used_and_kept(tmp_path: Path) -> None:
    out = OutputDirectory.open(tmp_path)
    fill(out, shard())
    out.abandon()
    out.close()
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_second_merge_is_refused_until_the_lock_is_released(made: OutputDirectory) -> None:
    with pytest.raises(EnvironmentFailure, match="another run of mergeloom is writing here") as refused:
        OutputDirectory.open(made.path)
    assert refused.value.exit_code == 5
    made.abandon()
    made.close()
    OutputDirectory.open(made.path).close()


def test_the_lock_is_a_context_manager(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path / "out")
    assert not lock.path.exists()  # nothing happens before it is acquired
    with lock as held, pytest.raises(EnvironmentFailure, match="another run of mergeloom is writing here"):
        assert (held.journal, held.complete, held.created) == (None, False, [tmp_path / "out"])
        OutputDirectory.open(lock.path)
    with OutputLock(lock.path) as again:
        assert again.created == []


def test_the_lock_excludes_other_processes(made: OutputDirectory) -> None:
    code = (
        "import sys; from pathlib import Path; from mergeloom.io.output.directory import OutputDirectory\n"
        "from mergeloom.errors import MergeloomError\n"
        "try: OutputDirectory.open(Path(sys.argv[1]))\n"
        "except MergeloomError as error: sys.exit(error.exit_code)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(made.path)], check=False).returncode == 5


def test_a_merge_that_has_just_been_finished_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT is looked at before it is locked; what another merge published in between must be seen."""
    from mergeloom.io.output import lock as claim

    out = tmp_path / "out"
    classify, calls = claim.classify, []

    def classify_early(path: Path, *arguments: Any, **options: Any) -> DirectoryStatus:
        found = classify(path, *arguments, **options)
        if not calls:
            calls.append(path)
            other = OutputDirectory.open(path)
            fill(other, shard())
            publish(other)
            other.close()
        return found

    monkeypatch.setattr(claim, "classify", classify_early)
    with pytest.raises(UsageError, match="is not empty"):
        OutputDirectory.open(out)
    assert (out / "model.safetensors").exists()


def test_remains_of_a_killed_merge_are_not_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = OutputDirectory.open(out)
    fill(killed, shard("model-00001-of-00002.safetensors"), shard("model-00002-of-00002.safetensors"))
    killed.write_file("tokenizer.json", b"{}")
    killed.close()  # what the system does for a process that is killed
    again = OutputDirectory.open(out)
    fill(again, shard())
    publish(again)
    again.close()
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_abandoning_removes_created_parents(tmp_path: Path) -> None:
    out = OutputDirectory.open(tmp_path / "a" / "b" / "out")
    fill(out, shard())
    out.abandon()
    out.close()
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    out = OutputDirectory.open(tmp_path / "a" / "b" / "out")
    (tmp_path / "a" / "b" / "notes.txt").write_text("somebody else's")
    out.abandon()
    out.close()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["notes.txt"]


def test_many_shards_need_few_descriptors(made: OutputDirectory) -> None:
    count = 400
    made.begin([shard(f"{number}.safetensors") for number in range(count)])
    for number in range(count):
        made.write(number, shard().computed[0][0], memoryview(DATA))
    made.sync(range(count))
    assert 100 < len(open_files(made.stage)) <= 128


def test_the_index_has_the_format_of_transformers() -> None:
    content = json.loads(index_bytes({"b": "2", "a": "1"}, 12))
    assert content == {"metadata": {"total_size": 12}, "weight_map": {"a": "1", "b": "2"}}
    assert list(content["weight_map"]) == ["a", "b"]


# ------------------------------------------------------------------------------------------------ a full disk


@pytest.mark.parametrize("own", [0, 100_000, 400_000])
def test_a_resumed_merge_counts_shared_bytes_once(own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a shard is shared with a source, which takes no space of its own, though the file's blocks count it."""
    half = 512_000
    whole = shard(nbytes=2 * half)
    start = len(whole.header)
    whole = replace(whole, computed=((start, half),))
    monkeypatch.setattr(platform, "DISABLED", {"fallocate"})
    out = OutputDirectory.open(tmp_path / "out")
    out.begin([whole], half)
    out.write(0, start, memoryview(bytes(range(250)) * (own // 250)))
    out.write(0, start + half, memoryview(bytes(range(250)) * (half // 250)))  # as if it were cloned
    out.sync([0])
    Journal(out.lock.journal_path, {}).close()
    out.close()
    usage = shutil.disk_usage

    for free, fits in ((half - own - 20_000, False), (half - own + 20_000, True)):
        with monkeypatch.context() as patch, contextlib.closing(OutputDirectory.open(tmp_path / "out")) as out:
            patch.setattr(
                "mergeloom.io.output.directory.shutil.disk_usage",
                lambda path, free=free: usage(path)._replace(free=free),
            )
            if fits:
                out.begin([whole], half)
            else:
                with pytest.raises(DiskSpaceError, match="make room and run the same command again"):
                    out.begin([whole], half)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.root
def test_an_output_larger_than_the_disk_is_refused_at_once(small_disk: Path) -> None:
    out = OutputDirectory.open(small_disk / "out")
    with pytest.raises(DiskSpaceError, match=r"the output needs 2.\dMiB, but only .* are free") as full:
        out.begin([shard(nbytes=2_200_000)])
    assert full.value.exit_code == 3
    out.abandon()
    out.close()


@pytest.mark.root
@pytest.mark.parametrize("fallocate", [True, False])
def test_a_disk_that_fills_up_is_an_error(small_disk: Path, monkeypatch: pytest.MonkeyPatch, fallocate: bool) -> None:
    monkeypatch.setattr(platform, "DISABLED", set() if fallocate else {"fallocate"})
    out = OutputDirectory.open(small_disk / "out")
    large = shard(nbytes=400_000)
    out.begin([large])
    (small_disk / "other").write_bytes(bytes(600_000 if fallocate else 1_000_000))  # all the rest
    if fallocate:  # what was reserved can still be written
        out.write(0, large.computed[0][0], memoryview(bytes(400_000)))
        with pytest.raises(DiskSpaceError, match="no space left while writing vocab"):
            out.write_file("vocab", bytes(100_000))
    else:
        with pytest.raises(DiskSpaceError, match=r"no space left while writing 400000 bytes to model.safetensors"):
            out.write(0, large.computed[0][0], memoryview(bytes(400_000)))
    out.abandon()
    out.close()
    assert [path.name for path in small_disk.iterdir()] == ["other"]


@pytest.mark.root
def test_a_merge_that_does_not_fit_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tiny_llama(hidden=256))
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    with pytest.raises(DiskSpaceError) as full:
        merge(recipe, small_disk / "out", Options(device="cpu"))
    assert full.value.exit_code == 3
    assert not list(small_disk.iterdir())
    # the weights fit, the tokenizer doesn't
    fits = write_checkpoint(tmp_path / "fits", tiny_llama())
    (fits / "tokenizer.json").write_bytes(b'"' + b"x" * 1_000_000 + b'"')
    with pytest.raises(DiskSpaceError):
        merge(
            {"merge_method": "passthrough", "models": [{"model": str(fits)}]}, small_disk / "out", Options(device="cpu")
        )
    assert [path.name for path in (small_disk / "out").iterdir()] == [WORK]


def test_a_missing_companion_is_an_error(made: OutputDirectory, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab.txt: there is no such file"):
        made.copy_file("vocab.txt", tmp_path / "vocab.txt")
