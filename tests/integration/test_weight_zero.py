"""A model with a weight of 0 is not read and changes no byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.outputs import read_model, same_bits, same_tensors

OPTIONS = Options(device="cpu", threads=2)
METHODS = ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs_ties", "multislerp"]
BASED = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs_ties"}


def recipe(method: str, base: Path, weights: dict[Path, Any]) -> dict[str, Any]:
    models = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in weights.items()]
    made: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method in BASED:
        made["base_model"] = str(base)
        if method != "task_arithmetic":
            made["parameters"] = {"density": 0.6}
    return made


def damaged(model: Path, directory: Path) -> Path:
    """A copy of a model whose floats are all NaN."""
    copy = Path(shutil.copytree(model, directory))
    for file in copy.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    return copy


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_weight_0_is_not_read_and_changes_no_byte(
    method: str, llamas: dict[str, Path], tmp_path: Path
) -> None:
    base, a, b = (llamas[name] for name in ("base", "a", "b"))
    unread = damaged(llamas["c"], tmp_path / "c")
    merge(recipe(method, base, {a: 0.4, b: 0.6}), tmp_path / "without", OPTIONS)
    result = merge(recipe(method, base, {a: 0.4, b: 0.6, unread: 0}), tmp_path / "with", OPTIONS)
    assert same_tensors(read_model(tmp_path / "with"), read_model(tmp_path / "without"))
    numbers = {model.reference.text: model.number for model in result.plan.built.models}
    assert numbers[str(unread)] not in result.plan.built.graph.read_models
    (unused,) = (unused for unused in result.plan.built.unused if unused.model == str(unread))
    assert unused.reason == "it has no effect on the output, as with a weight of 0"
    assert set(unused.tensors) == set(read_model(tmp_path / "with"))


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_the_masks_of_other_models_do_not_move(method: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    """A weight of 0 in one layer leaves the masks of the model after it as they are in that layer."""
    base, a, b = (llamas[name] for name in ("base", "a", "b"))
    tensor = "model.layers.1.mlp.up_proj.weight"
    alone = recipe(method, base, {a: 0, b: 1.0})
    both = recipe(method, base, {a: [{"filter": "layers.1.", "value": 0}, {"value": 0.5}], b: 1.0})
    for name, content in (("alone", alone), ("both", both)):
        merge(content, tmp_path / name, OPTIONS)
    first, second = (read_model(tmp_path / name) for name in ("alone", "both"))
    assert same_bits(first[tensor], second[tensor])
    assert not same_bits(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])


def test_a_tensor_that_only_the_base_is_needed_for_is_copied(llamas: dict[str, Path]) -> None:
    """All weights are 0: the output is the base, whose bytes are copied without arithmetic."""
    planned = plan(recipe("ties", llamas["base"], {llamas["a"]: 0, llamas["b"]: 0}), OPTIONS)
    assert planned.bytes_read + planned.bytes_shared <= planned.layout.nbytes
    assert {planned.built.graph.operation(node).kernel for node in planned.built.graph} == {None}


def test_nan_times_0_does_not_reach_the_output(llamas: dict[str, Path], tmp_path: Path) -> None:
    unread = damaged(llamas["c"], tmp_path / "c")
    content = recipe("linear", llamas["base"], {llamas["a"]: 1.0, unread: 0}) | {"allow_nonfinite": True}
    merge(content, tmp_path / "out", OPTIONS)
    for tensor in read_model(tmp_path / "out").values():
        assert tensor.isfinite().all()
