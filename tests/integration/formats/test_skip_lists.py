"""Modules that a merge decodes are in the output's skip list, as transformers, compressed-tensors and vLLM match it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_name
from transformers.quantizers.quantizers_utils import should_convert_module

import mergeloom
from tests.support.models import quantized, write_checkpoint
from tests.support.outputs import read_model

LAYERS, EXPERTS = 12, 3
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MODULES = [
    *(f"model.layers.{layer}.self_attn.o_proj" for layer in range(LAYERS)),
    *(f"model.layers.{layer}.mlp.experts.{expert}.{each}" for layer in range(LAYERS) for expert in range(EXPERTS)
      for each in PROJECTIONS),
    *(f"model.layers.{layer}.mlp.shared_experts.{each}" for layer in range(LAYERS) for each in PROJECTIONS),
]  # fmt: skip
FUSED = [f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS)]
"""The modules that loaders have for the experts of a layer."""
FILTERS = {
    "all experts": ("mlp.experts", lambda module: ".mlp.experts" in module),
    "one layer": ("layers.1.", lambda module: ".layers.1." in module),
    "one expert": ("layers.1.mlp.experts.2.", lambda module: ".layers.1.mlp.experts.2." in module),
    "attention": ("self_attn", lambda module: "self_attn" in module),
}
"""By name, the filter of tensors that are decoded, and whether a module is among them."""


def by_transformers(module: str, entries: Sequence[str]) -> bool:
    return not should_convert_module(module, list(entries))


def by_vllm(module: str, entries: Sequence[str]) -> bool:
    """vLLM's rule for FP8: the complete name, or an entry about experts that contains the name of their module."""
    if "experts" in module and "shared" not in module:
        return any(module in entry for entry in entries if "experts" in entry)
    return module in entries


def by_compressed_tensors(module: str, entries: Sequence[str]) -> bool:
    return any(match_name(module, entry) for entry in entries)


def by_modelopt(module: str, entries: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(module, entry) for entry in entries)


Rule = Callable[[str, Sequence[str]], bool]
FORMATS: list[tuple[str, str, list[tuple[Rule, bool]]]] = [
    ("fp8 blocks", "modules_to_not_convert", [(by_transformers, False), (by_vllm, True)]),
    ("fp8 rows", "modules_to_not_convert", [(by_transformers, False)]),
    ("int4", "ignore", [(by_compressed_tensors, False)]),
    ("nvfp4 of modelopt", "ignore", [(by_modelopt, False)]),
]
"""The format, the list, and the rules; the second entry of a rule is whether it is only asked about fused experts."""


def write(directory: Path, form: str, seed: int) -> Path:
    quantize, section = quantized.FORMATS[form]
    generator = torch.Generator().manual_seed(seed)
    stored = {
        f"{module}.{ending}": tensor
        for module in MODULES
        for ending, tensor in quantize(torch.randn(32, 48, generator=generator)).stored.items()
    }
    stored |= {f"model.layers.{layer}.mlp.gate.weight": torch.zeros(3, 48) for layer in range(LAYERS)}
    config = {"model_type": "x", "num_hidden_layers": LAYERS, "quantization_config": section}
    return write_checkpoint(directory / f"model{seed}", stored, config=config)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("form", "key", "rules"), FORMATS, ids=[form for form, _, _ in FORMATS])
def test_decoded_modules_are_listed_and_no_others(
    form: str, key: str, rules: list[tuple[Rule, bool]], name: str, tmp_path: Path
) -> None:
    part, is_decoded = FILTERS[name]
    models = [write(tmp_path, form, seed) for seed in (1, 2)]
    # what has a weight of 0 in the second model is copied from the first
    weight: list[list[dict[str, Any]]] = [
        [{"filter": part, "value": each}, {"value": other}] for each, other in ((0.5, 1.0), (0.5, 0.0))
    ]
    made = {
        "merge_method": "linear",
        "models": [
            {"model": str(model), "parameters": {"weight": each}} for model, each in zip(models, weight, strict=True)
        ],
        "out_dtype": [{"filter": part, "value": "bfloat16"}, {"value": "same"}],
    }
    mergeloom.merge(made, tmp_path / "out", device="cpu")
    found = read_model(tmp_path / "out")
    scaled = {name.rpartition(".")[0] for name in found if name.endswith(("weight_scale", "weight_scale_inv"))}
    assert scaled == {module for module in MODULES if not is_decoded(module)}
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    entries = section[key]
    complete = [each for each in FUSED if all(is_decoded(f"{each}.{expert}.up_proj") for expert in range(EXPERTS))]
    for rule, only_fused in rules:
        for module in MODULES if not only_fused else [each for each in MODULES if ".experts." not in each]:
            assert rule(module, entries) is is_decoded(module), module
        if name != "one expert":  # loaders can't mix experts
            assert [module for module in FUSED if rule(module, entries)] == complete
    assert len(entries) <= 1 + LAYERS  # lm_head, and at most one for each layer
