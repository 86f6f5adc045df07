"""Merges of models with adapters: their bytes are those of models whose adapted values were merged to float32 first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mergeloom
from mergeloom.engine.model.formats import registry
from mergeloom.engine.model.logical import Decode, LogicalTensor, Part
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.io.tensors.dtypes import F32
from mergeloom.methods.formats.adapters import Term, adapted, scale_name
from mergeloom.methods.kernel.access import ALIGNED, Access, BlockRows
from tests.support.methods.factors import LAYOUTS, experts
from tests.support.models import write_checkpoint
from tests.support.models.toy_format import CONFIG
from tests.support.outputs import read_model

ROWS, COLUMNS, RANK = 48, 40, 5
SCALE = 0.75
EXPERTS = 3
"""Experts that are stored as matrices, while the adapter was trained on a model that has a stack of them."""
TERMS: dict[str, tuple[str, Term]] = {
    "q_proj": ("plain", Term.LORA),
    "k_proj": ("transposed", Term.LORA),
    "v_proj": ("plain", Term.DORA_ROWS),
    "o_proj": ("transposed", Term.DORA_COLUMNS),
}
"""How the adapter of each module is stored, and what it changes."""
LENGTHS = {Term.DORA_ROWS: (BlockRows(1, COLUMNS), ROWS), Term.DORA_COLUMNS: (BlockRows(ROWS, 1), COLUMNS)}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"weight": 0.5}},
    "ties": {"base_model": 0, "parameters": {"weight": 0.5, "density": 0.5}},
    "slerp": {"base_model": 0, "parameters": {"t": 0.25}},
}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(seed: int) -> dict[str, Tensor]:
    """A base, and the parts of an adapter under names of their own."""
    found = {"model.norm.weight": random(seed, COLUMNS)}
    for number, (module, (layout, term)) in enumerate(TERMS.items()):
        name, key = f"model.layers.0.self_attn.{module}.weight", 10 * (seed + 7 * number)
        (_, left), (_, right) = LAYOUTS[layout]((ROWS, COLUMNS), RANK)
        found[name] = random(5 * number, ROWS, COLUMNS).to(torch.bfloat16)
        found[f"{name}.left"], found[f"{name}.right"] = random(key, *left), random(key + 1, *right)
        if term in LENGTHS:
            found[f"{name}.lengths"] = abs(random(key + 2, LENGTHS[term][1])) + 0.5
    (_, left), (_, right) = experts((EXPERTS, ROWS, COLUMNS), RANK)
    found["experts.left"], found["experts.right"] = random(seed + 500, *left), random(seed + 600, *right)
    for expert in range(EXPERTS):
        name = f"model.layers.0.mlp.experts.{expert}.weight"
        found[name] = random(700 + expert, ROWS, COLUMNS).to(torch.bfloat16)
    return found


def find(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
    """The adapted values of a model with an adapter."""
    for module, (layout, term) in TERMS.items():
        name = f"model.layers.0.self_attn.{module}.weight"
        if f"{name}.left" not in checkpoint.tensors:
            return
        (left, _), (right, _) = LAYOUTS[layout]((ROWS, COLUMNS), RANK)
        uses: list[tuple[str, Access]] = [("", ALIGNED), (".left", left), (".right", right)]
        uses += [(".lengths", LENGTHS[term][0])] if term in LENGTHS else []
        parts = tuple(Part(name + end, checkpoint.tensors[name + end], access) for end, access in uses)
        decode = Decode(adapted(None, 1, (term,)), ((scale_name(0), SCALE),))
        yield LogicalTensor(name, (ROWS, COLUMNS), F32, parts, decode)
    decode = Decode(adapted(None, 1, (Term.LORA,)), ((scale_name(0), SCALE),))
    for expert in range(EXPERTS):
        name = f"model.layers.0.mlp.experts.{expert}.weight"
        (left, _), (right, _) = experts((ROWS, COLUMNS), RANK, EXPERTS - 1, expert)
        stored = ((name, ALIGNED), ("experts.left", left), ("experts.right", right))
        parts = tuple(Part(part, checkpoint.tensors[part], access) for part, access in stored)
        yield LogicalTensor(name, (ROWS, COLUMNS), F32, parts, decode)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMATS, "toy", find)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [
        write_checkpoint(tmp_path / f"model{n}", tensors(n), config=CONFIG | {"num_hidden_layers": 1})
        for n in (1, 2, 3)
    ]


def decoded(model: Path, out: Path) -> Path:
    mergeloom.merge({"merge_method": "passthrough", "dtype": "float32", "models": [{"model": str(model)}]}, out)
    return out


def test_values_are_those_of_float64(tmp_path: Path, models: list[Path]) -> None:
    found, stored = read_model(decoded(models[0], tmp_path / "values")), tensors(1)
    for module, (layout, term) in TERMS.items():
        name = f"model.layers.0.self_attn.{module}.weight"
        base, left, right = (stored[name + end].double().numpy() for end in ("", ".left", ".right"))
        wanted = base + SCALE * (left @ right if layout == "plain" else left.T @ right.T)
        if term in LENGTHS:
            axis = 1 if term is Term.DORA_ROWS else 0
            lengths = np.expand_dims(stored[f"{name}.lengths"].double().numpy(), axis)
            wanted *= lengths / np.linalg.norm(wanted, axis=axis, keepdims=True)
        assert np.max(abs(found[name].double().numpy() - wanted)) <= 1e-6 * np.max(abs(wanted))
    delta = np.einsum(
        "o r e, e r i -> e o i",
        stored["experts.left"].double().numpy().reshape(ROWS, RANK, EXPERTS),
        stored["experts.right"].double().numpy().reshape(EXPERTS, RANK, COLUMNS),
    )
    for expert in range(EXPERTS):
        name = f"model.layers.0.mlp.experts.{expert}.weight"
        wanted = stored[name].double().numpy() + SCALE * delta[expert]
        assert np.max(abs(found[name].double().numpy() - wanted)) <= 1e-6 * np.max(abs(wanted))
    assert found.keys() == {name for name in stored if name.endswith("weight")}


def test_each_byte_of_a_base_and_its_adapter_is_read_once(tmp_path: Path, models: list[Path]) -> None:
    """The factors of all experts, which are stored between each other, are kept from one expert to the next."""
    recipe = {"merge_method": "passthrough", "dtype": "float32", "models": [{"model": str(models[0])}]}
    planned = plan(recipe, Options(max_ram=8 << 30, device="cpu"))
    result = mergeloom.merge(recipe, tmp_path / "out", max_ram=8 << 30)
    assert result.measured.bytes_read == planned.schedule.bytes_read
    assert planned.schedule.bytes_read == sum(tensor.nbytes for tensor in tensors(1).values())


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_equals_that_of_values_merged_beforehand(tmp_path: Path, models: list[Path], method: str) -> None:
    chosen = models[: 2 if method == "slerp" else 3]
    before = [decoded(model, tmp_path / f"values{number}") for number, model in enumerate(chosen)]
    outputs = []
    for number, inputs in enumerate((chosen, before)):
        recipe: dict[str, Any] = {"merge_method": method, "dtype": "float32", **METHODS[method]}
        recipe["models"] = [{"model": str(model)} for model in inputs]
        if "base_model" in recipe:
            recipe["base_model"] = str(inputs[0])
        mergeloom.merge(recipe, tmp_path / f"out{number}")
        outputs.append({name: x.numpy().tobytes() for name, x in read_model(tmp_path / f"out{number}").items()})
    assert outputs[0] == outputs[1]
