"""Vocabularies on the Hub are compared by the hashes of their files, which are downloaded only if they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import mergeloom
from tests.support import models
from tests.support.adapters.files import PREFIX, write_lora
from tests.support.hub.server import HubServer

A, B = "acme/a", "acme/b"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model with a tokenizer of 32 tokens."""
    model = models.write_checkpoint(tmp_path_factory.mktemp("hub") / "model", models.tiny_llama(layers=2))
    return {path.name: path.read_bytes() for path in models.write_tokenizer(model).iterdir()}


def swapped(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The model with two tokens swapped."""
    tokenizer = json.loads(files["tokenizer.json"])
    rows = tokenizer["model"]["vocab"]
    rows["word4"], rows["word5"] = 5, 4
    return {**files, "tokenizer.json": json.dumps(tokenizer).encode()}


def linear(*names: str) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": name} for name in names], "parameters": {"weight": 1}}


def test_equal_vocabularies_are_not_downloaded(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(A, files)
    hub.add(B, {**files, "tokenizer_config.json": b'{"model_max_length": 5}'})
    assert mergeloom.plan(linear(A, B)).warnings == ()
    local = tmp_path / "local"
    local.mkdir()
    for name, data in files.items():
        (local / name).write_bytes(data)
    assert mergeloom.plan(linear(A, str(local))).warnings == ()
    assert mergeloom.plan(linear(str(local), B)).warnings == ()
    assert {"generation_config.json", "tokenizer_config.json"} <= hub.fetched()
    assert "tokenizer.json" not in hub.fetched()


def test_different_vocabularies_are_compared(hub: HubServer, files: dict[str, bytes]) -> None:
    hub.add(A, files)
    hub.add(B, swapped(files))
    (warning,) = mergeloom.plan(linear(A, B)).warnings
    assert f"the vocabularies of {A} and {B} differ in 2 of 32 rows" in warning
    hub.log.clear()
    assert mergeloom.plan(linear(A, B)).warnings == (warning,)
    assert hub.fetched() == set()


def test_small_files_tell_of_tokens_beyond_the_rows(hub: HubServer, files: dict[str, bytes]) -> None:
    decoder = {"added_tokens_decoder": {"64": {"content": "<x>"}}}
    hub.add(A, {**files, "tokenizer_config.json": json.dumps(decoder).encode()})
    (warning,) = mergeloom.plan(linear(A)).warnings
    assert f"the tokenizer of {A} has tokens beyond the 64 rows of the output's embeddings: '<x>' (64)" in warning
    assert "tokenizer.json" not in hub.fetched()


def test_checks_of_tokens_need_no_network(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(A, files)
    hub.add(B, files)
    mergeloom.plan(linear(A, B))
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--acme--b/snapshots/*")
    (snapshot / "generation_config.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert mergeloom.plan(linear(A, B)).warnings == ()
    assert hub.log == []


def test_the_tokenizer_of_an_adapter_on_the_hub_is_downloaded(
    hub: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    """A merge with an adapter whose embeddings have two rows more than the base's."""
    tables = {f"{PREFIX}{name}.weight": torch.ones(66, 32) for name in ("model.embed_tokens", "lm_head")}
    shapes = models.tiny_llama(layers=2).tensors
    adapter = write_lora(tmp_path / "adapter", shapes, targets=("q_proj",), more=tables)
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["model"]["vocab"] |= {"word64": 64, "word65": 65}
    own = {path.name: path.read_bytes() for path in adapter.iterdir()}
    hub.add(A, files)
    hub.add(B, {**own, "tokenizer.json": json.dumps(tokenizer).encode()})
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{A}+{B}"}]}
    planned = mergeloom.plan(recipe)
    assert planned.warnings == ()
    mergeloom.merge(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == tokenizer
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()  # that of the base belongs to another tokenizer
