"""Layers whose tensors are like those of earlier layers are added at once, with the graph of adding each tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mergeloom.engine.graph.graph import MergeGraph
from mergeloom.engine.graph.layers.layer_rules import LayerRules
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from tests.support.models import write_checkpoint

LAYERS = 6
EXPERTS = {f"mlp.experts.{n}.{name}.weight": (8, 4) for n in range(3) for name in ("up", "down")}
DENSE = {"attn.q_proj.weight": (4, 4), "norm.weight": (4,)}
TENSORS = EXPERTS | DENSE


def shapes(layers: int = LAYERS, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model."""
    rests = TENSORS | more
    return {f"model.layers.{layer}.{rest}": shape for layer in range(layers) for rest, shape in rests.items()}


def write(directory: Path, tensors: dict[str, tuple[int, ...]], shard_bytes: int | None = None, **more: Any) -> str:
    """Write a model."""
    return str(write_checkpoint(directory, tensors, fill=None, shard_bytes=shard_bytes, **more))


def merged(method: str, *models: str, **parameters: Any) -> dict[str, Any]:
    """A recipe; the first model is the base of a method that needs one."""
    base = {} if method in ("linear", "passthrough") else {"base_model": models[0]}
    own = {"weight": 0.5} | parameters if method != "passthrough" else parameters
    inputs = [{"model": model, "parameters": own} for model in models[len(base) :]]
    return {"merge_method": method, "models": inputs, **base}


def pair(directory: Path) -> Any:
    """Two models of equal tensors."""
    return merged("linear", *(write(directory / name, shapes()) for name in "ab"))


def other_shards(directory: Path) -> Any:
    """Shards divide the layers of one model elsewhere, so its tensors have another order."""
    return merged("linear", write(directory / "a", shapes(), 100), write(directory / "b", shapes(), 300))


def random_masks(directory: Path) -> Any:
    """Random keys differ between tensors."""
    return merged("dare_ties", *(write(directory / name, shapes()) for name in "abc"), density=0.5)


def unused_model(directory: Path) -> Any:
    """A model of weight 0 is not read."""
    models = [write(directory / name, shapes()) for name in "abc"]
    recipe = merged("linear", *models)
    recipe["models"][1]["parameters"] = {"weight": 0.0}
    return recipe


def buffers(directory: Path) -> Any:
    """Each layer has a buffer, which is compared and not merged."""
    more = {"attn.rotary_emb.inv_freq": (4,)}
    return merged("linear", *(write(directory / name, shapes(**more)) for name in "ab"))


def other_layers(directory: Path) -> Any:
    """Every second layer has tensors of other shapes and dtypes."""
    tensors = {name: (16, 4) if int(name.split(".")[2]) % 2 and "up" in name else (8, 4) for name in shapes()}
    dtypes = {name: "F32" if int(name.split(".")[2]) % 3 == 2 else "BF16" for name in tensors}
    return merged("linear", *(write(directory / name, tensors, dtype=dtypes) for name in "ab"))


def stack(directory: Path) -> Any:
    """Overlapping windows of one model, in which layers are used twice and renamed."""
    model = write(directory / "a", shapes())
    windows = [{"sources": [{"model": model, "layer_range": [n, n + 3]}]} for n in range(LAYERS - 2)]
    return {"merge_method": "passthrough", "slices": windows}


def neighbours(directory: Path) -> Any:
    """Each layer is merged with the next one of the same model."""
    model = write(directory / "a", shapes())
    ranges = [[n, LAYERS - 1 + n] for n in range(2)]
    sources = [{"model": model, "layer_range": each, "parameters": {"weight": 1}} for each in ranges]
    return {"merge_method": "linear", "slices": [{"sources": sources}]}


def gradient(directory: Path) -> Any:
    """A parameter has another value in each layer."""
    recipe = merged("slerp", *(write(directory / name, shapes()) for name in "ab"))
    del recipe["models"][0]["parameters"]
    return recipe | {"parameters": {"t": [0.2, 0.8]}}


def stages(directory: Path) -> Any:
    """The layers of a stage's output are added likewise."""
    models = [write(directory / name, shapes()) for name in "abc"]
    return [{"name": "s", **merged("linear", *models[:2])}, merged("ties", models[2], "s", models[0], density=0.5)]


def columns(graph: MergeGraph) -> dict[str, Any]:
    """Everything that a graph consists of."""
    reads = graph.reads
    operations = map(graph.operation, graph)
    return {
        "reads": list(zip(reads, graph.read_models, graph.read_names, reads.first_users, reads.used, strict=True)),
        "nodes": list(zip(graph.node_sources, graph.node_dtype, graph.node_shape, graph.node_key, strict=True)),
        "operations": [(each.kind, each.method, each.parameters, each.base, each.positions) for each in operations],
        "classes": list(graph.node_class),
        "class nodes": graph.class_nodes,
        "outputs": list(graph.outputs),
        "shared": graph.shares_reads,
    }


REPEATED = {pair: 5, other_shards: 5, random_masks: 5, other_layers: 10, buffers: 10, stages: 10, stack: 2}
"""How often consecutive tensors of a layer are added at once; never in other recipes."""
RECIPES: list[Callable[[Path], Any]] = [*REPEATED, unused_model, neighbours, gradient]


@pytest.mark.parametrize("write", RECIPES, ids=lambda write: write.__name__)
def test_the_graph_is_that_of_adding_each_tensor(write: Callable[[Path], Any], tmp_path: Path) -> None:
    recipe = write(tmp_path)
    repeat, repeated = LayerRules._repeat, []

    def counted(*args: Any) -> bool:
        repeated.append(repeat(*args))
        return repeated[-1]

    def planned() -> Plan:
        return plan(recipe, Options(device="cpu", threads=1, max_ram=1 << 33, seed=3))

    with patch.object(LayerRules, "_repeat", counted):
        found = planned()
    with patch.object(LayerRules, "_repeat", lambda *args: False):
        expected = planned()
    assert columns(found.built.graph) == columns(expected.built.graph)
    assert found.built.unused == expected.built.unused
    assert found.layout == expected.layout
    assert found.schedule.steps == expected.schedule.steps
    assert sum(repeated) == REPEATED.get(write, 0)
