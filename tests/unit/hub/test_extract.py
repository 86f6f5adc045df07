"""An extraction downloads the files of Hub models that hold its tensors, unless it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import mergeloom
from mergeloom.errors import UsageError
from tests.support.hub.fixtures import ID
from tests.support.hub.server import HubServer


@pytest.fixture
def tuned(local: Path, tmp_path: Path) -> Path:
    """A copy of the Hub's model with one other matrix."""
    copy = tmp_path / "tuned"
    shutil.copytree(local, copy)
    name = "model.layers.0.self_attn.q_proj.weight"
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = copy / index["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * 1.5}, file)
    return copy


def test_shards_with_extracted_tensors_are_downloaded(
    hub: HubServer, tuned: Path, contents: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, contents)
    said: list[str] = []
    out = tmp_path / "out"
    result = mergeloom.extract_lora(tuned, ID, out, rank=2, include=[r"layers\.0\.self_attn\.q"], say=said.append)
    assert [matrix.name for matrix in result.matrices] == ["model.layers.0.self_attn.q_proj.weight"]
    assert said[0].startswith("downloading 1 file")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == ID
    shards = json.loads((out / "mergeloom_extraction.json").read_text())["facts"]["base"]
    assert len(shards) == 1


def test_an_out_with_other_files_is_refused_first(
    hub: HubServer, tuned: Path, contents: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, contents)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(UsageError, match="is not empty"):
        mergeloom.extract_lora(tuned, ID, tmp_path / "out", rank=2)
    assert not hub.fetched()
