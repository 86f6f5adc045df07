"""Recovering from damage: lost blocks, tampered shards, malformed records, and an interrupted publish."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.planning import plan
from mergeloom.errors import EnvironmentFailure, UsageError
from mergeloom.io.output.directory import OutputDirectory
from mergeloom.io.output.journal import Journal, read_journal
from mergeloom.io.output.lock import WORK
from tests.support.faults import Stopped
from tests.support.merges.resumable import OPTIONS, interrupt, recipe, run, write_models
from tests.support.merges.small import make_blocks_small
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


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("where", ["the newest block", "a tail", "an old block, too", "an old block"])
def test_what_the_disk_has_lost_is_made_again(where: str, models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe(models), tmp_path / "whole")
    newest: dict[str, Any] = {}
    for commits in itertools.cycle(range(3, 8)):  # how many records a commit has depends on timing
        shutil.rmtree(out, ignore_errors=True)
        found = interrupt(recipe(models), out, commits, may_finish=True)
        newest = found[-1] if found else {}
        if newest.get("blocks") and ("tail" in newest) == (where == "a tail"):
            break
    end = newest["first"] + len(newest["blocks"])
    if where != "an old block":
        damage(out, models, newest["node"], end if where == "a tail" else end - 1)
    if where in ("an old block", "an old block, too"):
        damage(out, models, next(record["node"] for record in found if "node" in record), 0)
    said: list[str] = []
    run(recipe(models), out, say=said.append)
    several = where == "an old block, too"
    text = (
        f"{'2 blocks' if several else '1 block'} of the unfinished merge {'differ' if several else 'differs'} from the"
    )
    assert any(f"warning: {text} journal" in line for line in said), said
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
    interrupt(recipe(models), out)
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
    interrupt(recipe(models), out)
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
    from mergeloom.io.output import publish

    rename, left = publish.rename, renames

    def stop(path: Path, target: Path) -> None:
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 1
        rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "rename", stop)
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
    shutil.rmtree(models[0] / "chat_templates")  # a published file that the merge no longer writes
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
