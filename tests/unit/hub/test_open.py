"""Opening a model on the Hub reads only metadata and headers, and follows the rules for local directories."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import mergeloom
from mergeloom.engine.model.adapters.loaded import open_adapter
from mergeloom.engine.model.checks.identify import check_is_model
from mergeloom.engine.model.inspect import inspect_model
from mergeloom.engine.model.open import open_input
from mergeloom.engine.recipe.types import ModelReference
from mergeloom.engine.run.finished import check_finished
from mergeloom.errors import CheckpointError, ModelNotFound, UsageError
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.hub.checkpoint import HubCheckpoint, needed_files, open_hub_model
from mergeloom.io.hub.repository import is_hub_id
from mergeloom.io.output.lock import classify
from tests.support import models
from tests.support.hub.fixtures import ID, INDEX, description, index_of, refused, single
from tests.support.hub.server import HubServer
from tests.unit.recipe.parsing import parse


def test_opening_transfers_less_than_a_hundredth(hub: HubServer, local: Path, contents: dict[str, bytes]) -> None:
    commit = hub.add(ID, contents)
    checkpoint = open_hub_model(ID)
    assert len(checkpoint.files) == 14
    whole = sum(ref.nbytes for ref in checkpoint.tensors.values())
    assert hub.sent() < whole / 100
    assert hub.sent(r"\.safetensors$") < whole / 300
    assert not {"README.md", "LICENSE", "tokenizer.json"} & hub.fetched()
    snapshot = Path(constants.HF_HUB_CACHE) / "models--acme--llama" / "snapshots" / commit.sha
    assert checkpoint.path == snapshot
    assert description(checkpoint, snapshot) == description(open_checkpoint(local), local)


def test_inspect_names_the_repository_and_its_commit(model: HubCheckpoint) -> None:
    found = inspect_model(ID).description
    assert found.source == "hub"
    assert found.source_text.startswith(f"repository {ID} on the Hub, commit {model.repository.commit[:12]}, 14 files")


LAYOUTS: dict[str, dict[str, bytes]] = {
    "single": {"model.safetensors": single("a", "b"), "other.safetensors": single("c")},
    "single of another name": {"weights.safetensors": single("a")},
    "variants of diffusers": {"diffusion_pytorch_model.safetensors": single("a"),
                              "diffusion_pytorch_model.fp16.safetensors": single("a")},
    "united": {"b.safetensors": single("x", metadata={"made": "b"}), "a.safetensors": single("y")},
    "consolidated": {"a.safetensors": single("x"), "consolidated.safetensors": single("x")},
    "consolidated alone": {"consolidated.00.safetensors": single("x"), "original/model.safetensors": single("y")},
    "adapter": {"adapter_model.safetensors": single("x"), "config.json": b'{"a": 1}'},
    "index": {INDEX: index_of({"a": "1.safetensors", "b": "2.safetensors"}), "1.safetensors": single("a"),
              "2.safetensors": single("b", "unlisted"), "3.safetensors": single("stale")},
    "index of another name": {"x.safetensors.index.json": index_of({"a": "1.safetensors"}),
                              "1.safetensors": single("a")},
    "index into folders": {INDEX: index_of({"a": "./deep/1.safetensors", "b": "deep/1.safetensors"}),
                           "deep/1.safetensors": single("a", "b")},
    "index and a single file": {INDEX: index_of({"a": "1.safetensors"}), "1.safetensors": single("a"),
                              "model.safetensors": single("z")},
    "complete set": {"m-1-of-2.safetensors": single("a"), "m-2-of-2.safetensors": single("b")},
    "incomplete set": {"m-1-of-2.safetensors": single("a"), "config.json": b"{}"},
    "index and an adapter": {INDEX: index_of({"a": "1.safetensors"}), "1.safetensors": single("a"),
                             "adapter_model.safetensors": single("z")},
    "copies": {INDEX: index_of({"a": "2.safetensors", "b": "1.safetensors"}), "1.safetensors": single("a", "b"),
               "2.safetensors": single("a")},
    "several indexes": {"a.safetensors.index.json": b"{}", "b.safetensors.index.json": b"{}"},
    "pickles": {"pytorch_model.bin": b"PK", "config.json": b"{}"},
    "other formats": {"model.gguf": b"GGUF"},
    "nothing": {"README.md": b"#"},
    "missing shard": {INDEX: index_of({"a": "1.safetensors"})},
    "missing tensor": {INDEX: index_of({"a": "1.safetensors"}), "1.safetensors": single("b")},
    "two of a name": {"a.safetensors": single("x"), "b.safetensors": single("x")},
    "leaves": {INDEX: index_of({"a": "../1.safetensors"})},
    "damaged": {"model.safetensors": single("a")[:-1]},
    "empty": {"model.safetensors": b""},
    "no header": {"model.safetensors": b"<!doctype html><title>Sorry</title>"},
    "bad config": {"config.json": b"[", "model.safetensors": single("a")},
    "bad index": {INDEX: b"{}"},
}  # fmt: skip


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
def test_the_rules_are_those_of_a_directory(hub: HubServer, tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        file = tmp_path / "local" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    hub.add(ID, files)
    directory = tmp_path / "local"
    try:
        expected = description(open_checkpoint(directory), directory)
    except CheckpointError as error:
        found = refused()
        assert str(tmp_path) not in found
        said = str(error).replace(f"{directory}/", f"{ID}@main/").replace(str(directory), f"{ID}@main")
        if INDEX in files or "model.safetensors" in files or "a.safetensors" in files:
            assert found == said or "aren't in the repository" in found
        else:  # what there is to do is another thing for a repository
            assert found.replace("@main", "")[:40] == said.replace("@main", "")[:40]
    else:
        checkpoint = open_hub_model(ID)
        assert description(checkpoint, checkpoint.path) == expected


def test_an_adapter_is_named_with_its_base(hub: HubServer) -> None:
    config = b'{"peft_type": "IA3", "base_model_name_or_path": "acme/base"}'
    hub.add(ID, {"adapter_model.safetensors": single("q.lora_A.weight"), "adapter_config.json": config})
    with pytest.raises(CheckpointError) as caught:
        check_is_model(ID, open_hub_model(ID))
    error = str(caught.value)
    assert error.startswith(f"{ID} is an adapter (IA3) of acme/base, not a model")
    assert f"base, adapter = 'acme/base', '{ID}'" in error
    assert f"save_pretrained('{ID.rpartition('/')[2]}-merged')" in error


def test_an_adapter_is_opened_with_its_config(hub: HubServer) -> None:
    config = b'{"peft_type": "LORA", "base_model_name_or_path": "acme/base", "r": 4, "lora_alpha": 6}'
    hub.add(ID, {"adapter_model.safetensors": single("q.lora_A.weight"), "adapter_config.json": config})
    with pytest.raises(CheckpointError, match=f"write `acme/base\\+{ID}`"):
        check_is_model(ID, open_hub_model(ID))
    adapter = open_adapter(ModelReference(ID), lambda reference: open_hub_model(reference.path, reference.revision))
    assert adapter.config.base == "acme/base"
    assert adapter.config.scale("q") == 1.5
    assert list(adapter.changes.modules) == ["q"]


def test_a_wrapped_model_is_downloaded_before_a_script_renames_it(hub: HubServer) -> None:
    hub.add(ID, {"model.safetensors": single("a._orig_mod.w", "b._orig_mod.w")})
    with pytest.raises(CheckpointError, match=rf"# first: hf download {ID} --local-dir"):
        check_is_model(ID, open_hub_model(ID))


def test_a_model_is_renamed_without_a_download(hub: HubServer) -> None:
    hub.add(ID, {"model.safetensors": single("module.a", "module.b")})
    text = f"merge_method: linear\nmodels: [{{model: {ID}, rename: [[module., '']]}}]\nparameters: {{weight: 1}}\n"
    recipe = parse(text)
    opened = open_input(recipe, ModelReference(ID))
    assert list(opened.tensors) == ["a", "b"]
    check_is_model(ID, opened)
    (file,) = needed_files(opened, opened.tensors.values())
    assert (file.name, file.present) == ("model.safetensors", False)


def test_a_header_longer_than_the_first_request(hub: HubServer) -> None:
    names = [f"tensor.{number:05}.{'x' * 40}" for number in range(1500)]
    hub.add(ID, {"model.safetensors": single(*names)})
    assert list(open_hub_model(ID).tensors) == names
    first, rest = [served for served in hub.log if served.cdn]
    assert (first.start, rest.start) == (0, first.nbytes)
    assert first.nbytes + rest.nbytes == len(single(*names)) - 8 * len(names)


def test_a_server_without_range_support(hub: HubServer, local: Path, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents)
    hub.ranges = False
    checkpoint = open_hub_model(ID)
    assert list(checkpoint.tensors) == list(open_checkpoint(local).tensors)


def test_reopening_makes_at_most_one_request(hub: HubServer, model: HubCheckpoint) -> None:
    again = open_hub_model(ID, "main")
    assert [served.target.partition("?")[0] for served in hub.log] == [f"/api/models/{ID}/revision/main"]
    hub.log.clear()
    by_commit = open_hub_model(ID, model.repository.commit)
    assert hub.log == []
    assert again.tensors == by_commit.tensors == model.tensors


def test_a_new_commit_fetches_only_changed_headers(
    hub: HubServer, model: HubCheckpoint, contents: dict[str, bytes]
) -> None:
    files = dict(contents)
    changed = model.files[3].name
    files[changed] = files[changed][:-1] + b"\x01"
    hub.add(ID, files)
    newer = open_hub_model(ID)
    assert newer.path != model.path
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == {changed}
    assert isinstance(newer, HubCheckpoint)
    identities = [
        (old.name, model.identity(old) == newer.identity(new))
        for old, new in zip(model.files, newer.files, strict=True)
    ]
    assert [name for name, same in identities if not same] == [changed]
    assert re.fullmatch(r"[0-9a-f]{32}", model.identity(model.files[0]))


def test_revisions(hub: HubServer, local: Path) -> None:
    hub.add(ID, {"model.safetensors": single("old")}, revision="v1.0")
    hub.add(ID, {"model.safetensors": single("new")}, revision="refs/pr/1")
    assert list(open_hub_model(ID, "v1.0").tensors) == ["old"]
    assert list(open_hub_model(ID, "refs/pr/1").tensors) == ["new"]


def test_a_damaged_cache_is_fetched_again(hub: HubServer, model: HubCheckpoint) -> None:
    assets = Path(constants.HF_ASSETS_CACHE)
    for kept in [path for path in assets.rglob("*") if path.is_file()]:
        kept.write_bytes(kept.read_bytes()[:-3])
    assert open_hub_model(ID, model.repository.commit).tensors == model.tensors


@pytest.mark.parametrize("text", ["gpt2", "meta-llama/Llama-3.1-8B", "a/b", "TheBloke/x_y.z"])
def test_ids(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["", ".", "./a", "../a", "/a", "~/a", "a/b/c", "a//b", "a/..", "a--b/c", "a b", "é/b", "a/"]
)
def test_invalid_ids_are_never_requested(hub: HubServer, text: str) -> None:
    assert not is_hub_id(text)
    assert "nor a valid id" in refused(text, error=ModelNotFound)
    assert hub.log == []


def test_a_plan_from_the_cache_loads_no_network_library(model: HubCheckpoint, tmp_path: Path) -> None:
    code = (
        "import sys; from mergeloom.io.hub.checkpoint import open_hub_model\n"
        f"assert len(open_hub_model({ID!r}, {model.repository.commit!r}).tensors) == {len(model.tensors)}\n"
        "print([name for name in sys.modules if name.startswith(('httpx', 'requests', 'huggingface_hub.utils'))])"
    )
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:1",
    }
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_files_come_from_models_of_the_hub(hub: HubServer, contents: dict[str, bytes], tmp_path: Path) -> None:
    small = models.write_tokenizer(models.write_checkpoint(tmp_path / "small", models.tiny_llama(layers=2), fill=1))
    named = {name: data for name, data in contents.items() if name != "generation_config.json"}
    hub.add(ID, {**{file.name: file.read_bytes() for file in small.iterdir()}, "LICENSE": b"ours"})
    hub.add("other/model", {**named, "config.json": (small / "config.json").read_bytes(), "LICENSE": b"theirs"})
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": ID}],
        "files_from": "other/model",
        "tokenizer_source": "other/model",
        "chat_template": "mistral",
    }
    planned = mergeloom.plan(recipe)
    assert "LICENSE" not in hub.fetched()
    mergeloom.merge(planned, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"theirs"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == contents["tokenizer.json"]
    assert "[INST]" in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert hub.sent(r"model-\d+-of-\d+\.safetensors") < sum(map(len, contents.values())) / 20  # headers, no weights


def test_a_finished_merge_is_checked_without_downloading(
    hub: HubServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """A new commit has other files of the tokenizer, and none of its files is here: the Hub's hashes tell."""
    hub.add(ID, {**contents, "README.md": b"# First"})
    recipe = {"merge_method": "passthrough", "models": [{"model": ID}]}
    mergeloom.merge(recipe, tmp_path / "out")
    hub.add(ID, {**contents, "README.md": b"# Second"})
    planned = mergeloom.plan(recipe)
    hub.log.clear()
    assert "tensor data was not read" in check_finished(planned, classify(tmp_path / "out"))
    hub.add(ID, {**contents, "tokenizer.json": contents["tokenizer.json"] + b" "})
    planned = mergeloom.plan(recipe)
    with pytest.raises(
        UsageError, match=r"tokenizer\.json of the model that it comes from has changed; choose another"
    ):
        check_finished(planned, classify(tmp_path / "out"))
    hub.add(ID, {**contents, "chat_template.jinja": b"{{ messages }}"})
    planned = mergeloom.plan(recipe)
    with pytest.raises(UsageError, match=r"chat_template\.jinja is not in it and would be written now; choose another"):
        check_finished(planned, classify(tmp_path / "out"))
    assert not {"tokenizer.json", "LICENSE"} & hub.fetched()  # the plan reads the small chat_template.jinja
    assert mergeloom.verify(tmp_path / "out").whole
