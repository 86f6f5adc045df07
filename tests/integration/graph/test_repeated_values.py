"""Tensors of a known class are added to a graph, and fused, at once, as if they were added one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.graph.graph import MergeGraph
from mergeloom.engine.graph.layers.layer_rules import LayerRules
from mergeloom.engine.model.formats import registry
from mergeloom.engine.model.logical import LogicalTensor, Part
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.methods.kernel.access import Slice
from tests.support.models import Model, Shape, deepseek_v3, write_checkpoint

CPU = Options(device="cpu", threads=2, max_ram=1 << 33)
LAYERS, EXPERTS = 5, 3
SHARDS = {"a": 3 << 20, "b": 5 << 20}
"""Bytes of a shard of each model: layers continue in other shards, where the order of their tensors differs."""
WIDTH = 448


def fp8(*, quantized: bool = True) -> Model:
    """A small DeepSeek-V3, with or without scales of blocks."""
    return deepseek_v3(layers=LAYERS, experts=EXPERTS, hidden=WIDTH, fp8=quantized)


def int4() -> Model:
    """The layers of a mixture of experts in INT4, each with a shape as a companion."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (256, 64)}
    dtypes: dict[str, str] = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            module = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
            for ending, dtype, shape in (
                ("weight_packed", "I32", (96, 8)),
                ("weight_scale", "BF16", (96, 2)),
                ("weight_shape", "I32", (2,)),
            ):
                shapes[f"{module}.{ending}"], dtypes[f"{module}.{ending}"] = shape, dtype
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (64,)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return Model(shapes, {"model_type": "llama", "num_hidden_layers": LAYERS, "quantization_config": section}, dtypes)


MODELS: dict[str, tuple[Model, Model]] = {
    "bf16": (fp8(quantized=False), fp8(quantized=False)),
    "fp8": (fp8(), fp8()),
    "fp8 and bf16": (fp8(), fp8(quantized=False)),
    "int4": (int4(), int4()),
}


def write(directory: Path, name: str) -> dict[str, Path]:
    """Write the models `a` and `b`, without data."""
    return {
        each: write_checkpoint(directory / each, model, fill=None, shard_bytes=SHARDS[each])
        for each, model in zip("ab", MODELS[name], strict=True)
    }


def linear(models: Mapping[str, Path], **more: Any) -> dict[str, Any]:
    inputs = [{"model": str(path), "parameters": {"weight": 1}} for path in models.values()]
    return {"merge_method": "linear", "models": inputs, **more}


# ------------------------------------------------------------------------------------------------ what is expected


def stored_as(tensors: Mapping[str, object], name: str) -> list[str]:
    """The names of the tensors that a weight is computed from, by the rules of the formats."""
    module = name.removesuffix(".weight")
    pairs = ((name, f"{name}_scale_inv"), (f"{module}.weight_packed", f"{module}.weight_scale"))
    return next(([*pair] for pair in pairs if set(pair) <= set(tensors)), [name])


def ranges(directory: Path) -> dict[str, tuple[str, int, int]]:
    """File, first byte and size of each tensor, from the headers."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                found[name] = (file.name, 8 + size + first, end - first)
    return found


@pytest.mark.parametrize(("name", "dtype"), [("bf16", None), ("fp8", None), ("fp8", "bfloat16"), ("int4", "bfloat16")])
def test_each_output_is_computed_from_the_tensors_of_its_name(name: str, dtype: str | None, tmp_path: Path) -> None:
    paths = write(tmp_path, name)
    found = plan(linear(paths, **({"dtype": dtype} if dtype else {})), CPU)
    graph, places = found.built.graph, {each: ranges(path) for each, path in paths.items()}
    model, outputs = MODELS[name][0], {}
    for number, output in enumerate(graph.outputs):
        outputs[output.name] = number
        codes = output.name.removesuffix("_scale_inv")
        computing = graph.results_with(output.node)[0]
        expected = [(each, part) for each in "ab" for part in stored_as(model.tensors, codes)]
        reads = graph.node_sources[computing]
        assert [("ab"[graph.read_models[read]], graph.read_names[read]) for read in reads] == expected
        refs = [graph.reads[read] for read in reads]
        assert [(ref.file.name, ref.offset, ref.nbytes) for ref in refs] == [places[m][part] for m, part in expected]
        if codes in model.tensors and (dtype is None or codes == output.name):
            assert graph.shape(output.node) == tuple(model.tensors[output.name])
    parts = {part for part in model.tensors if part.endswith(("_scale_inv", ".weight_packed", ".weight_scale"))}
    kept = set(model.tensors) - {part for part in model.tensors if part.endswith(".weight_shape")}
    if dtype is not None:
        kept = (kept - parts) | {f"{p.removesuffix('_packed')}" for p in parts if p.endswith(".weight_packed")}
    assert outputs.keys() == kept
    assert len(graph.reads) == len(set(zip(graph.read_models, graph.read_names, strict=True)))
    numbers = [outputs[name] for name in outputs if name.startswith("model.layers.")]
    assert numbers == sorted(numbers)
    assert found.bytes_read == sum(
        places[each][part][2] for each in "ab" for part in places[each] if not part.endswith(".weight_shape")
    )
    written = {each: graph.nbytes(graph.outputs.nodes[number]) for each, number in outputs.items()}
    assert found.bytes_written == sum(written.values())


# ------------------------------------------------------------------------------------------------ one by one


def stack(models: Mapping[str, Path]) -> dict[str, Any]:
    """Layers of the output have other numbers than those of the models, and some are there twice."""

    def sources(first: int, end: int) -> dict[str, Any]:
        return {"sources": [{"model": str(path), "layer_range": [first, end]} for path in models.values()]}

    slices = [sources(3, 5), sources(0, 5)]
    return {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}


def ties(models: Mapping[str, Path], method: str = "ties") -> dict[str, Any]:
    a, b = map(str, models.values())
    inputs = [{"model": each, "parameters": {"weight": 0.5, "density": 0.5}} for each in (a, b)]
    return {"merge_method": method, "base_model": a, "models": inputs}


def copied(models: Mapping[str, Path]) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(models["a"])}]}


RECIPES = {
    "linear": linear,
    "to bfloat16": lambda models: linear(models, dtype="bfloat16"),
    "some in bfloat16": lambda models: linear(
        models, out_dtype=[{"filter": "experts.1", "value": "bfloat16"}, {"value": "float16"}]
    ),
    "stack": stack,
    "ties": ties,
    "random": lambda models: ties(models, "dare_ties"),
    "copied": copied,
}
CASES = [
    *(("fp8", recipe) for recipe in RECIPES),
    *(("int4", recipe) for recipe in ("to bfloat16", "copied", "random")),
    *(("bf16", recipe) for recipe in ("linear", "stack", "random")),
    *(("fp8 and bf16", recipe) for recipe in ("linear", "ties")),
]


def contents(graph: MergeGraph) -> Iterator[object]:
    """Everything that a graph says."""
    yield list(zip(graph.reads, graph.read_models, graph.read_names, strict=True))
    for node in graph.nodes():
        operation = graph.operation(node)
        yield node, operation.kind, operation.method, operation.parameters, operation.accesses
        yield graph.node_sources[node], graph.node_dtype[node], graph.shape(node), graph.node_key[node]
        yield graph.results(node), graph.node_class[node], graph.places(node)
    yield list(graph.outputs)
    yield graph.users(), graph.shares_reads, graph.reads.used


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_the_graph_is_that_of_tensors_that_are_added_one_by_one(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(RECIPES[recipe](write(tmp_path, name)), monkeypatch, repeats=name != "bf16" and recipe != "copied")


def test_tensors_next_to_values_whose_parts_are_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
        for name, ref in checkpoint.tensors.items():
            if name.endswith("q_a_layernorm.weight"):
                part = Part(name, replace(ref, shape=(1, *ref.shape)), Slice(0, *ref.shape))
                yield LogicalTensor(name, ref.shape, ref.dtype, (part,))

    monkeypatch.setitem(registry.FORMATS, "test", find)
    for recipe in (linear, ties):
        compare(recipe(write(tmp_path / recipe.__name__, "fp8")), monkeypatch, repeats=True)


def compare(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, repeats: bool) -> None:
    """Compare the plan of a recipe with that of adding its tensors one by one."""
    at_once = plan(recipe, CPU)
    with monkeypatch.context() as patched:
        patched.setattr(LayerRules, "_repeat", lambda *_: False)
        one_by_one = plan(recipe, CPU)
    for found, expected in zip(graphs(at_once), graphs(one_by_one), strict=True):
        assert not expected.repeats
        for mine, theirs in zip(contents(found), contents(expected), strict=True):
            assert mine == theirs
    assert bool(graphs(at_once)[-1].repeats) == repeats
    headers = [[shard.header for shard in each.layout.shards] for each in (at_once, one_by_one)]
    assert headers[0] == headers[1]
    assert without_process(at_once) == without_process(one_by_one)


def without_process(found: Plan) -> dict[str, Any]:
    """A plan without the size of the test process, which grows from one plan to the next."""
    said = found.to_dict()
    baseline = said.pop("baseline_ram")
    return said | {key: said[key] - baseline for key in ("minimum_ram", "peak_ram")}


def graphs(found: Plan) -> list[MergeGraph]:
    """The graph that is executed, and the one before it was fused."""
    return [found.built.graph, *([found.built.unfused] if found.built.unfused is not None else [])]
