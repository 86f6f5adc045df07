"""Verifying a merge: every change is found, and tensors without a digest are listed."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeloom import __main__
from mergeloom.engine.model import open as opening
from mergeloom.engine.run import placement as sharing
from mergeloom.engine.run.manifest import MANIFEST, read_manifest
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.verify import Verification, verify
from mergeloom.errors import CheckpointError, MergeloomError, UsageError
from mergeloom.io.hub import checkpoint as hub
from mergeloom.io.output import clone as copying
from mergeloom.io.output.lock import WORK
from tests.support.merges.verified import SHAPES, Merge, append_byte, flip, forge, make_merge, position_of, problems
from tests.support.models import write_checkpoint

FLIPS = 1000  # about a quarter of them in headers and the smaller files


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge with all digests, not to be changed: computed and copied tensors, two shards, companions."""
    directory = tmp_path_factory.mktemp("verify")
    return make_merge(directory).run(directory / "out", digests=True)


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy of the finished merge."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.fixture
def finished(tmp_path: Path) -> Merge:
    """A merge whose sources may be changed; its OUT, next to them, has no digests of what the kernel copied."""
    made = make_merge(tmp_path)
    made.run(tmp_path / "out")
    return made


def test_a_merge_is_what_its_manifest_says(merged: Path) -> None:
    seen: list[int] = []
    check = Verification(merged, sources=True)
    verdict = check.run(notify=lambda progress: seen.append(progress.bytes_read))
    assert problems(verdict) == []
    assert verdict.whole
    assert verdict.tensors == len(SHAPES)
    assert verdict.nbytes == check.bytes_to_read == sum(math.prod(shape) * 4 for shape in SHAPES.values())
    assert verdict.files == len([path for path in merged.iterdir() if path.name != MANIFEST])
    assert (verdict.unverified, verdict.changed_sources, verdict.missing_sources) == ((), (), ())
    assert seen == sorted(seen)
    assert seen[-1] == verdict.nbytes


def test_every_flipped_bit_is_found(out: Path) -> None:
    """Anywhere: data, headers, index, config, manifest, tokenizer, model card."""
    chance = random.Random(0)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"config.json", MANIFEST, "tokenizer.json", "model.safetensors.index.json"} <= {path.name for path in files}
    weights = [path.stat().st_size if path.suffix == ".safetensors" else 8000 for path in files]
    for _ in range(FLIPS):
        file = chance.choices(files, weights)[0]
        data = bytearray(file.read_bytes())
        # headers are short compared with the data, and get a part of their own
        place = chance.randrange(len(data) if chance.random() < 0.7 else min(len(data), 4096))
        data[place] ^= 1 << chance.randrange(8)
        before = file.read_bytes()
        file.write_bytes(data)
        try:
            found = problems(verify(out))
        except MergeloomError as error:
            found = [str(error)]
        assert any(file.name in problem or "tensor" in problem for problem in found), (file, place)
        file.write_bytes(before)
    assert verify(out).whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: (out / "config.json").unlink(), "config.json: is missing"),
        (lambda out: next(out.glob("*1-of*.safetensors")).unlink(), "1-of-.*: there is no such file"),
        (lambda out: os.truncate(next(out.glob("*1-of*.safetensors")), 5000), "has 5000 bytes instead of"),
        (lambda out: append_byte(next(out.glob("*1-of*.safetensors"))), "bytes instead of"),
        (lambda out: (out / "more.safetensors").write_bytes(b""), "^more.safetensors$"),
        (lambda out: (out / "pytorch_model.bin").write_bytes(b""), "^pytorch_model.bin$"),
        (lambda out: (out / "adapter.safetensors.index.json").write_text("{}"), "^adapter.safetensors.index.json$"),
        (lambda out: _swap(out), "header was changed|instead of"),
        (lambda out: _replace_by(out / "config.json", Path("/dev/zero")), "config.json: is missing"),
    ],
)  # fmt: skip
def test_what_is_gone_or_added_is_found(change: Callable[[Path], object], said: str, out: Path) -> None:
    change(out)
    verdict = verify(out)
    assert not verdict.whole
    assert any(re.search(said, problem) for problem in problems(verdict)), problems(verdict)


def _swap(out: Path) -> None:
    first, second = sorted(out.glob("*.safetensors"))[:2]
    first.rename(out / "x")
    second.rename(first)
    (out / "x").rename(second)


def _replace_by(file: Path, target: Path) -> None:
    file.unlink()
    file.symlink_to(target)


def test_files_may_be_links(out: Path, tmp_path: Path) -> None:
    """As the Hub's cache has them."""
    for number, file in enumerate([path for path in out.iterdir() if path.is_file()]):
        file.rename(tmp_path / f"blob{number}")
        file.symlink_to(tmp_path / f"blob{number}")
    assert verify(out).whole


def test_there_must_be_a_manifest(tmp_path: Path, out: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"is empty; expected .* a finished merge, which has a mergeloom.json"):
        verify(empty)
    (out / MANIFEST).unlink()
    (out / WORK).mkdir()
    with pytest.raises(UsageError, match="is not empty .*, and mergeloom did not write these files; expected"):
        verify(out)


# ------------------------------------------------------------------------------------------------ sources

COPIED = {"model.layers.2.w.weight", "model.layers.3.w.weight", "model.norm.weight"}
"""Tensors that only come from the first model, and whose bytes no process reads."""


def test_sources_are_not_needed(finished: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the Hub: nothing is opened outside OUT, and what has no digest is listed, not damaged."""
    monkeypatch.setattr(opening, "open_model", forbidden)
    for model in finished.models:
        shutil.rmtree(model)
    moved = tmp_path / "elsewhere" / "out"
    shutil.copytree(tmp_path / "out", moved)
    verdict = verify(moved)
    assert verdict.whole
    assert verdict.tensors == len(SHAPES) - len(COPIED)
    assert {found.tensor for found in verdict.unverified} == COPIED
    assert {(found.origin, found.file, found.reason) for found in verdict.unverified} == {
        (f"copied from {finished.models[0]}", "model.safetensors", "")
    }
    assert sum(found.nbytes for found in verdict.unverified) == 2 * 64 * 50 * 4 + 50 * 4
    assert Verification(moved).bytes_to_read == verdict.nbytes


def forbidden(*arguments: object) -> None:
    """Nothing that may be called."""
    raise AssertionError("a source was opened")


@pytest.mark.parametrize("tensor", sorted(SHAPES))
def test_a_flipped_bit_is_found_in_what_has_a_digest_or_a_source(tensor: str, finished: Merge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flip(*position_of(out, tensor))
    damaged = verify(out).damaged
    assert len(damaged) == (tensor not in COPIED)
    assert all(f"tensor {tensor} in " in text and "was changed" in text for text in damaged)
    compared = verify(out, sources=True)
    assert len(compared.damaged) == 1
    assert compared.unverified == ()
    assert ("differs from its source" in compared.damaged[0]) == (tensor in COPIED)


def test_sources_that_changed_or_are_missing(finished: Merge, tmp_path: Path) -> None:
    out, source = tmp_path / "out", finished.models[0] / "model.safetensors"
    assert verify(out, sources=True).tensors == len(SHAPES)
    flip(*position_of(finished.models[0], "model.layers.2.w.weight"))
    verdict = verify(out, sources=True)
    assert verdict.whole  # OUT is as it was
    assert verdict.changed_sources == (str(source),)
    assert [found.tensor for found in verdict.unverified] == ["model.layers.2.w.weight"]
    assert verdict.unverified[0].reason == f"{source} has changed since the merge"
    shutil.rmtree(finished.models[0])
    verdict = verify(out, sources=True)
    assert verdict.whole
    assert verdict.changed_sources == ()
    assert {found.tensor for found in verdict.unverified} == COPIED
    assert all(found.reason.startswith('no directory "') for found in verdict.unverified)
    assert len(verdict.missing_sources) == 1
    assert verdict.missing_sources[0].startswith(f"model.safetensors of {finished.models[0]}: ")


def test_the_manifest_says_what_was_copied(finished: Merge, tmp_path: Path) -> None:
    """Manifests of earlier versions don't; there, the offsets tell what can't be shared."""
    entries = read_manifest(tmp_path / "out")["tensors"]
    assert {name for name, entry in entries.items() if not isinstance(entry, str)} == COPIED
    assert all(entries[name]["copied"] is True for name in COPIED)
    for step, origin in ((4096, "shared with"), (4096 + 1, "copied from")):

        def change(content: dict[str, Any], step: int = step) -> None:
            for name in COPIED:
                del content["tensors"][name]["copied"]
                content["tensors"][name]["offset"] = position_of(tmp_path / "out", name)[1] + step

        again = Path(shutil.copytree(tmp_path / "out", tmp_path / origin))
        forge(again, change)
        assert {found.origin for found in verify(again).unverified} == {f"{origin} {finished.models[0]}"}


def test_shared_tensors_are_listed_with_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system shares blocks; this one is made to look so, and copies instead."""

    def clone(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
        os.pwrite(target, os.pread(source, nbytes, source_offset), target_offset)
        return 0

    monkeypatch.setattr(sharing, "why_no_clone", lambda source, scratch: 0)
    monkeypatch.setattr(copying, "clone_range", clone)
    model = write_checkpoint(tmp_path / "a", {"model.layers.0.w.weight": (2000, 600), "model.norm.weight": (50,)})
    recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    assert merge(recipe, tmp_path / "out").measured.bytes_shared > 0
    merge(recipe, tmp_path / "full", digests=True)
    shutil.rmtree(model)
    verdict = verify(tmp_path / "out")
    assert verdict.whole
    assert verdict.tensors == 0
    assert {(found.tensor, found.origin) for found in verdict.unverified} == {
        ("model.layers.0.w.weight", "shared with a"),
        ("model.norm.weight", "shared with a"),
    }
    flip(*position_of(tmp_path / "out", "model.norm.weight"))
    assert verify(tmp_path / "out").whole  # nothing tells, which is what "unverified" means
    verdict = verify(tmp_path / "full")
    assert (verdict.whole, verdict.tensors, verdict.unverified) == (True, 2, ())
    flip(*position_of(tmp_path / "full", "model.norm.weight"))
    assert verify(tmp_path / "full").damaged == ("tensor model.norm.weight in model.safetensors was changed",)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["verify", str(out)]) == 0
    files = len([path for path in out.iterdir() if path.name != MANIFEST])
    assert capsys.readouterr().out == f"OK: 5 tensors of 51.4KB and {files} files match the manifest\n"
    assert __main__.main(["verify", str(out), "--quiet", "--sources"]) == 0
    assert capsys.readouterr().out == ""
    (out / "chat_template.jinja").write_text("{{ messages }}")
    assert __main__.main(["verify", str(out), "--quiet"]) == 4
    said = capsys.readouterr()
    assert "not OK: 5 tensors" in said.out
    assert "Added, and used by loaders\n  chat_template.jinja" in said.out
    assert "loaders would use files that the merge did not write: chat_template.jinja; move them out" in said.err
    (out / "config.json").write_text("{}")
    assert __main__.main(["verify", str(out), "--quiet"]) == 4
    said = capsys.readouterr()
    assert "Damaged\n  config.json: was changed" in said.out
    assert "config.json: was changed; copy it from an intact copy, or merge again" in said.err
    (out / "config.json").unlink()
    shutil.rmtree(out)
    assert __main__.main(["verify", str(out)]) == 4
    assert "there is no such directory; expected the directory of a finished merge" in capsys.readouterr().err


def test_the_command_lists_what_is_unverified(
    finished: Merge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = tmp_path / "out", finished.models[0]
    assert __main__.main(["verify", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("OK: 2 tensors of 25.6KB and ")
    assert f"\n  unverified: copied from {source}: 3 tensors of 25.8KB\n" in said
    assert "`mergeloom merge --digests full` records digests" in said
    assert __main__.main(["verify", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = len([path for path in out.iterdir() if path.name != MANIFEST])
    assert found["verified"] == {"tensors": 2, "bytes": 25_600, "files": files}
    assert {entry["tensor"] for entry in found["unverified"]} == COPIED
    assert {entry["shared"] for entry in found["unverified"]} == {False}
    assert found["damaged"] == found["added"] == found["changed_sources"] == found["missing_sources"] == []
    assert __main__.main(["verify", str(out), "--sources"]) == 0
    assert "unverified" not in capsys.readouterr().out
    flip(*position_of(source, "model.layers.2.w.weight"))
    assert __main__.main(["verify", str(out), "--sources", "--quiet"]) == 4
    said = capsys.readouterr()
    assert f"unverified: copied from {source}: 1 tensor of 12.8KB ({source}/model.safetensors has changed" in said.out
    assert f"{source}/model.safetensors has changed since the merge; {out} is undamaged" in said.err
    shutil.rmtree(source)
    assert __main__.main(["verify", str(out), "--sources"]) == 0
    assert "Sources that could not be checked\n  model.safetensors of" in capsys.readouterr().out


def test_sources_are_found_by_name_or_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest has only the end of a local path, and which models were local, so none is looked up on the Hub."""
    here = tmp_path / "models" / "a"
    other = tmp_path / "others" / "a"
    for number, model in enumerate((here, other)):
        write_checkpoint(model, SHAPES, fill=number)
    out = tmp_path / "out"
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 2]}]} for model in (here, other)]
    merge({"merge_method": "passthrough", "slices": slices}, out)
    assert json.loads((out / MANIFEST).read_text())["models"] == ["models/a", "others/a"]
    monkeypatch.setattr(hub, "find_repository", lambda *arguments: pytest.fail("a request to the Hub"))
    missing = verify(out, sources=True)
    assert missing.missing_sources == tuple(
        f'model.safetensors of {name}: no directory "{name}" here; '
        f"say where it is: mergeloom verify {out} --sources --model {name}=PATH"
        for name in ("models/a", "others/a")
    )
    found = verify(out, sources=True, models={"models/a": str(here), "others/a": str(other)})
    assert (found.missing_sources, found.unverified, found.damaged) == ((), (), ())
    assert (
        __main__.main(["verify", str(out), "--sources", "--model", f"models/a={here}", "--model", f"others/a={other}"])
        == 0
    )
    assert "could not be checked" not in capsys.readouterr().out
    other.parent.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert len(verify(out, sources=True).missing_sources) == 1
    for arguments in (["--model", f"a={here}"], ["--sources", "--model", "a"], ["--sources", "--model", "b=x"]):
        assert __main__.main(["verify", str(out), *arguments]) == 2
    assert "was not made from a model named b: its manifest names models/a, others/a" in capsys.readouterr().err
