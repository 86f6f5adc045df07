"""A comparison downloads the files of Hub models that hold compared tensors, and no others."""

from __future__ import annotations

from pathlib import Path

import mergeloom
from mergeloom.engine.run.diff.compare import Comparison
from tests.support import models
from tests.support.hub.fixtures import ID
from tests.support.hub.server import HubServer


def test_a_hub_model_is_downloaded_and_compared(hub: HubServer, local: Path, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents)
    said: list[str] = []
    found = mergeloom.diff(local, ID, say=said.append)
    assert found.equal
    assert found.b == ID
    assert len(said) == 1
    assert said[0].startswith("downloading 14 files")
    assert not {"README.md", "LICENSE", "tokenizer.json"} & hub.fetched()
    assert Comparison(local, ID).downloads == ()


def test_only_shards_with_compared_tensors_are_downloaded(
    hub: HubServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, contents)
    norm = models.write_checkpoint(tmp_path / "norm", {"model.norm.weight": (384,)})
    found = mergeloom.diff(norm, ID)
    assert len(found.tensors) == 1
    assert len([name for name in hub.fetched() if name.endswith(".safetensors")]) == 14  # the headers of all
    assert sum(len(contents[name]) for name in contents if name.endswith(".safetensors")) > 4 * hub.sent()
