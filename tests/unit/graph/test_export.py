"""The exported graph: what networkx loads again has every read, operation and output, and their bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import networkx
import pytest

from mergeloom.engine.graph.exports.export import Format, export_graph, layer_of, to_networkx
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from tests.support.plans import linear


@pytest.fixture
def planned(llamas: dict[str, Path]) -> Plan:
    """The mean of two tiny Llamas of 4 layers."""
    return plan(linear(llamas["a"], llamas["b"]), Options(device="cpu"))


def test_each_tensor_is_a_path_from_its_reads_to_its_output(planned: Plan) -> None:
    graph = planned.built.graph
    found = to_networkx(graph, "tensor")
    assert networkx.is_directed_acyclic_graph(found)
    kinds = [attributes["kind"] for _, attributes in found.nodes(data=True)]
    assert (kinds.count("read"), kinds.count("output")) == (len(graph.reads), len(graph.outputs))
    name = "model.layers.2.mlp.up_proj.weight"
    assert networkx.ancestors(found, f"output:{name}") == {
        f"merge:linear:{name}",
        *(f"read:{model}:{name}" for model in graph.models),
    }


def test_by_layer_there_is_one_node_for_each_layer_and_kind(planned: Plan) -> None:
    graph = planned.built.graph
    found = to_networkx(graph)
    layers = [a for _, a in found.nodes(data=True) if a["kind"] == "output" and a["name"].startswith("model.layers.")]
    assert sorted(attributes["name"] for attributes in layers) == [f"model.layers.{number}" for number in range(4)]
    assert {attributes["tensors"] for attributes in layers} == {9}
    for kind, nbytes in (
        ("read", sum(ref.nbytes for ref in graph.reads)),
        ("output", sum(graph.nbytes(output.node) for output in graph.outputs)),
    ):
        assert sum(a["bytes"] for _, a in found.nodes(data=True) if a["kind"] == kind) == nbytes


@pytest.mark.parametrize("detail", ["layer", "tensor"])
@pytest.mark.parametrize("form", ["graphml", "json"])
def test_networkx_loads_what_is_exported(planned: Plan, form: Format, detail: str) -> None:
    graph = planned.built.graph
    text = export_graph(graph, form, detail)  # type: ignore[arg-type]
    if form == "json":
        loaded = networkx.node_link_graph(json.loads(text), edges="edges")
    else:
        loaded = networkx.read_graphml(io.BytesIO(text.encode()))
    expected = to_networkx(graph, detail)  # type: ignore[arg-type]
    assert dict(loaded.nodes(data=True)) == dict(expected.nodes(data=True))
    assert set(loaded.edges) == set(expected.edges)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.experts.3.up_proj.weight", "model.layers.12"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("middle/h.0.ln_1.bias", "middle/h.0"),
    ],
)
def test_the_layer_of_a_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer
