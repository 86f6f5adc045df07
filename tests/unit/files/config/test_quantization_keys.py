"""Descriptions of quantized tensors are removed wherever they are, if the output has no quantized tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.model.warnings import ModelWarningKind
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.plans import linear

CPU = Options(device="cpu", threads=1)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MLX = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("extra", "kept", "key"),
    [
        ({"llm_config": {"hidden_act": "silu", "quantization_config": FP8}}, {"hidden_act": "silu"}, "llm_config"),
        ({"language_config": {"n": 1, "quantization_config": FP8}}, {"n": 1}, "language_config"),
        (
            {"thinker_config": {"text_config": {"compression_config": FP8, "n": 1}}},
            {"text_config": {"n": 1}},
            "thinker_config",
        ),
        ({"quantization": MLX, "quantization_config": MLX}, None, "quantization"),
    ],
)
def test_a_description_at_any_depth_is_removed(
    extra: dict[str, Any], kept: dict[str, Any] | None, key: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    paths = [write_checkpoint(tmp_path / n, model.tensors, config=model.config | extra, fill=None) for n in "ab"]
    planned = plan(linear(*paths), CPU)
    assert planned.files.config is not None
    assert planned.files.config.get(key) == kept
    assert "quantization_config" not in planned.files.config
    (warning,) = [found for found in planned.findings if found.kind is ModelWarningKind.QUANTIZATION]
    assert "of the output is quantized" in str(warning)
