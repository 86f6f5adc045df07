"""What adapter_config.json says about an adapter."""

from __future__ import annotations

import re
from typing import Any

import pytest
from peft import LoraConfig

from mergeloom.engine.model.adapters.config import AdapterConfig
from mergeloom.errors import CheckpointError


@pytest.mark.parametrize("version", ["0.17.0", None])
def test_fields_that_peft_ignores_too(version: str | None) -> None:
    """Trainers add fields of their own, and all kinds of adapters of these versions are known."""
    own = {"quantization_config": {"bits": 4}, "use_unsloth": True, "runtime_config": {"ephemeral_gpu_offload": False}}
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "peft_version": version}
    assert AdapterConfig("a", plain | own).scale("q_proj") == 2
    with pytest.raises(CheckpointError, match="has use_unsloth: True in adapter_config.json, whose meaning is unknown"):
        AdapterConfig("a", plain | {"use_unsloth": True, "peft_version": "0.30.0"})


def test_all_initializations_of_peft_are_known() -> None:
    """Those that change the base are refused with a reason of their own."""
    fields = LoraConfig.__dataclass_fields__
    names = re.findall(r"""["'](\w+)""", str(fields["init_lora_weights"].type))
    assert {"gaussian", "pissa", "mica"} <= set(names)
    for name in names:
        try:
            AdapterConfig("a", {"peft_type": "LORA", "init_lora_weights": name, "peft_version": "0.21.2"})
        except CheckpointError as error:
            assert "also changes the base" in str(error)


def test_each_pattern_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some adapters have a rank for each module, and Python keeps 512 expressions."""
    modules = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(200) for part in "qkv"]
    ranks = {module: rank for rank, module in enumerate(modules, 1)}
    compiled = 0

    def count(*arguments: Any) -> re.Pattern[str]:
        nonlocal compiled
        compiled += 1
        return compile_pattern(*arguments)

    compile_pattern = re._compiler.compile  # type: ignore[attr-defined]
    monkeypatch.setattr(re._compiler, "compile", count)  # type: ignore[attr-defined]
    config = AdapterConfig("a", {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks})
    assert [config.rank(module) for module in modules] == list(ranks.values())
    assert [config.scale(module) for module in modules] == [1 / rank for rank in ranks.values()]
    assert compiled <= 2 * len(ranks)
