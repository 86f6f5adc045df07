"""Extracted adapters in references: `base+adapter` is the fine-tune, and gives the same adapter again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mergeloom
from mergeloom.errors import UsageError
from tests.support.extraction.families import CONFIGS, save_pair
from tests.support.extraction.matrices import product, relative_error

FULL_RANK = 24


@pytest.mark.parametrize("embed", [False, True], ids=["saved", "embed"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_merge_of_the_base_with_a_complete_adapter_is_the_fine_tune(tmp_path: Path, family: str, embed: bool) -> None:
    save_pair(tmp_path, family)
    adapter = tmp_path / "adapter"
    mergeloom.extract_lora(tmp_path / "tuned", tmp_path / "base", adapter, rank=FULL_RANK, embed=embed)
    model = {"model": f"{tmp_path / 'base'}+{adapter}"}
    mergeloom.merge({"merge_method": "passthrough", "models": [model], "dtype": "float32"}, tmp_path / "out")
    found, expected = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "tuned"))
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-6, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3 moe"])
def test_a_model_with_an_adapter_gives_the_adapter_again(tmp_path: Path, family: str) -> None:
    save_pair(tmp_path, family)
    base, first, second = tmp_path / "base", tmp_path / "first", tmp_path / "second"
    mergeloom.extract_lora(tmp_path / "tuned", base, first, rank=4)
    result = mergeloom.extract_lora(f"{base}+{first}", base, second, rank=4)
    assert result.matrices
    for matrix in result.matrices:
        module = matrix.name.removesuffix(".weight")
        assert relative_error(product(second, module), product(first, module)) <= 1e-5
    assert set(result.saved) == set(json.loads((first / "mergeloom_extraction.json").read_text())["saved"])


def test_another_scale_of_the_adapter_is_another_model(tmp_path: Path) -> None:
    save_pair(tmp_path, "llama")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    mergeloom.extract_lora(tmp_path / "tuned", base, adapter, rank=4)
    mergeloom.extract_lora(f"{base}+{adapter}", base, out, rank=4)
    said: list[str] = []
    mergeloom.extract_lora(f"{base}+{adapter}", base, out, rank=4, say=said.append)
    assert said == [f"{out} is already complete, nothing to do"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(UsageError, match="finished extraction with another MODEL"):
        mergeloom.extract_lora(f"{base}+{adapter}", base, out, rank=4)


def test_a_base_with_an_adapter_is_refused(tmp_path: Path) -> None:
    save_pair(tmp_path, "llama")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    mergeloom.extract_lora(tmp_path / "tuned", base, adapter, rank=4)
    with pytest.raises(UsageError, match="BASE .* has an adapter"):
        mergeloom.extract_lora(tmp_path / "tuned", f"{base}+{adapter}", tmp_path / "out", rank=4)
