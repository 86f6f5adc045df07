"""OUT in every state: all commands classify it alike, and `plan` reports what `merge` would do."""

from __future__ import annotations

import fcntl
import json
import os
import re
from contextlib import nullcontext
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
from mergeloom.errors import CheckpointError, MergeloomError, UsageError
from mergeloom.io import platform
from mergeloom.io.output import lock as claim
from mergeloom.io.output import publish
from mergeloom.io.output.directory import OutputDirectory
from mergeloom.io.output.lock import MANIFEST, STAGE, WORK
from tests.support.faults import Stopped
from tests.support.merges.destinations import (
    OPTIONS,
    SHAPES,
    in_use,
    interrupted,
    make,
    recipe_of,
    run,
    write_models,
    write_recipe,
)
from tests.support.models import write_checkpoint
from tests.support.outputs import digests

COMMANDS = ("merge", "plan", "verify", "inspect")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Two models."""
    return write_models(tmp_path)


@pytest.fixture
def recipe(models: list[Path], tmp_path: Path) -> Path:
    """A recipe for the mean of two models."""
    return write_recipe(models, tmp_path)


# for each kind of directory: what every command calls it, and for each command its exit code
KINDS = {
    "absent": ("there is no such directory", (0, 0, 4, 4)),
    "empty": ("is empty", (0, 0, 4, 4)),
    "unfinished": ("holds an unfinished merge", (0, 0, 4, 4)),
    "in use": (rf"another run of mergeloom is writing here \(process {os.getpid()}\)", (5, 5, 5, 5)),
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
        patch.setattr(publish, "rename", stop)
        with pytest.raises(Stopped):
            merge(recipe, out, planning.Options(max_ram=4 << 30, device="cpu", shard_size=15_000))
    assert (out / "model-00001-of-00003.safetensors").exists()
    with pytest.raises(CheckpointError, match="holds an unfinished merge; run the command that began it again"):
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
        OutputDirectory.open(out).close()
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
    assert read_manifest(models[0] / "merged")["models"] == ["model.safetensors"]


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


def test_every_error_of_a_directory_names_it(recipe: Path, tmp_path: Path) -> None:
    planned = planning.plan(recipe, OPTIONS)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file", tmp_path / ("x" * 300)):
        problem = look_at(planned, out).problem
        assert isinstance(problem, MergeloomError)
        assert str(out) in str(problem)
        with pytest.raises(type(problem)):
            merge(planned, out)
