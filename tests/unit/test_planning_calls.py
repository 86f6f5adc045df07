"""Planning takes a number of calls that is linear in the tensors, whether or not they share inputs.

Functions that are called are counted, since seconds differ from run to run. `benchmarks.scaling` measures the seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.graph.graph import MergeGraph
from mergeloom.engine.graph.layers.layer_rules import LayerRules
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.counting import count_calls
from tests.support.models import Model, write_checkpoint

EXPERTS = 8
"""Number of tensors in a layer."""
LINEAR = 1.15
"""Maximum of the calls for twice as many added tensors, in relation to twice the calls. Quadratic work takes twice."""

Write = Callable[[Path, int], Any]
"""Takes an empty directory and a size; writes models, and returns a recipe."""


def model(directory: Path, layers: int) -> str:
    """Write a checkpoint of true headers, with holes for data."""
    names = [f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight" for layer in range(layers) for n in range(EXPERTS)]
    return str(write_checkpoint(directory, dict.fromkeys(names, (64, 64)), fill=None, shard_bytes=1 << 20))


def weighted(*models: str) -> list[dict[str, Any]]:
    """Inputs of a linear merge."""
    return [{"model": each, "parameters": {"weight": 1}} for each in models]


def no_sharing(directory: Path, layers: int) -> Any:
    """A linear merge of two models: no input is used twice."""
    return {"merge_method": "linear", "models": weighted(*(model(directory / name, layers) for name in "ab"))}


def fp8(directory: Path, layers: int) -> Any:
    """A linear merge of two models in FP8, whose weights have scales."""
    section = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    config = {"model_type": "llama", "num_hidden_layers": layers, "quantization_config": section}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 64)}
    dtypes: dict[str, str] = {}
    for layer in range(layers):
        for expert in range(EXPERTS):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            shapes |= {name: (64, 64), f"{name}_scale_inv": (2, 2)}
            dtypes |= {name: "F8_E4M3", f"{name}_scale_inv": "F32"}
    pair = [write_checkpoint(directory / name, Model(shapes, config, dtypes), fill=None) for name in "ab"]
    return {"merge_method": "linear", "models": weighted(*map(str, pair))}


def fp8_to_bfloat16(directory: Path, layers: int) -> Any:
    """A linear merge of two models in FP8, which are decoded."""
    return {**fp8(directory, layers), "dtype": "bfloat16"}


def shared_neighbours(directory: Path, layers: int) -> Any:
    """A stack of merged neighbours: each layer of the output shares an input layer with the one before it."""
    only = weighted(model(directory / "a", layers + 1))[0]
    pairs = [[{**only, "layer_range": [first, first + 1]} for first in (n, n + 1)] for n in range(layers)]
    return {"merge_method": "linear", "slices": [{"sources": pair} for pair in pairs]}


def chain(directory: Path, layers: int, stages: int) -> Any:
    """A chain of stages, each of which uses the two before it."""
    inputs = [model(directory / name, layers) for name in "ab"]
    recipe = []
    for number in range(stages):
        named = {"name": f"stage{number}"} if number < stages - 1 else {}
        recipe.append({**named, "merge_method": "linear", "models": weighted(*inputs[-2:])})
        inputs.append(f"stage{number}")
    return recipe


def five_stages(directory: Path, layers: int) -> Any:
    """A chain of five stages of ever more tensors."""
    return chain(directory, layers, 5)


def more_stages(directory: Path, layers: int) -> Any:
    """A chain of ever more stages, which have one layer each."""
    return chain(directory, 1, layers)


CPU = Options(device="cpu", threads=2, max_ram=1 << 33)
GPU = Options(machine=Machine(ram=1 << 33, vram=1 << 33, cores=2))

CASES: dict[str, tuple[Write, Options, int, int]] = {
    "no sharing": (no_sharing, CPU, 32, 75),
    "fp8": (fp8, CPU, 32, 420),
    "fp8 to bfloat16": (fp8_to_bfloat16, CPU, 32, 330),
    "shared neighbours": (shared_neighbours, CPU, 16, 1_070),
    "shared neighbours on a GPU": (shared_neighbours, GPU, 16, 1_200),
    "five stages": (five_stages, CPU, 16, 1_600),
    "more stages": (more_stages, CPU, 8, 1_400),
}
"""What to plan, for which device, the smallest size in layers (or stages of one layer), and the most calls for one more
tensor: about 40% more than when it was written."""


def calls_by_size(name: str, directory: Path) -> list[int]:
    """The calls that planning takes at a size, twice that size and four times that size."""
    write, options, size, _ = CASES[name]
    counts = []
    for number in (size, 2 * size, 4 * size):
        own = directory / str(number)
        own.mkdir(parents=True)
        recipe = write(own, number)
        plan(recipe, options)  # imports, and whatever else happens once
        counts.append(count_calls(lambda recipe=recipe: plan(recipe, options)))
    return counts


def added(counts: list[int]) -> tuple[int, int]:
    """The calls for what is added to reach the second size, and the third."""
    return counts[1] - counts[0], counts[2] - counts[1]


@pytest.mark.parametrize("name", CASES)
def test_calls_are_linear_in_the_tensors(name: str, tmp_path: Path) -> None:
    _, _, size, most = CASES[name]
    first, second = added(calls_by_size(name, tmp_path))
    assert second <= LINEAR * 2 * first
    assert second / (2 * size * EXPERTS) <= most


@pytest.mark.parametrize("name", ["no sharing", "fp8", "five stages"])
def test_quadratic_work_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over all outputs for each output is noticed even where other work prevails."""
    add_output, add_layer = MergeGraph.add_output, LayerRules.add

    def slow_output(graph: MergeGraph, *args: Any) -> None:
        add_output(graph, *args)
        assert all(name for name in graph.outputs.names)

    def slow_layer(rules: LayerRules, *args: Any) -> None:
        add_layer(rules, *args)
        for _ in range(EXPERTS):
            assert all(name for name in rules._graph.outputs.names)

    monkeypatch.setattr(MergeGraph, "add_output", slow_output)
    monkeypatch.setattr(LayerRules, "add", slow_layer)
    first, second = added(calls_by_size(name, tmp_path))
    assert second > LINEAR * 2 * first
