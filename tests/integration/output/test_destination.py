"""OUT: every command classifies a directory alike, `plan` reports what `merge` would, and nothing is fetched before."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeloom import __main__
from mergeloom.engine.model.open import open_model
from mergeloom.engine.recipe.types import ModelReference
from mergeloom.engine.run import planning
from mergeloom.engine.run.destination import look_at
from mergeloom.engine.run.manifest import read_manifest
from mergeloom.engine.run.merge import merge
from mergeloom.errors import CheckpointError, DiskSpaceError, EnvironmentFailure, MergeloomError, UsageError
from mergeloom.io import platform
from mergeloom.io.hub.repository import HubFile
from mergeloom.io.output import directory as output
from mergeloom.io.output import lock as claim
from mergeloom.io.output.directory import OutputDirectory, ShardFile, missing_space
from mergeloom.io.output.journal import Journal
from mergeloom.io.output.lock import MANIFEST, STAGE, WORK, Content, classify
from mergeloom.io.safetensors.dtypes import F32
from mergeloom.io.safetensors.header import build_header
from tests.support.faults import Stopped
from tests.support.hub_server import HubServer
from tests.support.models.write import write_checkpoint
from tests.support.outputs import digests
from tests.unit.hub import test_hub

contents, hub, local = test_hub.contents, test_hub.hub, test_hub.local  # its fixtures
ID = test_hub.ID
OPTIONS = planning.Options(max_ram=4 << 30, device="cpu", threads=1)
SHAPES = {f"model.layers.{layer}.w.weight": (64, 50) for layer in range(2)} | {"model.norm.weight": (50,)}
COMMANDS = ("merge", "plan", "verify", "inspect")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Two models."""
    return [write_checkpoint(tmp_path / name, SHAPES, dtype="F32", fill=seed) for seed, name in enumerate("ab")]


def recipe_of(models: list[Path], weight: float = 1.0, method: str = "linear") -> dict[str, Any]:
    named = [{"model": str(model), "parameters": {"weight": weight}} for model in models]
    return {"merge_method": method, "models": named}


@pytest.fixture
def recipe(models: list[Path], tmp_path: Path) -> Path:
    """A recipe for their mean."""
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(models)))
    return path


def interrupted(recipe: Any, out: Path) -> None:
    """Merge until the first group of bytes is durable."""
    append = Journal.append

    def stop(self: Journal, records: Any) -> None:
        append(self, records)
        if self.records > 1:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(Stopped):
            merge(recipe, out, OPTIONS, group_bytes=1)
    assert classify(out).content is Content.UNFINISHED


@contextmanager
def in_use(out: Path) -> Iterator[None]:
    """Another merge at work in OUT."""
    held = OutputDirectory(out, MANIFEST)
    try:
        yield
    finally:
        held.close()


def run(command: str, recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """A command's exit code and what it says on stderr."""
    capsys.readouterr()
    merges = command in ("merge", "plan")
    code = __main__.main(
        [command, *([str(recipe)] if merges else []), str(out), *(["--quiet"] if command == "merge" else [])]
    )
    return code, capsys.readouterr().err


def make(content: str, recipe: Any, out: Path) -> None:
    """Make a directory of a kind."""
    if content == "finished":
        merge(recipe, out, OPTIONS)
    elif content in ("unfinished", "in use"):
        interrupted(recipe, out)
    elif content == "foreign":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    elif content == "a file":
        out.write_text("mine")
    elif content == "empty":
        out.mkdir()


# for each kind of directory: what every command calls it, and for each command its exit code
KINDS = {
    "absent": ("there is no such directory", (0, 0, 4, 4)),
    "empty": ("is empty", (0, 0, 4, 4)),
    "unfinished": ("holds an unfinished merge", (0, 0, 4, 4)),
    "in use": (rf"another merge is writing here \(process {os.getpid()}\)", (5, 5, 5, 5)),
    "finished": ("holds a finished merge", (0, 0, 0, 0)),
    "foreign": (r"is not empty \(notes.txt\), and mergeloom did not write these files", (2, 2, 2, 4)),
    "a file": ("is a file", (2, 2, 2, 4)),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_all_commands_classify_a_directory_alike(
    kind: str, command: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`inspect` reads any model, so to it alone a foreign directory is one without weights."""
    out = tmp_path / "out"
    make(kind, recipe, out)
    words, codes = KINDS[kind]
    expected = codes[COMMANDS.index(command)]
    before = digests(out) if out.is_dir() else {}
    with in_use(out) if kind == "in use" else nullcontext():
        code, said = run(command, recipe, out, capsys)
    assert code == expected, said
    if expected and not (command == "inspect" and kind in ("absent", "empty", "foreign", "a file")):
        assert re.search(f"mergeloom: {re.escape(str(out))}: {words}; ", said), said
    if command != "merge":
        held = {f"{WORK}/pid"} if kind == "in use" else set()
        after = digests(out) if out.is_dir() else {}
        assert {name: digest for name, digest in after.items() if name not in held} == {
            name: digest for name, digest in before.items() if name not in held
        }


@pytest.mark.parametrize("state", ["unfinished", "finished"])
@pytest.mark.parametrize("change", ["weight", "seed", "shard size", "dtype", "source"])
def test_plan_reports_what_merge_would(
    state: str, change: str, models: list[Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(state, recipe, out)
    options: list[str] = []
    if change == "weight":
        recipe.write_text(yaml.safe_dump(recipe_of(models, 0.25)))
    elif change == "dtype":
        recipe.write_text(yaml.safe_dump(recipe_of(models) | {"dtype": "bfloat16"}))
    elif change == "source":
        write_checkpoint(models[1], SHAPES, dtype="F32", fill=9)
    else:
        options = ["--seed", "1"] if change == "seed" else ["--shard-size", "20KB"]
    before = digests(out)
    found = []
    for command in ("plan", "merge"):
        capsys.readouterr()
        found.append((__main__.main([command, str(recipe), str(out), *options]), capsys.readouterr().err))
    (planned, said), (merged, refused) = found
    assert planned == merged == 2
    article = "an" if state == "unfinished" else "a"
    assert f"{out}: holds {article} {state} merge, and this one differs from it: " in said
    assert said.splitlines()[-1] == refused.splitlines()[-1]
    assert {**digests(out), f"{WORK}/pid": ""} == {**before, f"{WORK}/pid": ""}


def test_plan_says_that_a_merge_would_resume_or_is_finished(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said, shards = [], planning.plan(recipe, OPTIONS).disk
    for state in ("new", "unfinished", "finished"):
        make(state, recipe, out)
        assert __main__.main(["plan", str(recipe), str(out), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["destination"]
        assert (found["content"], found["problem"]) == (state, None)
        assert found["needed"] > 0 if state == "new" else found["needed"] <= shards  # reserved already, where it can be
        assert __main__.main(["plan", str(recipe), str(out)]) == 0
        said.append(re.search("usable +(.*)", capsys.readouterr().out)[1])  # type: ignore[index]
        if state == "unfinished":
            merge(recipe, out, OPTIONS)
    assert said == [
        "yes",
        "yes: it holds an unfinished merge, which `merge` resumes",
        "yes: it holds this merge, finished",
    ]


@pytest.mark.parametrize("damage", ["manifest", "shard cut short", "shard missing"])
def test_a_damaged_finished_merge_has_one_exit_code(
    damage: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make("finished", recipe, out)
    shard = out / "model.safetensors"
    if damage == "manifest":
        (out / MANIFEST).write_text("{}")
    elif damage == "shard missing":
        shard.unlink()
    else:
        os.truncate(shard, 1000)
    assert {run(command, recipe, out, capsys)[0] for command in ("merge", "plan", "verify")} == {4}


def test_a_merge_that_is_being_published_is_not_taken_for_a_model(recipe: Path, tmp_path: Path) -> None:
    """Some of its shards have their final names, and look like all of a model's."""
    out = tmp_path / "out"
    rename = platform.rename

    def stop(path: Path, target: Path) -> None:
        if target.parent == out and "model-00002" in target.name:
            raise Stopped
        rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "rename", stop)
        with pytest.raises(Stopped):
            merge(recipe, out, planning.Options(max_ram=4 << 30, device="cpu", shard_size=15_000))
    assert (out / "model-00001-of-00003.safetensors").exists()
    with pytest.raises(CheckpointError, match="holds an unfinished merge; run the same merge command again"):
        open_model(ModelReference(str(out)))
    with pytest.raises(CheckpointError, match="holds an unfinished merge"):
        merge({"merge_method": "passthrough", "models": [{"model": str(out)}]}, tmp_path / "other", OPTIONS)
    assert not (tmp_path / "other").exists()


def test_looking_does_not_get_in_the_way_of_a_merge(recipe: Path, tmp_path: Path) -> None:
    """`plan` takes a shared lock for an instant: a merge that begins meanwhile tries again."""
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    pauses: list[float] = []

    def release(seconds: float) -> None:
        pauses.append(seconds)
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claim.time, "sleep", release)
        OutputDirectory(out).close()
    os.close(descriptor)
    assert len(pauses) == 1


# ------------------------------------------------------------------------------------------------ OUT and the inputs


@pytest.mark.parametrize(
    ("out", "relation"),
    [
        ("a/merged", "is inside"),
        ("link/merged", "is inside"),
        ("a/x/../merged", "is inside"),
        ("files/out", "is inside"),
    ],
)
def test_out_is_apart_from_the_inputs(
    out: str, relation: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(recipe_of(models) | {"files_from": str(tmp_path / "files")}))
    before = digests(tmp_path)
    for command in ("merge", "plan"):
        assert __main__.main([command, str(recipe), str(tmp_path / out)]) == 2
        assert f"{tmp_path / out}: {relation} the input model " in capsys.readouterr().err
    assert digests(tmp_path) == before


def test_an_input_inside_an_unfinished_merge_is_not_discarded(models: list[Path], recipe: Path, tmp_path: Path) -> None:
    """`--restart` removes everything that an unfinished merge holds."""
    out = tmp_path / "out"
    interrupted(recipe, out)
    before = digests(out)
    inner = recipe_of([out / WORK / STAGE, models[0]])
    with pytest.raises(UsageError, match="contains the input model"):
        merge(inner, out, OPTIONS, fresh=True)
    assert digests(out) == before


def test_out_may_be_next_to_an_input_that_is_a_file(models: list[Path], tmp_path: Path) -> None:
    file = models[0] / "model.safetensors"
    merge(recipe_of([file]), models[0] / "merged", OPTIONS)
    assert read_manifest(models[0] / "merged")["models"] == [str(file)]


# ------------------------------------------------------------------------------------------------ spellings


def stack_of(names: list[str]) -> dict[str, Any]:
    """A recipe that stacks the first layers of models."""
    slices = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in names]
    return {"merge_method": "passthrough", "slices": slices}


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_two_spellings_of_a_path_are_one_model(
    state: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that uses several spellings has more models, and others of them have other numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mergeloom.engine.run.placement.SHARING", frozenset())
    (tmp_path / "link").symlink_to("a")
    spellings = [["a", "a", "b"], ["a", "./a", "b"], ["./a", str(models[0]), "b"], ["link", "a", "a/../b"]]
    merge(stack_of(spellings[0]), tmp_path / "expected", OPTIONS)
    for number, first in enumerate(spellings):
        second = spellings[number - 1]
        out = Path(f"{state}{number}")
        make(state, stack_of(first), out)
        assert look_at(planning.plan(stack_of(second), OPTIONS), out).problem is None
        with pytest.raises(UsageError, match="this one differs from it"):
            merge(stack_of(["a", "b", "b"]), out, OPTIONS)
        merge(stack_of(second), tmp_path / "a" / ".." / out, OPTIONS)
        assert digests(out, "*.safetensors") == digests(tmp_path / "expected", "*.safetensors")


def test_the_manifest_names_each_model_once(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are those that `sources` and the origins of copied tensors give."""
    monkeypatch.chdir(tmp_path)
    merge(stack_of(["a", "./a", "b"]), tmp_path / "out", OPTIONS)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["models"] == ["a", "b"]
    assert set(manifest["sources"]) == {"0", "1"}
    assert __main__.main(["verify", str(tmp_path / "out"), "--sources"]) == 0


# ------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def remote(hub: HubServer, contents: dict[str, bytes], tmp_path: Path) -> Path:
    """A recipe of a model of the Hub."""
    hub.add(ID, contents)
    path = tmp_path / "remote.yml"
    sources = [{"model": ID, "layer_range": [0, 2]}]
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": [{"sources": sources}]}))
    return path


@pytest.mark.parametrize("kind", ["foreign", "a file", "in use"])
def test_nothing_is_asked_of_the_hub_where_out_cannot_be_used(
    kind: str,
    remote: Path,
    hub: HubServer,
    recipe: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    make(kind, recipe, out)
    with in_use(out) if kind == "in use" else nullcontext():
        for fresh in ([], ["--restart"]):
            assert __main__.main(["merge", str(remote), str(out), "--quiet", *fresh]) == (5 if kind == "in use" else 2)
        with pytest.raises((UsageError, EnvironmentFailure)):
            merge(remote, out, OPTIONS)
    assert hub.log == []


@pytest.mark.parametrize("kind", ["unfinished", "finished"])
def test_no_weights_are_downloaded_where_out_holds_another_merge(
    kind: str,
    remote: Path,
    hub: HubServer,
    recipe: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    make(kind, recipe, out)
    planning.plan(remote, OPTIONS)  # headers, which are kept
    hub.log.clear()
    assert __main__.main(["merge", str(remote), str(out), "--quiet"]) == 2
    assert hub.fetched() == set()


def test_nothing_is_downloaded_for_a_finished_merge(
    remote: Path,
    hub: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    out = tmp_path / "out"
    assert __main__.main(["merge", str(remote), str(out), "--quiet"]) == 0
    assert hub.sent(r"\.safetensors$") > 1_000_000
    shutil.rmtree(constants.HF_HUB_CACHE)
    planned = planning.plan(remote, OPTIONS)
    assert sum(file.to_fetch for file in planned.downloads) > 1_000_000
    hub.log.clear()
    assert __main__.main(["merge", str(remote), str(out)]) == 0
    assert "already complete" in capsys.readouterr().err
    assert merge(remote, out, OPTIONS).measured.bytes_written == 0
    assert hub.fetched() == set()


def test_out_is_locked_while_files_are_downloaded(remote: Path, hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    seen: list[tuple[Content, bool]] = []

    def download(files: list[HubFile]) -> None:
        seen.append((classify(out).content, sum(file.to_fetch for file in files) > 1_000_000))
        raise EnvironmentFailure("no network")

    with pytest.raises(EnvironmentFailure, match="no network"):
        merge(remote, out, OPTIONS, download=download)
    assert seen == [(Content.IN_USE, True)]
    assert not out.parent.exists()  # nothing was durable, so nothing is left


def test_an_unfinished_merge_is_discarded_only_once_the_new_inputs_are_there(
    remote: Path,
    hub: HubServer,
    recipe: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    interrupted(recipe, out)
    journal = (out / WORK / "journal").read_bytes()

    def download(files: list[HubFile]) -> None:
        raise EnvironmentFailure("no network")

    with pytest.raises(EnvironmentFailure, match="no network"):
        merge(remote, out, OPTIONS, fresh=True, download=download)
    assert (out / WORK / "journal").read_bytes() == journal
    merge(recipe, out, OPTIONS)


# ------------------------------------------------------------------------------------------------ disk space


def half_shared(nbytes: int = 1 << 20) -> ShardFile:
    """A shard of which the first half of the data shares blocks with an input."""
    header = build_header([("x", F32, (nbytes // 4,))], {"format": "pt"})
    return ShardFile("model.safetensors", header, len(header) + nbytes, ((len(header) + nbytes // 2, nbytes // 2),))


@pytest.mark.parametrize("reserves", [False, True])
def test_shared_bytes_are_counted_once_when_a_merge_is_resumed(
    reserves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a shared range count as the shard's own in st_blocks, as written ones do here."""
    if not reserves:
        monkeypatch.setattr(platform, "DISABLED", {"fallocate"})
    monkeypatch.setattr(output, "_IN_MEMORY", set())
    shard, half = half_shared(), 1 << 19
    first = OutputDirectory(tmp_path / "out")
    first.begin([shard], half)
    first.write(0, len(shard.header), memoryview(bytes([1]) * half))  # stands for sharing
    first.sync([0])
    Journal(first.journal, {}).close()
    first.close()
    needed = missing_space(tmp_path / "out", [shard], half)
    slack = 16 << 10  # blocks that are not full
    assert needed <= slack if reserves else half - slack <= needed <= half + slack
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=half // 2))
    again = OutputDirectory(tmp_path / "out")
    if reserves:
        again.begin([shard], half)
    else:
        with pytest.raises(DiskSpaceError, match="make room"):
            again.begin([shard], half)
    again.close()


def test_what_was_written_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "DISABLED", {"fallocate"})
    shard, half = half_shared(), 1 << 19
    out = OutputDirectory(tmp_path / "out")
    assert missing_space(out.path, [shard], half) == shard.nbytes - half
    out.begin([shard], half)
    out.write(0, shard.computed[0][0], memoryview(bytes([1]) * half))
    out.sync([0])
    assert missing_space(out.path, [shard], half) <= 16 << 10
    out.abandon()
    out.close()


def test_data_is_counted_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = platform.create_file(tmp_path / "file")
    platform.truncate(descriptor, 1 << 20)
    platform.write_at(descriptor, bytes([1]) * 65536, 65536)
    platform.write_at(descriptor, bytes([1]) * 65536, 1 << 19)
    assert platform.data_bytes(descriptor, 0, 1 << 20) == 2 * 65536
    assert platform.data_bytes(descriptor, 65536 + 4096, 1 << 16) == 65536 - 4096
    assert platform.data_bytes(descriptor, 0, 65536) == 0
    assert platform.data_bytes(descriptor, 1 << 20, 0) == 0
    monkeypatch.setattr(platform, "DISABLED", {"SEEK_DATA"})
    assert platform.data_bytes(descriptor, 0, 1 << 20) == 1 << 20
    monkeypatch.setattr(platform, "DISABLED", set())

    def refuse(*arguments: int) -> int:
        raise OSError(errno.EINVAL, "")

    monkeypatch.setattr(platform.os, "lseek", refuse)
    assert platform.data_bytes(descriptor, 0, 1 << 20) == 1 << 20
    os.close(descriptor)


def test_every_error_of_a_directory_names_it(recipe: Path, tmp_path: Path) -> None:
    planned = planning.plan(recipe, OPTIONS)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file", tmp_path / ("x" * 300)):
        problem = look_at(planned, out).problem
        assert isinstance(problem, MergeloomError)
        assert str(out) in str(problem)
        with pytest.raises(type(problem)):
            merge(planned, out)
