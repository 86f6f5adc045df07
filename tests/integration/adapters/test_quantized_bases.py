"""Adapters of quantized bases: the values are those of the decoded base, and FP8 stays FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergeloom
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from mergeloom.report.explain import explain
from tests.support.adapters.files import PREFIX, product, write_lora
from tests.support.models import write_checkpoint
from tests.support.models.quantized import FORMATS, write_pair
from tests.support.outputs import config_of, read_model, same_tensors

UP = "model.layers.0.mlp.up_proj"


def write(tmp_path: Path, form: str, **more: Any) -> tuple[Path, Path, Path]:
    """A quantized base, its decoded twin, and an adapter of its MLP."""
    quantized, twin = write_pair(tmp_path, form, 1)
    shapes = {name: tuple(tensor.shape) for name, tensor in read_model(twin).items()}
    return quantized, twin, write_lora(tmp_path / "a", shapes, targets=("up_proj", "down_proj"), **more)


def merged(out: Path, reference: str, **more: Any) -> dict[str, Tensor]:
    mergeloom.merge({"merge_method": "passthrough", "models": [{"model": reference}]} | more, out)
    return read_model(out)


@pytest.mark.parametrize("form", FORMATS)
def test_the_bytes_are_those_of_the_decoded_base(tmp_path: Path, form: str) -> None:
    quantized, twin, adapter = write(tmp_path, form)
    found = merged(tmp_path / "out", f"{quantized}+{adapter}", out_dtype="float32")
    expected = merged(tmp_path / "plain", f"{twin}+{adapter}", out_dtype="float32")
    assert same_tensors(found, expected)
    reference = read_model(twin)[f"{UP}.weight"].double() + product(adapter, UP)
    assert (found[f"{UP}.weight"].double() - reference).abs().max() <= 1e-6 * reference.abs().max()


def test_fp8_blocks_that_an_adapter_changes_are_encoded_and_others_copied(tmp_path: Path) -> None:
    quantized, twin, adapter = write(tmp_path, "fp8 blocks")
    found, own = merged(tmp_path / "out", f"{quantized}+{adapter}"), read_model(quantized)
    assert found.keys() == own.keys()
    kept = "model.layers.0.self_attn.o_proj.weight"
    for name in (kept, f"{kept}_scale_inv"):
        assert torch.equal(found[name].view(torch.uint8), own[name].view(torch.uint8))
    codes, scales = found[f"{UP}.weight"].double(), found[f"{UP}.weight_scale_inv"].double()
    rows, columns = codes.shape
    expanded = scales.repeat_interleave(32, 0)[:rows].repeat_interleave(48, 1)[:, :columns]
    exact = read_model(twin)[f"{UP}.weight"].double() + product(adapter, UP)
    # half a step of E4M3 is 1/16 of a number's power of 2, or of the smallest normal one's
    assert ((codes * expanded - exact).abs() <= expanded * torch.maximum(codes.abs(), torch.tensor(2.0**-6)) / 15).all()
    assert "quantization_config" in config_of(tmp_path / "out")


def test_a_format_that_is_not_written_becomes_bfloat16(tmp_path: Path) -> None:
    quantized, twin, adapter = write(tmp_path, "int4")
    found = merged(tmp_path / "out", f"{quantized}+{adapter}", out_dtype="bfloat16")
    exact = merged(tmp_path / "exact", f"{twin}+{adapter}", out_dtype="float32")
    assert torch.equal(found[f"{UP}.weight"], exact[f"{UP}.weight"].bfloat16())


def write_int4(directory: Path, *modules: str) -> Path:
    """Write a base of these modules in INT4."""
    quantize, section = FORMATS["int4"]
    generator = torch.Generator().manual_seed(1)
    parts = {module: quantize(torch.randn(32, 32, generator=generator)).stored for module in modules}
    tensors = {f"{module}.{end}": part for module, stored in parts.items() for end, part in stored.items()}
    config = {"model_type": "llama", "num_hidden_layers": 1, "torch_dtype": "bfloat16", "quantization_config": section}
    return write_checkpoint(directory, tensors, config=config)


SPLIT: dict[str, tuple[tuple[str, ...], str, str]] = {
    "queries and values": (("self_attn.q_proj", "self_attn.v_proj"), "self_attn.k_proj", "k_proj"),
    "one of two matrices": (("mlp.up_proj",), "mlp.gate_proj", "gate_proj"),
    "one of two experts": (("mlp.experts.0.up_proj",), "mlp.experts.1.up_proj", "experts"),
}
"""Modules that an adapter changes, one that loaders have in the same tensor, and the filter that matches it."""


@pytest.mark.parametrize("case", SPLIT)
def test_weights_that_loaders_fuse_with_decoded_ones_are_reported(tmp_path: Path, case: str) -> None:
    changed, other, part = SPLIT[case]
    names = [f"model.layers.0.{module}" for module in (*changed, other)]
    base = write_int4(tmp_path / "base", *names)
    adapter = write_lora(tmp_path / "a", dict.fromkeys((f"{name}.weight" for name in names[:-1]), (32, 32)))
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    (warning,) = (each for each in plan(recipe).warnings if "stays quantized" in each)
    assert warning.startswith(f"{names[0]} is written in bfloat16 and {names[-1]} stays quantized ({len(changed)} such")
    rule = {"filter": part, "value": "bfloat16"}
    assert f"with {{filter: {part}, value: bfloat16}} first in out_dtype" in warning
    assert not [each for each in plan(recipe | {"out_dtype": [rule]}).warnings if "stays quantized" in each]


def test_rows_of_a_quantized_embedding_cannot_be_replaced(tmp_path: Path) -> None:
    quantized, twin, _ = write(tmp_path, "int4")
    rows = torch.zeros(1, read_model(twin)[f"{UP}.weight"].shape[1])
    more = {f"{PREFIX}{UP}.token_adapter.trainable_tokens_delta": rows}
    adapter = write_lora(tmp_path / "b", {}, more=more, trainable_token_indices=[0])
    with pytest.raises(CheckpointError, match="replaces rows of .*, which is stored as INT4: this is not supported"):
        merged(tmp_path / "out", f"{quantized}+{adapter}")


def test_an_explanation_has_the_values_of_the_base_with_and_without_its_adapter(tmp_path: Path) -> None:
    """Not the codes and the scales of the base, which are parts of both values."""
    quantized, _, adapter = write(tmp_path, "int4")
    entries = [{"model": f"{quantized}+{adapter}", "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(quantized), "models": entries}
    sources = explain(plan(recipe), f"{UP}.weight").sources
    assert {source.name for source in sources} == {f"{UP}.weight"}
    assert {source.format: source.base for source in sources} == {"INT4": True, "INT4 + LoRA": False}


def test_layers_that_were_never_quantized_are_not_reported_as_decoded(tmp_path: Path) -> None:
    """Their outputs have the same shapes, dtypes and adapters as those that are decoded and encoded again."""
    quantize, section = FORMATS["fp8 blocks"]
    generator, tensors = torch.Generator().manual_seed(1), {}
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
    for name, plain in zip(names, (False, True), strict=True):
        weight = torch.randn(32, 48, generator=generator)
        stored = {"weight": weight.to(torch.bfloat16)} if plain else quantize(weight).stored
        tensors |= {f"{name}.{end}": part for end, part in stored.items()}
    section = section | {"modules_to_not_convert": [names[1]]}
    config = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "bfloat16", "quantization_config": section}
    base = write_checkpoint(tmp_path / "base", tensors, config=config)
    shapes = dict.fromkeys((f"{name}.weight" for name in names), (32, 48))
    entries = [
        {"model": f"{base}+{write_lora(tmp_path / str(seed), shapes, seed=seed)}", "parameters": {"weight": 0.5}}
        for seed in (1, 2)
    ]
    planned = plan({"merge_method": "linear", "models": entries, "out_dtype": "same"})
    assert not planned.warnings
    planned = plan(
        {"merge_method": "linear", "models": entries, "out_dtype": [{"filter": "up_proj", "value": "bfloat16"}]}
    )
    assert not [each for each in planned.warnings if "layers.1" in each]
    planned = plan({"merge_method": "linear", "models": entries})
    assert not planned.warnings
