"""gpt-oss in MXFP4: decoded like transformers does, and merged with its unquantized form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import mergeloom
from mergeloom.errors import CheckpointError
from tests.support.models import write_checkpoint
from tests.support.outputs import read_model

EXPERTS, HIDDEN, INNER = 3, 64, 32
CONFIG = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_local_experts": EXPERTS,
    "vocab_size": 8,
    "tie_word_embeddings": False,
}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}


def write_pair(directory: Path, seed: int) -> tuple[Path, Path]:
    """Write a model in MXFP4, and its twin that stores the values that transformers decodes, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def bytes_of(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    plain = {
        "model.embed_tokens.weight": torch.randn(8, HIDDEN, generator=generator),
        "model.norm.weight": torch.randn(HIDDEN, generator=generator),
        "lm_head.weight": torch.randn(8, HIDDEN, generator=generator),
    }
    stored, values = dict(plain), dict(plain)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for name, rows, columns in (("gate_up_proj", HIDDEN, 2 * INNER), ("down_proj", INNER, HIDDEN)):
            blocks = bytes_of(EXPERTS, columns, rows // 32, 16)
            scales = bytes_of(EXPERTS, columns, rows // 32, low=118, high=132)
            stored |= {f"{prefix}.{name}_blocks": blocks, f"{prefix}.{name}_scales": scales}
            found = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            assert found.shape == (EXPERTS, rows, columns)
            values[f"{prefix}.{name}"] = found.contiguous()
        stored[f"{prefix}.gate_up_proj_bias"] = values[f"{prefix}.gate_up_proj_bias"] = torch.randn(
            EXPERTS, 2 * INNER, generator=generator
        )
    quantized = write_checkpoint(directory / f"mxfp4-{seed}", stored, config=CONFIG | MXFP4)
    return quantized, write_checkpoint(directory / f"values-{seed}", values, config=CONFIG)


def linear(models: list[Path]) -> dict[str, object]:
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": entries, "dtype": "float32"}


def test_values_equal_those_of_transformers(tmp_path: Path) -> None:
    model, values = write_pair(tmp_path, 1)
    made = {"merge_method": "passthrough", "models": [{"model": str(model)}], "dtype": "float32"}
    mergeloom.merge(made, tmp_path / "out")
    found, expected = read_model(tmp_path / "out"), read_model(values)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("order", [(0, 0), (0, 1), (1, 0)])
def test_quantized_and_unquantized_models_merge(tmp_path: Path, order: tuple[int, int]) -> None:
    pairs = [write_pair(tmp_path, seed) for seed in (1, 2)]
    mergeloom.merge(linear([pair[place] for pair, place in zip(pairs, order, strict=True)]), tmp_path / "out")
    mergeloom.merge(linear([values for _, values in pairs]), tmp_path / "values")
    found, expected = read_model(tmp_path / "out"), read_model(tmp_path / "values")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_copy_keeps_blocks_and_scales(tmp_path: Path) -> None:
    model, _ = write_pair(tmp_path, 1)
    mergeloom.merge({"merge_method": "passthrough", "models": [{"model": str(model)}]}, tmp_path / "out")
    found, expected = read_model(tmp_path / "out"), read_model(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_blocks_and_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stored = {
        "model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(3, 64, 1, 16, dtype=torch.uint8),
        "model.layers.0.mlp.experts.down_proj_scales": torch.zeros(3, 64, 2, dtype=torch.uint8),
    }
    model = write_checkpoint(tmp_path / "a", stored, config=CONFIG | {"num_hidden_layers": 1} | MXFP4)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks of shape \[3, 64, 1, 16\] and .*do not fit together"):
        mergeloom.plan(linear([model, model]))
