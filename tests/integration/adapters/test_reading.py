"""What a merge of models with adapters reads, how much memory it needs, and how it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import mergeloom
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, UsageError
from tests.support import models
from tests.support.adapters.files import PREFIX, read_adapter, write_lora
from tests.support.merges.resumable import OPTIONS, SHAPES, interrupt, run
from tests.support.outputs import digests

LLAMA = models.tiny_llama(layers=2)


def size(directory: Path) -> int:
    """The bytes of all tensors of a model or an adapter."""
    return sum(tensor.nbytes for file in directory.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("base_model", ["plain", "adapted"])
@pytest.mark.parametrize("method", ["model_stock", "sce", "ties", "linear"])
def test_six_adapters_read_their_base_once(tmp_path: Path, method: str, base_model: str) -> None:
    base = models.write_checkpoint(tmp_path / "base", LLAMA, fill=0)
    adapters = [write_lora(tmp_path / f"a{seed}", LLAMA.tensors, seed=seed) for seed in range(6)]
    references = [f"{base}+{adapter}" for adapter in adapters]
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": each} for each in references]}
    if method != "linear":
        recipe["base_model"] = str(base) if base_model == "plain" else references.pop()
    if method in ("ties", "linear"):
        recipe["parameters"] = {"weight": 0.5}
    result = mergeloom.merge(recipe, tmp_path / "out", max_ram=8 << 30)
    planned = result.plan.to_dict()
    total = size(base) + sum(map(size, adapters))
    assert planned["bytes_read"] == total == result.measured.bytes_read
    assert planned["bytes_reread"] == 0
    assert planned["inputs"]["bytes"] == total
    read = {entry["model"]: entry["read"] for entry in planned["bytes_by_model"]}
    assert read == {str(each): size(each) for each in (base, *adapters)}


def test_what_an_adapter_does_not_change_is_copied(tmp_path: Path) -> None:
    base = models.write_checkpoint(tmp_path / "base", LLAMA, fill=0)
    adapter = write_lora(tmp_path / "a", LLAMA.tensors, targets=("q_proj",))
    planned = mergeloom.plan({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]})
    assert planned.bytes_computed == 2 * 32 * 32 * 2  # q_proj of two layers in bfloat16
    assert planned.bytes_read == size(base) + size(adapter)


@pytest.fixture
def resumable(tmp_path: Path) -> dict[str, Any]:
    """A recipe of a base with two adapters that takes several commits."""
    base = models.write_checkpoint(tmp_path / "base", SHAPES, dtype="F32", fill=0)
    adapters = [write_lora(tmp_path / name, SHAPES, targets=("w",), seed=seed) for seed, name in enumerate("ab", 1)]
    named = [{"model": f"{base}+{a}", "parameters": {"weight": 0.5, "density": 0.5}} for a in adapters]
    return {"merge_method": "dare_ties", "base_model": str(base), "models": named}


@pytest.mark.parametrize("commits", [1, 3])
def test_a_resumed_merge_has_the_same_bytes(tmp_path: Path, resumable: dict[str, Any], commits: int) -> None:
    run(resumable, tmp_path / "whole")
    interrupt(resumable, tmp_path / "out", commits)
    run(resumable, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_an_adapter_that_has_changed_is_refused(tmp_path: Path, resumable: dict[str, Any]) -> None:
    interrupt(resumable, tmp_path / "out")
    tensors = read_adapter(tmp_path / "b")
    name = f"{PREFIX}model.layers.3.w.lora_B.weight"
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=rf"the source file adapter_model\.safetensors of {tmp_path}/b"):
        run(resumable, tmp_path / "out")


def test_an_adapter_with_another_scale_is_another_merge(tmp_path: Path, resumable: dict[str, Any]) -> None:
    interrupt(resumable, tmp_path / "out")
    write_lora(tmp_path / "b", SHAPES, targets=("w",), seed=2, lora_alpha=1)
    with pytest.raises(UsageError, match="differs from it"):
        run(resumable, tmp_path / "out")


def test_an_adapter_that_changes_after_planning_is_refused(tmp_path: Path, resumable: dict[str, Any]) -> None:
    planned = plan(resumable, OPTIONS)
    write_lora(tmp_path / "a", SHAPES, targets=("w",), seed=9)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors was changed since the merge was planned"):
        run(planned, tmp_path / "out")


def test_the_manifest_verifies_base_and_adapters(tmp_path: Path, resumable: dict[str, Any]) -> None:
    run(resumable, tmp_path / "out")
    verdict = mergeloom.verify(tmp_path / "out", sources=True)
    assert (verdict.damaged, verdict.changed_sources, verdict.missing_sources) == ((), (), ())
    write_lora(tmp_path / "a", SHAPES, targets=("w",), seed=9)
    (changed,) = mergeloom.verify(tmp_path / "out", sources=True).changed_sources
    assert changed.endswith("a/adapter_model.safetensors")


def test_the_smallest_budget_gives_the_same_bytes(tmp_path: Path, resumable: dict[str, Any]) -> None:
    planned = mergeloom.plan(resumable, max_ram=8 << 30)
    minimum = planned.to_dict()["minimum_ram"]
    mergeloom.merge(resumable, tmp_path / "small", max_ram=minimum + (8 << 20))
    mergeloom.merge(resumable, tmp_path / "large", max_ram=8 << 30)
    assert digests(tmp_path / "small", "*.safetensors") == digests(tmp_path / "large", "*.safetensors")
