"""Models of different architectures: the error names them, and not only the first tensor that differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.plans import without_location

LLAMA, WIDE = tiny_llama(layers=2), tiny_llama(layers=2, hidden=64)


def refused(*models: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan({"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1}})
    return without_location(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "llama_text", None, ["qwen2"]])
def test_models_that_may_be_of_one_architecture(model_type: object, tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", LLAMA)
    b = write_checkpoint(tmp_path / "b", WIDE.tensors, config=WIDE.config | {"model_type": model_type})
    assert refused(a, b).startswith("tensor model.embed_tokens.weight has shape [64, 32] in ")


def test_models_of_different_architectures(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", LLAMA)
    b = write_checkpoint(tmp_path / "b", WIDE.tensors, config=WIDE.config | {"model_type": "qwen2"})
    assert refused(a, b) == (
        f"{a} and {b} are of different architectures, by their model_type: llama and qwen2. Merge models of one "
        "architecture (the first different tensor is model.embed_tokens.weight)"
    )
