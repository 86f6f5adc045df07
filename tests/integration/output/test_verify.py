"""Verifying: what is changed is found, what can't be vouched for is said, and a manifest from anywhere is harmless."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mergeloom import __main__
from mergeloom.engine.model import open as opening
from mergeloom.engine.run import placement as sharing
from mergeloom.engine.run.manifest import MANIFEST, read_manifest
from mergeloom.engine.run.manifest import _to_bytes as to_bytes
from mergeloom.engine.run.manifest import _self_digest as self_digest
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.verify import Verdict, Verification, verify
from mergeloom.errors import CheckpointError, MergeloomError, UsageError
from mergeloom.io.companions import is_loader_file
from mergeloom.io.output import clone as copying
from mergeloom.io.output.directory import WORK
from mergeloom.io.safetensors.checkpoint import open_checkpoint
from tests.support.models.write import write_checkpoint
from tests.support.waiting import no_hang
from tests.unit.io.test_companions import OTHER, TOKENIZER

FLIPS = 1000  # about a quarter of them in headers and the smaller files
SHAPES = {f"model.layers.{layer}.w.weight": (64, 50) for layer in range(4)} | {"model.norm.weight": (50,)}


@dataclass(frozen=True)
class Merge:
    """A merge of two models, layer by layer in the lower half, in the upper half copied from the first."""

    models: list[Path]
    recipe: dict[str, Any]

    def run(self, out: Path, *, digests: bool = False, say: Callable[[str], None] | None = None) -> Path:
        """Merge into OUT, in two shards."""
        options = Options(device="cpu", threads=1, max_ram=4 << 30, shard_size=30_000)
        merge(self.recipe, out, options, digests=digests, say=say)
        return out


def make_merge(directory: Path) -> Merge:
    """Two models, and the recipe."""
    models = [write_checkpoint(directory / name, SHAPES, dtype="F32", fill=seed) for seed, name in enumerate("ab")]
    (models[0] / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "model_type": "llama"}))
    (models[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    slices = [
        {"sources": [{"model": str(model), "layer_range": [0, 2]} for model in models]},
        {"sources": [{"model": str(models[0]), "layer_range": [2, 4]}]},
    ]
    return Merge(models, {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}})


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge with all digests, not to be changed: computed and copied tensors, two shards, companions."""
    directory = tmp_path_factory.mktemp("verify")
    return make_merge(directory).run(directory / "out", digests=True)


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.fixture
def finished(tmp_path: Path) -> Merge:
    """A merge whose sources may be changed; its OUT, next to them, has no digests of what the kernel copied."""
    made = make_merge(tmp_path)
    made.run(tmp_path / "out")
    return made


def problems(verdict: Verdict) -> list[str]:
    """Everything that is wrong."""
    return [*verdict.damaged, *verdict.added]


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
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"is empty; this needs .* a finished merge, which has a mergeloom.json"):
        verify(empty)
    (out / MANIFEST).unlink()
    (out / WORK).mkdir()
    with pytest.raises(UsageError, match="is not empty .*, and mergeloom did not write these files; this needs"):
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


def flip(file: Path, place: int) -> None:
    """Flip one bit."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def place_of(out: Path, tensor: str) -> tuple[Path, int]:
    """The shard and offset of a tensor's first byte."""
    ref = open_checkpoint(out).tensors[tensor]
    return ref.file, ref.offset


@pytest.mark.parametrize("tensor", sorted(SHAPES))
def test_a_flipped_bit_is_found_in_what_has_a_digest_or_a_source(tensor: str, finished: Merge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flip(*place_of(out, tensor))
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
    flip(*place_of(finished.models[0], "model.layers.2.w.weight"))
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
    assert all("there is no such" in found.reason or "not" in found.reason for found in verdict.unverified)
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
                content["tensors"][name]["offset"] = place_of(tmp_path / "out", name)[1] + step

        again = Path(shutil.copytree(tmp_path / "out", tmp_path / origin))
        forged(again, change)
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
        ("model.layers.0.w.weight", f"shared with {model}"),
        ("model.norm.weight", f"shared with {model}"),
    }
    flip(*place_of(tmp_path / "out", "model.norm.weight"))
    assert verify(tmp_path / "out").whole  # nothing tells, which is what "unverified" means
    verdict = verify(tmp_path / "full")
    assert (verdict.whole, verdict.tensors, verdict.unverified) == (True, 2, ())
    flip(*place_of(tmp_path / "full", "model.norm.weight"))
    assert verify(tmp_path / "full").damaged == ("tensor model.norm.weight in model.safetensors was changed",)


# ------------------------------------------------------------------------------------------------ added files

USED = """config.json generation_config.json adapter_config.json adapter_model.safetensors adapter_model.bin
    model.safetensors.index.json model-00009-of-00009.safetensors pytorch_model.bin weights.pt model.gguf tf_model.h5
    chat_template.jinja chat_template.json additional_chat_templates/tools.jinja chat_templates/rag.json
    tokenizer_config.json tokenizer.model tokenizer.model.v3 special_tokens_map.json added_tokens.json vocab.json
    vocab.txt merges.txt entity_vocab.json spiece.model source.spm qwen.tiktoken bpe.codes tekken.json dict.txt
    preprocessor_config.json processor_config.json video_preprocessor_config.json modeling_custom.py
    custom_generate/generate.py quantize_config.json quant_config.json hf_quant_config.json modules.json
    sentence_bert_config.json config_sentence_transformers.json model_index.json params.json CONFIG.JSON"""
HARMLESS = """README.txt LICENSE NOTICE.md picture.png notes.txt figures/loss.json results.json .gitattributes
    .git/config.json .hidden.safetensors logs/vocab.txt old/model.safetensors config.json.bak upload.sh"""


@pytest.mark.parametrize("name", [name for name in USED.split() if name not in ("config.json", "tokenizer.json")])
def test_added_files_that_loaders_use_are_found(name: str, out: Path) -> None:
    (out / name).unlink(missing_ok=True)
    if name in read_manifest(out)["files"]:
        forged(out, lambda content: content["files"].pop(name))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    verdict = verify(out)
    assert verdict.added == (name,)
    assert verdict.damaged == ()
    assert not verdict.whole


def test_added_files_that_no_loader_uses_are_harmless(out: Path) -> None:
    for name in HARMLESS.split():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    (out / "tokenizer_config.json").mkdir()  # no loader opens a directory
    (out / "chat_template.jinja").symlink_to("nowhere")
    verdict = verify(out)
    assert problems(verdict) == []
    assert verdict.whole


def test_every_name_of_a_companion_is_one_that_loaders_use() -> None:
    names = [*TOKENIZER.split(), *OTHER.split(), "generation_config.json"]
    texts = re.compile("licen[cs]e|notice|use_policy", re.IGNORECASE)
    assert [name for name in names if not is_loader_file(name) and not texts.search(name)] == []
    assert [name for name in names if is_loader_file(name) and texts.search(name)] == []
    assert not is_loader_file("README.md")


def test_a_folder_of_the_manifest_is_searched(encoder: Path, tmp_path: Path) -> None:
    """That of a module of sentence-transformers."""
    merge({"merge_method": "passthrough", "models": [{"model": str(encoder)}]}, tmp_path / "out")
    assert verify(tmp_path / "out").whole
    (tmp_path / "out" / "1_Pooling" / "pytorch_model.bin").write_bytes(b"")
    assert verify(tmp_path / "out").added == ("1_Pooling/pytorch_model.bin",)


# ------------------------------------------------------------------------------------------------ merging again


def again(finished: Merge, out: Path) -> list[str]:
    """What the same merge says of its finished OUT."""
    said: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    try:
        finished.run(out, say=said.append)
    finally:
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    return said


def test_a_finished_merge_says_what_was_checked(finished: Merge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = read_manifest(out)
    shards, files = len(manifest["shards"]), len(manifest["files"])
    assert again(finished, out) == [
        f"{out} is already complete, nothing to do: recipe, inputs, size and header of {shards} shards and {files} "
        f"other files match; tensor data was not read: `mergeloom verify {out}` checks it, except 3 tensors without a "
        "digest"
    ]
    flip(*place_of(out, "model.layers.0.w.weight"))  # which it said that it doesn't check
    assert len(again(finished, out)) == 1
    (finished.models[0] / "notes.txt").write_text("no companion")
    (out / "notes.txt").write_text("harmless")
    assert len(again(finished, out)) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: flip(out / "config.json", 5), "config.json: was changed"),
        (lambda out: flip(out / "tokenizer.json", 5), "tokenizer.json: was changed"),
        (lambda out: flip(out / "README.md", 5), "README.md: was changed"),
        (lambda out: flip(out / "model.safetensors.index.json", 5), "model.safetensors.index.json: was changed"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda out: flip(next(out.glob("*1-of*.safetensors")), 60), "1-of-.*: its header was changed"),
        (lambda out: _append(next(out.glob("*1-of*.safetensors"))), "1-of-.* bytes instead of"),
        (lambda out: next(out.glob("*1-of*.safetensors")).unlink(), "1-of-.*: there is no such file"),
        (lambda out: (out / "chat_template.jinja").write_text("{}"), "loaders would use .* not write: chat_template.j"),
        (lambda out: (out / "model.gguf").write_text("{}"), "loaders would use files .*: model.gguf; move them out"),
        (lambda out: flip(out / MANIFEST, 60), "mergeloom.json: was changed since it was written"),
    ],
)  # fmt: skip
def test_a_finished_merge_that_was_changed_is_refused(
    change: Callable[[Path], object], said: str, finished: Merge, tmp_path: Path
) -> None:
    change(tmp_path / "out")
    with pytest.raises(CheckpointError, match=said):
        again(finished, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda source: (source / "config.json").write_text('{"num_hidden_layers": 4, "model_type": "mistral"}'),
            "config.json would have other content now",
        ),
        (
            lambda source: (source / "tokenizer.json").write_text('{"version": "1.1"}'),
            "tokenizer.json of the model that it comes from has changed",
        ),
        (lambda source: (source / "tokenizer.json").unlink(), "tokenizer.json is in it and would not be written now"),
        (
            lambda source: (source / "chat_template.jinja").write_text("{{ messages }}"),
            "chat_template.jinja is not in it and would be written now",
        ),
        (
            lambda source: (source / "generation_config.json").write_text("{}"),
            "generation_config.json is not in it and would be written now",
        ),
    ],
)
def test_a_finished_merge_with_other_files_is_refused(
    change: Callable[[Path], object], said: str, finished: Merge, tmp_path: Path
) -> None:
    """The tensors would be the same, and the model would not."""
    change(finished.models[0])
    with pytest.raises(UsageError, match=f"this one differs from it: {said}; choose another OUT"):
        again(finished, tmp_path / "out")


def test_a_recipe_with_another_chat_template_is_another_merge(finished: Merge, tmp_path: Path) -> None:
    finished.recipe["chat_template"] = "{{ messages }}"
    with pytest.raises(UsageError, match=r"chat_template.jinja is not in it and would be written now"):
        again(finished, tmp_path / "out")


def test_the_model_card_may_say_something_else(finished: Merge, tmp_path: Path) -> None:
    """The recipe that it quotes has comments, and names, that change nothing else."""
    finished.recipe["name"] = "Another title"
    assert len(again(finished, tmp_path / "out")) == 1


# ------------------------------------------------------------------------------------------------ hostile manifests


def forged(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and make it look untouched."""
    content = json.loads((out / MANIFEST).read_text())
    change(content)
    content["digest"] = self_digest(content)
    (out / MANIFEST).write_bytes(to_bytes(content))


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
ORIGINS.append({"model": 0, "file": "a", "offset": 0, "copied": 1})
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
    with pytest.raises(CheckpointError, match="has an invalid structure"):
        read_manifest(out)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"[" * 100_000, b'{"digest": 1e999}', b"\xff", b"1" * 10_000])
def test_what_is_no_manifest_is_refused(content: bytes, out: Path) -> None:
    (out / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(out)


def test_a_manifest_is_a_file_of_bounded_size(out: Path, tmp_path: Path) -> None:
    (out / MANIFEST).unlink()
    (out / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="is not empty"):
        read_manifest(out)
    (out / MANIFEST).unlink()
    with (out / MANIFEST).open("wb") as stream:
        stream.truncate(200 << 30)
    with pytest.raises(CheckpointError, match="is larger than"):
        read_manifest(out)
    (out / MANIFEST).unlink()
    os.mkfifo(out / MANIFEST)
    with pytest.raises(UsageError, match="is not empty"):
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
    assert "there is no such directory; this needs the directory of a finished merge" in capsys.readouterr().err


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
    flip(*place_of(source, "model.layers.2.w.weight"))
    assert __main__.main(["verify", str(out), "--sources", "--quiet"]) == 4
    said = capsys.readouterr()
    assert f"unverified: copied from {source}: 1 tensor of 12.8KB ({source}/model.safetensors has changed" in said.out
    assert f"{source}/model.safetensors has changed since the merge; {out} is undamaged" in said.err
    shutil.rmtree(source)
    assert __main__.main(["verify", str(out), "--sources"]) == 0
    assert "Sources that could not be checked\n  model.safetensors of" in capsys.readouterr().out
