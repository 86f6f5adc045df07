"""The test models are what they say: published sizes, files that safetensors opens, task vectors of the stated size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support import models


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        (models.llama_3_2_1b(), 146, 1_235_814_400),
        (models.llama_3_2_3b(), 254, 3_212_749_824),
        (models.llama_3_8b(), 291, 8_030_261_248),
        (models.llama_3_70b(), 723, 70_553_706_496),
        (models.llama_3_1_405b(), 1137, 405_853_388_800),
        (models.deepseek_v3(fp8=False, mtp=False), 45_395, 671_026_419_200),
    ],
    ids=["1B", "3B", "8B", "70B", "405B", "DeepSeek-V3"],
)
def test_shape_tables_have_the_published_sizes(model: models.Model, tensors: int, parameters: int) -> None:
    assert (len(model.tensors), model.parameters) == (tensors, parameters)


def test_deepseek_v3_as_published_has_a_scale_for_each_fp8_weight() -> None:
    model = models.deepseek_v3()
    assert len(model.tensors) == 91_991
    assert model.tensors["model.layers.0.mlp.down_proj.weight_scale_inv"] == (56, 144)


def test_headers_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    model = models.tiny_llama(tied=True)
    models.write_checkpoint(tmp_path / "ours", model)
    tensors = load_file(tmp_path / "ours/model.safetensors")
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_and_index(tmp_path: Path) -> None:
    model = models.tiny_llama()
    models.write_checkpoint(tmp_path, model, shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(tmp_path.glob("model-*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: (file.name, tuple(shard.get_slice(name).get_shape())) for name in shard.keys()}  # noqa: SIM118
    assert index["metadata"]["total_size"] == 2 * model.parameters
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert {name: shape for name, (_, shape) in found.items()} == model.tensors
    assert len(set(index["weight_map"].values())) > 1


def test_transformers_runs_the_tiny_llama(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models.write_tokenizer(models.write_checkpoint(tmp_path, models.tiny_llama(tied=True)))
    assert AutoTokenizer.from_pretrained(tmp_path)("word3 word1 ?")["input_ids"] == [3, 1, 0]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_sparse_checkpoint_takes_no_disk(tmp_path: Path) -> None:
    models.write_checkpoint(tmp_path, models.llama_3_8b(), shard_bytes=5 * 10**9, fill=None)
    files = list(tmp_path.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 16 * 10**9
    assert sum(file.stat().st_blocks * 512 for file in files) < 10**6


def test_fine_tunes_have_task_vectors_of_their_own() -> None:
    base = models.Random(0)
    count = 3 * models.CHUNK
    values = [base("a", 0, count), models.FineTune(base, 1)("a", 0, count), models.FineTune(base, 2)("a", 0, count)]
    deltas = [value - values[0] for value in values[1:]]
    assert values[0].std() == pytest.approx(0.02, rel=0.01)
    assert [delta.std() for delta in deltas] == pytest.approx([0.002, 0.002], rel=0.01)
    assert abs(np.corrcoef(deltas)[0, 1]) < 0.01
    np.testing.assert_array_equal(values[1][1000:300_000], models.FineTune(base, 1)("a", 1000, 299_000))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
        *[("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)],
    ],
)
def test_values_are_rounded_as_torch_does(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    fill = models.Random(3)
    models.write_checkpoint(tmp_path, {"x": (1000,)}, dtype=name, fill=fill)
    stored = load_file(tmp_path / "model.safetensors")["x"]
    assert stored.dtype == dtype
    assert torch.equal(stored.double(), torch.from_numpy(fill("x", 0, 1000).copy()).to(dtype).double())


def test_a_perturbed_encoder_differs_by_its_scale(tmp_path: Path) -> None:
    models.perturbed_encoder(tmp_path, seed=1, scale=0.1)
    before = load_file(models.encoder_dir() / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.3.output.dense.weight"
    assert ((after[name] - before[name]).std() / before[name].std()).item() == pytest.approx(0.1, rel=0.01)
    assert torch.equal(after["embeddings.position_ids"], before["embeddings.position_ids"])
