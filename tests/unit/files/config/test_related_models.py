"""Plans of models that are related, but whose config.json or tensors differ in a part."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.graph.checks.partial import PartialTensor
from mergeloom.engine.model.warnings import ModelWarningKind
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.plans import linear

CPU = Options(device="cpu", threads=1)


def test_the_text_model_that_a_vision_language_model_was_made_from_is_merged_by_modules(tmp_path: Path) -> None:
    text = tiny_llama()
    tower = {f"visual.blocks.{number}.attn.qkv.weight": (4, 4) for number in range(2)}
    tensors = tower | {"visual.merger.mlp.0.weight": (4, 4)} | text.tensors
    config = text.config | {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    config["vision_config"] = {"depth": 2, "model_type": "qwen2_5_vl"}
    whole = write_checkpoint(tmp_path / "whole", tensors, config=config, fill=None)
    part = write_checkpoint(tmp_path / "part", text.tensors, config=text.config | {"model_type": "qwen2"}, fill=None)
    both = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (whole, part)]
    modules = {"model": {"models": both}, "visual": {"models": both[:1]}}
    planned = plan({"merge_method": "linear", "base_model": str(whole), "modules": modules}, CPU)
    (warning,) = [found for found in planned.findings if found.kind is ModelWarningKind.CONFIG_DIFFERS]
    assert f"model_type is qwen2_5_vl in {whole} and qwen2 in {part}" in str(warning)
    assert planned.files.config is not None
    assert planned.files.config["model_type"] == "qwen2_5_vl"
    assert planned.files.config["vision_config"] == config["vision_config"]


def test_many_biases_are_not_compared_with_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_llama(layers=8)
    biases = {f"model.layers.{n}.self_attn.{p}_proj.bias": (32,) for n in range(8) for p in ("q", "o")}
    biases |= {f"model.layers.{n}.mlp.down_proj.bias": (32,) for n in range(8)}
    a = write_checkpoint(tmp_path / "a", plain.tensors, config=plain.config, fill=None)
    b = write_checkpoint(tmp_path / "b", plain.tensors | biases, config=plain.config, fill=None)
    compared = []
    monkeypatch.setattr(PartialTensor, "__eq__", lambda self, other: compared.append(other))
    config = plan(linear(a, b), CPU).files.config
    assert config is not None
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    assert compared == []
