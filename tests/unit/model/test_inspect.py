"""What `inspect` says of a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mergeloom.engine.model.inspect import inspect_model
from mergeloom.errors import CheckpointError, ModelNotFound
from mergeloom.report.inspect import inspection_sections
from mergeloom.report.sections import plain
from tests.conftest import MakeModel
from tests.support import models


def text_of(path: Path, *, tensors: bool = False) -> str:
    """What people read."""
    return plain(inspection_sections(inspect_model(path), tensors=tensors))


def test_the_real_encoder(encoder: Path) -> None:
    found = inspect_model(encoder).to_dict()
    assert (found["tensors"], found["parameters"], found["layers"]) == (104, 22_713_728, 6)
    assert found["bytes"] == 90_856_960
    assert found["stacks"] == [
        {
            "prefix": "encoder.layer",
            "layers": 6,
            "extra_layers": [],
            "main": True,
            "config_key": "num_hidden_layers",
            "tensors": 96,
            "bytes": 42_587_136,
        }
    ]
    assert found["dtypes"]["I64"] == {"tensors": 1, "parameters": 512, "bytes": 4096}
    assert len(found["outside"]) == 8
    text = text_of(encoder)
    assert "BertModel" in text
    assert "22,713,728 (22.7M) in 104 tensors" in text


def test_sizes_and_files_add_up(llamas: dict[str, Path]) -> None:
    found = inspect_model(llamas["a"]).to_dict()
    assert len(found["files"]) > 1
    for part in ("files", "dtypes"):
        parts = found[part].values() if part == "dtypes" else found[part]
        assert sum(entry["bytes"] for entry in parts) == found["bytes"]
        assert sum(entry["tensors"] for entry in parts) == found["tensors"]
    assert sum(stack["tensors"] for stack in found["stacks"]) + len(found["outside"]) == found["tensors"]
    assert "tied to model.embed_tokens.weight" in text_of(llamas["a"])


def test_every_tensor_is_listed_where_asked_for(llamas: dict[str, Path]) -> None:
    inspection = inspect_model(llamas["a"])
    assert "tensor_list" not in inspection.to_dict()
    listed = inspection.to_dict(tensors=True)["tensor_list"]
    assert {entry["name"] for entry in listed} == inspection.checkpoint.tensors.keys()
    text = text_of(llamas["a"], tensors=True)
    for name in inspection.checkpoint.tensors:
        assert name in text
    json.dumps(inspection.to_dict(tensors=True))


def test_a_mixture_of_experts_with_a_prediction_head_in_fp8(make_model: MakeModel) -> None:
    model = make_model("moe", models.deepseek_v3(layers=4, experts=4, hidden=448), fill=None)
    inspection = inspect_model(model)
    assert [stack["extra_layers"] for stack in inspection.to_dict()["stacks"]] == [[4]]
    text = text_of(model)
    assert "4 + extra 4" in text
    assert "(FP8 blocks)" in text
    assert "F8_E4M3" not in text
    assert " in FP8 blocks (" in text
    found = inspection.to_dict()["formats"]
    assert list(found) == ["FP8 blocks"]
    assert found["FP8 blocks"]["tensors"] == sum(name.endswith("_scale_inv") for name in inspection.checkpoint.tensors)


def test_what_is_odd_is_said_and_the_rest_is_shown(make_model: MakeModel) -> None:
    config = {**models.tiny_llama().config, "num_hidden_layers": 9}
    model = make_model("odd", models.tiny_llama(layers=4), config=config)
    (model / "model-old.safetensors").write_bytes(b"stale")
    text = text_of(model)
    assert "num_hidden_layers = 9" in text
    assert "none found" in text
    assert "model-old.safetensors" in text
    assert "model.embed_tokens.weight" in text


def test_many_files_are_shortened_for_people_only(make_model: MakeModel) -> None:
    model = make_model("many", models.tiny_llama(layers=8), shard_bytes=9000)
    files = sorted(model.glob("*.safetensors"))
    assert len(files) > 10
    text = text_of(model)
    assert files[0].name in text
    assert files[-1].name in text
    assert f"... {len(files) - 8} more" in text
    assert len(inspect_model(model).to_dict()["files"]) == len(files)


def test_a_single_file_without_config(make_model: MakeModel) -> None:
    model = make_model("bare", {"layers.0.w": (2, 2), "layers.1.w": (2, 2), "scalar": ()})
    text = text_of(model / "model.safetensors")
    assert "no config.json" in text
    assert "layers" in text


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        inspect_model(tmp_path / "nowhere")


def test_it_needs_no_torch(llamas: dict[str, Path]) -> None:
    code = (
        "import sys; from mergeloom.__main__ import main; "
        f"main(['inspect', {str(llamas['a'])!r}, '--tensors']); assert not {{'torch', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["a+b", "model@home", "c++"])
def test_a_path_that_is_there_is_no_reference(make_model: MakeModel, name: str) -> None:
    """Recipes read `a+b` as a model with a LoRA adapter, and `model@home` as a revision."""
    model = make_model(name, {"model.layers.0.w.weight": (4, 4)})
    assert inspect_model(model).to_dict()["tensors"] == 1
    with pytest.raises(ModelNotFound, match="^nowhere: "):
        inspect_model("nowhere+nothing")
