"""PyTorch files on the Hub are opened by range requests like those with headers, and merged like local ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import mergeloom
from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.hub.checkpoint import open_hub_model
from tests.support.hub.fixtures import ID, description, refused
from tests.support.hub.server import HubServer
from tests.support.models.torch_files import CONFIG, saved, write_torch_model
from tests.support.outputs import read_model

OLD = {"_use_new_zipfile_serialization": False}


@pytest.fixture(scope="module", params=["zip", "legacy"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 MB in 2 shards, with a transposed tensor."""
    generator = torch.Generator().manual_seed(3)
    state = {"model.embed_tokens.weight": torch.randn(2000, 256, generator=generator).t().contiguous().t()}
    for layer in range(CONFIG["num_hidden_layers"]):  # type: ignore[call-overload]
        for name in ("q", "k", "v", "o", "up", "down"):
            state[f"model.layers.{layer}.{name}.weight"] = torch.randn(1100, 256, generator=generator)
    directory = tmp_path_factory.mktemp("torch") / "model"
    return write_torch_model(directory, state, shards=2, **(OLD if request.param == "legacy" else {}))


def files_of(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


def test_opening_transfers_little_and_nothing_twice(hub: HubServer, model: Path) -> None:
    hub.add(ID, files_of(model))
    checkpoint = open_hub_model(ID)
    assert description(checkpoint, checkpoint.path) == description(open_checkpoint(model), model)
    assert checkpoint.views == open_checkpoint(model).views
    assert checkpoint.kind.startswith("PyTorch")
    sent = hub.sent(r"\.bin$")
    assert 0 < sent < sum(ref.nbytes for ref in checkpoint.tensors.values()) / 50
    again = open_hub_model(ID)
    assert hub.sent(r"\.bin$") == sent
    assert description(again, again.path) == description(checkpoint, checkpoint.path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: b"", lambda data: bytes(len(data)), lambda data: data + b"x" * 9]
)
def test_a_damaged_cache_is_not_used(hub: HubServer, model: Path, damage: Callable[[bytes], bytes]) -> None:
    hub.add(ID, files_of(model))
    expected = open_hub_model(ID)
    for file in (Path(constants.HF_ASSETS_CACHE) / "mergeloom" / "headers").glob("*.torch"):
        file.write_bytes(damage(file.read_bytes()))
    found = open_hub_model(ID)
    assert description(found, found.path) == description(expected, expected.path)


def test_a_merge_downloads_the_files_and_equals_that_of_a_directory(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    hub.add(ID, files_of(model))
    recipe = {"merge_method": "linear", "dtype": "bfloat16", "parameters": {"weight": 1}}
    plan = mergeloom.plan(recipe | {"models": [{"model": ID}]})
    assert hub.sent(r"\.bin$") < 500_000
    mergeloom.merge(plan, tmp_path / "remote")
    mergeloom.merge(recipe | {"models": [{"model": str(model)}]}, tmp_path / "local")
    found, expected = read_model(tmp_path / "remote"), read_model(tmp_path / "local")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    described = open_hub_model(ID)  # from the downloaded files
    assert description(described, described.path) == description(open_checkpoint(model), model)


def test_a_hostile_file_is_refused_by_its_name(hub: HubServer) -> None:
    hub.add(ID, {"pytorch_model.bin": saved(torch.nn.Linear(2, 2))})
    assert f"{ID}@main/pytorch_model.bin: its pickle needs 'torch.nn.modules.linear.Linear'" in refused()


def test_safetensors_come_first(hub: HubServer, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents | {"pytorch_model.bin": b"never fetched", "training_args.bin": b"never fetched"})
    assert open_hub_model(ID).kind == "safetensors"
    assert not {"pytorch_model.bin", "training_args.bin"} & hub.fetched()


def test_the_size_of_all_metadata_is_limited(hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, files_of(model))
    monkeypatch.setattr("mergeloom.io.hub.checkpoint.MAX_HEADERS_BYTES", 10_000)
    with pytest.raises(CheckpointError, match="exceed the limit of 10,000 bytes"):
        open_hub_model(ID)
