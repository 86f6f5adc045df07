"""Fixtures and helpers for tests with a local Hub server: a model, its repository, an empty cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

from mergeloom.errors import CheckpointError, MergeloomError
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.io.hub import http as hub_http
from mergeloom.io.hub.checkpoint import HubCheckpoint, needed_files, open_hub_model
from mergeloom.io.hub.repository import HubFile
from mergeloom.io.safetensors.header import build_header
from mergeloom.io.tensors.dtypes import F32
from tests.support import models
from tests.support.hub.server import HubServer, serving

ID = "acme/llama"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model of 36 MB in 14 shards."""
    shape = models.tiny_llama(layers=12, hidden=384, vocabulary=2048)
    directory = models.write_checkpoint(tmp_path_factory.mktemp("hub") / "llama", shape, shard_bytes=3_000_000)
    (directory / "LICENSE").write_text("Apache-2.0")
    (directory / "README.md").write_text("# A model")
    return models.write_tokenizer(directory)


@pytest.fixture(scope="module")
def contents(local: Path) -> dict[str, bytes]:
    """The content of the files of `local`, by name."""
    return {path.name: path.read_bytes() for path in local.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub without models, a user without a token, and an empty cache."""
    with serving() as server:
        close_session()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "hf" / "assets"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setattr(hub_http, "FIRST_WAIT", 0.001)
        yield server
        close_session()


@pytest.fixture
def model(hub: HubServer, contents: dict[str, bytes]) -> HubCheckpoint:
    """The model on the Hub, opened, with an empty request log."""
    hub.add(ID, contents)
    checkpoint = open_hub_model(ID)
    assert isinstance(checkpoint, HubCheckpoint)
    hub.log.clear()
    return checkpoint


def single(*names: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of float32 vectors of two elements."""
    return build_header([(name, F32, (2,)) for name in names], metadata or {}) + bytes(8 * len(names))


def index_of(weight_map: Mapping[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def refused(repo: str = ID, revision: str | None = None, error: type[MergeloomError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        open_hub_model(repo, revision)
    assert type(caught.value) is error
    assert not isinstance(caught.value.__context__, AssertionError)
    return str(caught.value)


def description(checkpoint: Checkpoint, root: Path) -> dict[str, Any]:
    """All fields of a checkpoint, with paths relative to `root`."""
    return {
        "tensors": [
            (name, str(ref.file.relative_to(root)), ref.offset, ref.nbytes, ref.dtype, ref.shape)
            for name, ref in checkpoint.tensors.items()
        ],
        "config": checkpoint.config,
        "metadata": dict(checkpoint.metadata),
        "files": [str(file.relative_to(root)) for file in checkpoint.files],
        "ignored": [str(file.relative_to(root)) for file in checkpoint.ignored],
        "remarks": checkpoint.remarks,
        "index": None if checkpoint.index is None else str(checkpoint.index.relative_to(root)),
    }


def layer_files(checkpoint: Checkpoint, *layers: int) -> tuple[HubFile, ...]:
    used = [ref for name, ref in checkpoint.tensors.items() if any(f"layers.{layer}." in name for layer in layers)]
    return needed_files(checkpoint, used)
