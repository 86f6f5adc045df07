"""Modules that config.json lists as not quantized are those that transformers and compressed-tensors match."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import pytest
from compressed_tensors.utils.match import match_name
from transformers.quantizers.quantizers_utils import should_convert_module

from mergeloom.engine.model.formats.skip_lists import skip_lists

MODULES = [
    *("lm_head", "model.embed_tokens", "model.lm_head", "visual.merger", "model.visual.merger.0"),
    *(f"model.layers.{layer}.{rest}" for layer in (1, 10, 11, 61) for rest in (
        "mlp.gate", "mlp.gate_proj", "mlp.shared_expert_gate", "mlp.experts", "mlp.experts.3.up_proj", "eh_proj",
        "self_attn.q_proj", "block_sparse_moe.gate", "block_sparse_moe.e_score_correction_bias", "mlp.router",
    )),
]  # fmt: skip
LISTS = [
    ["gate", "e_score_correction_bias", "lm_head"],
    ["lm_head", "model.layers.1"],
    ["model.layers.10.mlp.gate", "model.layers.11.mlp.gate", "model.layers.1.mlp.experts"],
    ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"],
    ["merger", "q_proj|eh_proj", "visual"],
    ["(unbalanced", "eh_proj"],
    ["experts.3.up_proj", ".*shared_expert"],
]
IGNORED = [
    ["lm_head", "re:.*self_attn.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    ["model.layers.1", "re:visual", "gate"],
    ["re:model.layers.1.*", "model.layers.61.eh_proj"],
]
EXCLUDED = [["lm_head", "model.layers.1*", "*router*"], ["model.layers.61.*", "gate"]]


def matched(section: dict[str, Any]) -> list[str]:
    (found,) = skip_lists({"quantization_config": section})
    return [module for module in MODULES if found.entry_of(module) is not None]


def by_transformers(module: str, entry: str) -> bool:
    """Whether an entry keeps a module as it is; one that is not a valid pattern can't be asked about."""
    return not should_convert_module(module, [entry]) if "(unb" not in entry else module.endswith(entry)


@pytest.mark.parametrize(
    ("key", "method", "entries", "rule"),
    [
        *(("modules_to_not_convert", "fp8", entries, by_transformers) for entries in LISTS),
        *(("ignored_layers", "fp8", entries, by_transformers) for entries in LISTS[:2]),
        *(("ignore", "compressed-tensors", entries, match_name) for entries in IGNORED),
        *(("exclude_modules", "modelopt", entries, fnmatch.fnmatchcase) for entries in EXCLUDED),
    ],
)
def test_modules_are_matched_like_by_the_loader(
    key: str, method: str, entries: list[str], rule: Callable[[str, str], bool]
) -> None:
    wanted = [module for module in MODULES if any(rule(module, entry) for entry in entries)]
    assert 0 < len(wanted) < len(MODULES)
    assert matched({"quant_method": method, key: entries}) == wanted


@pytest.mark.parametrize("section", [{}, {"modules_to_not_convert": None}, {"ignore": []}, {"ignore": [3]}])
def test_without_entries_no_module_is_matched(section: dict[str, Any]) -> None:
    found = skip_lists({"quantization_config": {"quant_method": "fp8"} | section})
    assert all(each.entry_of("lm_head") is None for each in found)
    assert skip_lists(None) == []


def test_the_entry_and_its_key_are_named() -> None:
    """Each list counts: loaders differ in the one that they read."""
    section = {"quant_method": "fp8", "ignored_layers": ["x", "gate"], "modules_to_not_convert": ["lm_head"]}
    found = skip_lists({"text_config": {"quantization_config": section}})
    key = "text_config.quantization_config"
    assert [(each.key, each.entry_of("a.gate")) for each in found] == [
        (f"{key}.modules_to_not_convert", None),
        (f"{key}.ignored_layers", "gate"),
    ]
