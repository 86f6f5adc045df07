"""A finished merge in OUT: files that were added or changed, and the same merge again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mergeloom.engine.run.manifest import MANIFEST, read_manifest
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.verify import verify
from mergeloom.errors import CheckpointError, UsageError
from mergeloom.io.companions import is_loader_file
from tests.support.merges.verified import Merge, append_byte, flip, forge, make_merge, position_of, problems
from tests.support.models.companions import OTHER, TOKENIZER


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
        forge(out, lambda content: content["files"].pop(name))
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
        f"{out} is already complete, nothing to do: recipe, inputs (by size, header and samples), size and header of "
        f"{shards} shards and {files} "
        f"other files match; tensor data was not read: `mergeloom verify {out}` checks it, except 3 tensors without a "
        "digest"
    ]
    flip(*position_of(out, "model.layers.0.w.weight"))  # which it said that it doesn't check
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
        (lambda out: append_byte(next(out.glob("*1-of*.safetensors"))), "1-of-.* bytes instead of"),
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
