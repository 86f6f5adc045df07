"""PEFT loads extracted adapters, and a model with a complete adapter computes what the fine-tune computes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergeloom
from tests.support.extraction.families import CONFIGS, Model, load, outputs, save_pair
from tests.support.extraction.matrices import adapter_config, adapter_tensors

TIED = {"llama tied", "qwen2 tied", "gpt2"}
FULL_RANK = 24


def fresh(family: str, directory: Path, out: Path) -> Model:
    """A base model with an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(family, directory), out).eval()


def merged(model: Model) -> Model:
    """The base model with the adapter merged by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.merge_and_unload()


@pytest.mark.parametrize("embed", [False, True], ids=["saved", "embed"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_complete_adapter_makes_the_fine_tune(tmp_path: Path, family: str, embed: bool) -> None:
    save_pair(tmp_path, family)
    result = mergeloom.extract_lora(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=FULL_RANK, embed=embed
    )
    assert result.left_out == ()
    tuned = load(family, tmp_path / "tuned")
    expected = outputs(tuned)
    assert (outputs(load(family, tmp_path / "base")) - expected).abs().max() > 0.1
    model = fresh(family, tmp_path / "base", tmp_path / "out")
    assert (outputs(model) - expected).abs().max() <= 2e-6 * expected.abs().max()
    if family in TIED and embed and any("embed_tokens" in matrix.name for matrix in result.matrices):
        assert any("merge_and_unload" in warning for warning in result.warnings)
        return  # PEFT adds the factors to the shared matrix twice
    found, wanted = merged(model).state_dict(), tuned.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-6, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3 moe"])
def test_merging_adds_the_product_of_the_factors(tmp_path: Path, family: str) -> None:
    save_pair(tmp_path, family)
    out = tmp_path / "out"
    result = mergeloom.extract_lora(tmp_path / "tuned", tmp_path / "base", out, rank=3, low_rank_only=True)
    assert {reason for _, reason in result.left_out} == {"--low-rank-only"}
    assert adapter_config(out)["modules_to_save"] is None
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged(fresh(family, tmp_path / "base", out)).save_pretrained(tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    factors = adapter_tensors(out)
    for matrix in result.matrices:
        module = matrix.name.removesuffix(".weight")
        delta = factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double()
        expected = base[matrix.name].double() + (delta.T if family == "gpt2" else delta)
        assert (found[matrix.name].double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_an_untrained_expert_next_to_trained_ones_has_factors_of_zeros(tmp_path: Path) -> None:
    save_pair(tmp_path, "qwen3 moe")
    base, tuned = (load_file(tmp_path / each / "model.safetensors") for each in ("base", "tuned"))
    same = [name for name in base if "layers.0.mlp.experts.2." in name or "layers.1.mlp.experts." in name]
    assert len(same) == 3 + 12
    save_file(tuned | {name: base[name] for name in same}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    result = mergeloom.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=FULL_RANK)
    assert result.unchanged == len(same)
    factors = adapter_tensors(tmp_path / "out")
    expert = "model.layers.0.mlp.experts.2.up_proj.lora_{}.weight"
    assert not any(factors[expert.format(each)].any() for each in "AB")
    assert not any("layers.1.mlp.experts" in name for name in factors)
    expected = outputs(load("qwen3 moe", tmp_path / "tuned"))
    found = outputs(fresh("qwen3 moe", tmp_path / "base", tmp_path / "out"))
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_a_head_trained_apart_from_its_tied_embedding_is_saved(tmp_path: Path) -> None:
    """The fine-tune has a head of its own, the base model doesn't."""
    save_pair(tmp_path, "llama tied")
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.01
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    result = mergeloom.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=FULL_RANK)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(result.saved)
    assert adapter_config(tmp_path / "out")["ensure_weight_tying"] is False
    expected = outputs(load("llama", tmp_path / "tuned"))
    found = outputs(fresh("llama", tmp_path / "base", tmp_path / "out"))
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_names_without_the_base_models_prefix_get_it(tmp_path: Path) -> None:
    """The files of ``gpt2`` on the Hub have no ``transformer.`` before their names."""
    save_pair(tmp_path, "gpt2")
    for each in ("base", "tuned"):
        file = tmp_path / each / "model.safetensors"
        bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        save_file(bare, file, {"format": "pt"})
    mergeloom.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=FULL_RANK)
    expected = outputs(load("gpt2", tmp_path / "tuned"))
    found = outputs(fresh("gpt2", tmp_path / "base", tmp_path / "out"))
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


class Convolutions(torch.nn.Module):
    """A model of convolutions: in two dimensions, for each channel, and in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 16, 4, stride=2)
        self.channels = torch.nn.Conv2d(16, 16, 3, groups=16)
        self.sequence = torch.nn.Conv1d(16, 12, 3)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The values of shape (n, 3, height, width) after all layers."""
        return torch.as_tensor(self.sequence(self.channels(self.patches(values)).flatten(2)))


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tuned = Convolutions(), Convolutions()
    for name, model in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    result = mergeloom.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=16)
    assert {matrix.name for matrix in result.matrices} == {"patches.weight", "sequence.weight"}
    assert set(result.saved) == {"channels.weight", "channels.bias", "patches.bias", "sequence.bias"}
    values = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        expected = tuned(values)
        assert (model(values) - expected).abs().max() <= 1e-5
        assert (model.merge_and_unload()(values) - expected).abs().max() <= 1e-5


def test_bfloat16_models(tmp_path: Path) -> None:
    save_pair(tmp_path, "qwen2", dtype=torch.bfloat16)
    mergeloom.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=FULL_RANK)
    found: dict[str, Any] = merged(fresh("qwen2", tmp_path / "base", tmp_path / "out")).state_dict()
    for name, tensor in load("qwen2", tmp_path / "tuned").state_dict().items():
        assert (found[name] - tensor).abs().max() <= 1e-6, name


def test_a_saved_module_whose_name_ends_another_name(tmp_path: Path) -> None:
    """PEFT saves all modules whose name ends like an entry: ``norm`` is the end of ``input_layernorm``."""
    save_pair(tmp_path, "llama")
    for each in ("base", "tuned"):
        file = tmp_path / each / "model.safetensors"
        tensors = {n.removeprefix("model."): t for n, t in load_file(file).items() if n != "lm_head.weight"}
        if each == "tuned":
            same = load_file(tmp_path / "base" / "model.safetensors")
            tensors |= {name: tensor for name, tensor in same.items() if "layernorm" in name}
        save_file(tensors, file, {"format": "pt"})
        config = json.loads((tmp_path / each / "config.json").read_text())
        (tmp_path / each / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    result = mergeloom.extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=FULL_RANK)
    assert {"norm.weight", "layers.0.input_layernorm.weight"} <= set(result.saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "base")
        found = outputs(peft.PeftModel.from_pretrained(loaded, tmp_path / "out"))
    assert result.left_out == ()
    expected = outputs(transformers.AutoModel.from_pretrained(tmp_path / "tuned"))
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
