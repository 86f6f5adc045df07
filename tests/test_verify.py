"""Verifying: what is changed is found, what can't be vouched for is said, and a manifest from anywhere is harmless."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeloom import __main__
from mergeloom.errors import CheckpointError, EnvironmentFailure, MergeloomError
from mergeloom.io.output import WORK
from mergeloom.manifest import MANIFEST, read_manifest
from mergeloom.manifest import _dumped as dumped
from mergeloom.manifest import _self_digest as self_digest
from mergeloom.merging import merge
from mergeloom.planning import Options
from mergeloom.verifying import Verdict, verify
from tests.models import write_checkpoint
from tests.waiting import no_hang

FLIPS = 1000  # about a quarter of them in headers and the smaller files
SHAPES = {f"model.layers.{layer}.w.weight": (64, 50) for layer in range(4)} | {"model.norm.weight": (50,)}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge, not to be changed: computed and copied tensors, two shards, an index, companions."""
    directory = tmp_path_factory.mktemp("verify")
    models = [write_checkpoint(directory / name, SHAPES, dtype="F32", fill=seed) for seed, name in enumerate("ab")]
    (models[0] / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "model_type": "llama"}))
    (models[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    slices = [
        {"sources": [{"model": str(model), "layer_range": [0, 2]} for model in models]},
        {"sources": [{"model": str(models[0]), "layer_range": [2, 4]}]},
    ]
    recipe = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}
    merge(recipe, directory / "out", Options(device="cpu", threads=1, max_ram=4 << 30, shard_size=30_000))
    return directory / "out"


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


def problems(verdict: Verdict) -> list[str]:
    """Everything that was found."""
    return [*verdict.damaged, *verdict.unvouched]


def test_a_merge_is_what_its_manifest_says(merged: Path) -> None:
    seen: list[int] = []
    verdict = verify(merged, sources=True, notify=lambda progress: seen.append(progress.bytes_read))
    assert problems(verdict) == []
    assert verdict.whole
    assert verdict.tensors == len(SHAPES)
    assert verdict.nbytes == sum(math.prod(shape) * 4 for shape in SHAPES.values())
    assert seen == sorted(seen)


def test_every_flipped_bit_is_found(out: Path) -> None:
    """Anywhere: data, headers, index, config, manifest, tokenizer, model card."""
    chance = random.Random(0)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"config.json", MANIFEST, "tokenizer.json", "model.safetensors.index.json"} <= {path.name for path in files}
    weights = [path.stat().st_size if path.suffix == ".safetensors" else 8000 for path in files]
    for _ in range(FLIPS):
        file = chance.choices(files, weights)[0]
        data = bytearray(file.read_bytes())
        # headers are short beside the data, and get a part of their own
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
        (lambda out: _append(next(out.glob("*1-of*.safetensors"))), "bytes instead of"),
        (lambda out: (out / "more.safetensors").write_bytes(b""), "more.safetensors is not in the manifest"),
        (lambda out: (out / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is not in the manifest"),
        (lambda out: (out / "adapter.safetensors.index.json").write_text("{}"), "index.json is not in the manifest"),
        (lambda out: _swap(out), "header was changed|instead of"),
        (lambda out: _replace_by(out / "config.json", Path("/dev/zero")), "config.json: is missing"),
    ],
)  # fmt: skip
def test_what_is_gone_or_added_is_found(change: Callable[[Path], object], said: str, out: Path) -> None:
    change(out)
    verdict = verify(out)
    assert not verdict.whole
    assert any(__import__("re").search(said, problem) for problem in problems(verdict)), problems(verdict)


def _append(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


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
    with pytest.raises(CheckpointError, match=r"has no mergeloom.json: only what mergeloom has made"):
        verify(tmp_path)
    (out / MANIFEST).unlink()
    (out / WORK).mkdir()
    with pytest.raises(CheckpointError, match="the merge in it isn't finished: run its command again"):
        verify(out)


def test_sources_are_held_against_what_they_were(merged: Path, tmp_path: Path) -> None:
    source = merged.parent / "b" / "model.safetensors"
    before = source.read_bytes()
    try:
        source.write_bytes(before[:-4] + b"\xff" * 4)
        assert verify(merged).whole or verify(merged).damaged  # copies of it are compared
        verdict = verify(merged, sources=True)
        assert any("model.safetensors is not what it was" in problem for problem in verdict.damaged)
        source.unlink()
        verdict = verify(merged, sources=True)
        assert any("model.safetensors of model" in problem for problem in verdict.unvouched)
    finally:
        source.write_bytes(before)


# ------------------------------------------------------------------------------------------------ hostile manifests


def forged(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and make it look untouched."""
    content = json.loads((out / MANIFEST).read_text())
    change(content)
    content["digest"] = self_digest(content)
    (out / MANIFEST).write_bytes(dumped(content))


def set_path(*keys: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


PARTS = ("shards", "files", "tensors", "sources", "models")
ORIGINS: list[Any] = [
    {"model": model, "file": file, "offset": offset}
    for model, file, offset in ((99, "a", 0), (0, "../a", 0), (0, "a", -1), (0, "a", 10**30), ("0", "a", 0), (0, 1, 0))
]
SOURCES = [("99", {}), ("x", {}), ("-1", {}), ("0", []), ("9" * 5000, {}), ("0", {"../a": "b"})]


@pytest.mark.parametrize(
    "change",
    [
        *(set_path(part, to=value) for part in PARTS for value in (None, 1, "a", [1], [[]])),
        *(
            set_path("shards", name, to=[1, "a"])
            for name in ("../a", "/dev/zero", "", "a/../../b", "\0", f"{WORK}/pid")
        ),
        *(set_path("files", name, to="a") for name in ("../a", "/dev/zero", "")),
        *(set_path("shards", "a", to=value) for value in (1, [1], ["1", "a"], [True, "a"], [1, 1], [1.5, "a"])),
        *(set_path("tensors", "x", to=value) for value in (1, None, {}, *ORIGINS)),
        *(set_path("sources", number, to=value) for number, value in SOURCES),
        set_path("models", to=[1]),
    ],
)
def test_a_manifest_that_is_not_as_ours_is_refused(change: Callable[[dict[str, Any]], None], out: Path) -> None:
    forged(out, change)
    with pytest.raises(CheckpointError, match="is not as mergeloom writes it"):
        read_manifest(out)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"[" * 100_000, b'{"digest": 1e999}', b"\xff", b"1" * 10_000])
def test_what_is_no_manifest_is_refused(content: bytes, out: Path) -> None:
    (out / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(out)


def test_a_manifest_is_a_file_of_bounded_size(out: Path, tmp_path: Path) -> None:
    (out / MANIFEST).unlink()
    (out / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_manifest(out)
    (out / MANIFEST).unlink()
    with (out / MANIFEST).open("wb") as stream:
        stream.truncate(200 << 30)
    with pytest.raises(CheckpointError, match="is larger than"):
        read_manifest(out)
    (out / MANIFEST).unlink()
    os.mkfifo(out / MANIFEST)
    with pytest.raises((CheckpointError, EnvironmentFailure)):
        read_manifest(out)


def test_what_a_manifest_names_is_not_read_where_it_is_no_file(out: Path) -> None:
    """A device, a pipe or a directory in the place of a file ends nothing and hangs nothing."""
    (out / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(out / "pipe")
    (out / "shard").symlink_to("/dev/zero")

    def change(content: dict[str, Any]) -> None:
        content["files"]["pipe"] = content["files"]["chat"] = "00"
        content["shards"]["shard"] = [100, "00"]
        content["shards"]["pipe"] = [100, "00"]
        content["tensors"]["x"] = {"model": 0, "file": "pipe", "offset": 0}

    (out / "chat").mkdir()
    forged(out, change)
    with no_hang():
        verdict = verify(out, sources=True)
    assert {"pipe: is missing", "chat: is missing"} <= set(verdict.damaged)
    assert any("tensor x is missing" in problem for problem in verdict.damaged)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["verify", str(out)]) == 0
    assert "whole: 5 tensors of" in capsys.readouterr().out
    assert __main__.main(["verify", str(out), "--quiet", "--sources"]) == 0
    assert capsys.readouterr().out == ""
    (out / "config.json").write_text("{}")
    assert __main__.main(["verify", str(out), "--quiet"]) == 4
    said = capsys.readouterr()
    assert "Damaged\n  config.json: was changed" in said.out
    assert "config.json: was changed; make it again" in said.err
    (out / "config.json").unlink()
    shutil.rmtree(out)
    assert __main__.main(["verify", str(out)]) == 4
    assert "has no mergeloom.json" in capsys.readouterr().err
