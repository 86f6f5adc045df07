"""Graphs of recipes: slices, layers, random keys, and the reason for every unused input."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.errors import CheckpointError, RecipeError
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from tests.examples import examples
from tests.unit.graph.building import Shape, build, checkpoint, complete, decoder, pair, stacked


def test_slices_are_concatenated_and_dropped_layers_are_reported() -> None:
    built = build(stacked(("a", 0, 2), ("b", 2, 4)), pair(decoder(5), decoder(4)))
    assert built.found.layers == 4
    assert built.sources("model.layers.1.norm.weight") == ["a:model.layers.1.norm.weight"]
    assert built.sources("model.layers.3.norm.weight") == ["b:model.layers.3.norm.weight"]
    assert built.sources("model.embed_tokens.weight") == ["a:model.embed_tokens.weight"]
    assert built.sources("model.norm.weight") == ["b:model.norm.weight"]
    assert built.sources("lm_head.weight") == ["b:lm_head.weight"]
    assert built.found.stacks[0].sources == (0, 1, 2, 3)
    unused = built.unused()
    assert unused["layer 4 is in no slice"] == [
        "a:model.layers.4.attn.q_proj.weight",
        "a:model.layers.4.norm.weight",
    ]
    assert unused["tensors outside the layers come from the first and the last slice"] == [
        "a:model.norm.weight",
        "a:lm_head.weight",
        "b:model.embed_tokens.weight",
    ]


def test_a_repeated_layer_is_one_node() -> None:
    built = build(stacked(("a", 0, 3), ("a", 1, 4)), pair(decoder(), decoder()))
    graph = built.found.graph
    assert len(graph.outputs) == 2 * 6 + 3
    assert len(list(graph)) == len(graph.reads) == 2 * 4 + 3
    assert built.node("model.layers.1.norm.weight") == built.node("model.layers.3.norm.weight")
    assert built.unused() == {}


def test_the_output_is_in_the_order_of_the_model() -> None:
    built = build(stacked(("a", 2, 3), ("a", 0, 1)), pair(decoder(), decoder()))
    assert built.names == [
        "model.embed_tokens.weight",
        "model.layers.0.attn.q_proj.weight",
        "model.layers.0.norm.weight",
        "model.layers.1.attn.q_proj.weight",
        "model.layers.1.norm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    groups = [output.group for output in built.found.graph.outputs]
    assert groups == sorted(groups)
    assert len(set(groups)) == 4


def test_gradients_are_those_of_the_layers_of_their_slice() -> None:
    sources = [{"model": name, "layer_range": [0, 3], "parameters": {"weight": [1, 2]}} for name in "ab"]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}] * 2, "parameters": {"normalize": False}}
    built = build(recipe, pair(decoder(3), decoder(3)))
    weights = [built.parameter(f"model.layers.{n}.norm.weight", "weight") for n in range(6)]
    assert weights == [(1, 1), (1.5, 1.5), (2, 2)] * 2
    assert built.parameter("model.embed_tokens.weight", "weight") == (1, 1)
    assert built.parameter("lm_head.weight", "weight") == (1, 1)


def test_filters_match_source_names_for_per_input_parameters_and_output_names_for_shared_ones() -> None:
    sources = [
        {
            "model": name,
            "layer_range": [2, 4],
            "parameters": {"weight": [{"filter": "layers.2.", "value": 3}, {"value": 1}]},
        }
        for name in "ab"
    ]
    normalize = [{"filter": "layers.0.", "value": True}, {"value": False}]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"normalize": normalize}}
    built = build(recipe, pair(decoder(), decoder()))
    values = [
        [built.parameter(f"model.layers.{n}.norm.weight", name) for name in ("weight", "normalize")] for n in range(2)
    ]
    assert values == [[(3, 3), True], [(1, 1), False]]


def test_a_slice_can_have_its_own_base() -> None:
    def sources(*names: str) -> list[dict[str, object]]:
        return [{"model": name, "layer_range": [0, 2]} for name in names]

    slices = [
        {"sources": sources("a", "b"), "base_model": "b"},
        {"sources": sources("b", "a"), "base_model": "b"},
        {"sources": sources("a", "b")},
    ]
    recipe = {"merge_method": "slerp", "base_model": "a", "slices": slices, "parameters": {"t": 0.5}}
    shapes = decoder(2, rests={"w.weight": (4, 4), "rotary_emb.inv_freq": (2,)})
    built = build(recipe, pair(shapes, shapes))
    graph = built.found.graph
    for output, base in (("model.layers.0", "b"), ("model.layers.2", "b"), ("model.layers.4", "a")):
        name = f"{output}.w.weight"
        place = graph.operation(built.node(name)).base
        assert place is not None
        assert built.sources(name)[place].startswith(base)
        assert built.sources(f"{output}.rotary_emb.inv_freq")[0].startswith(base)
    assert built.found.models[built.found.donor].name == "a"
    # what comes before the layers follows the first slice, what comes after them the last
    place = graph.operation(built.node("model.embed_tokens.weight")).base
    assert built.sources("model.embed_tokens.weight")[place or 0].startswith("b")
    place = graph.operation(built.node("model.norm.weight")).base
    assert built.sources("model.norm.weight")[place or 0].startswith("a")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (stacked(("a", 0, 5)), r"layer_range: \[0, 5\] ends past the last layer: a has 4 layers"),
        (complete("linear", "a", "long"), "4 of a, 6 of long"),
        (stacked(("flat", 0, 2)), "flat has no layers to slice"),
    ],
)
def test_missing_layers(recipe: dict[str, object], says: str) -> None:
    models = {
        "a": checkpoint("a", decoder(4)),
        "long": checkpoint("long", decoder(6)),
        "flat": checkpoint("flat", {"weight": (4, 4)}),
    }
    with pytest.raises(RecipeError, match=says):
        build(recipe, models)


def test_a_model_without_layers_is_merged_completely() -> None:
    built = build(complete("linear", "a", "b"), pair({"weight": (4, 4)}, {"weight": (4, 4)}))
    assert built.names == ["weight"]
    assert built.found.layers == 0
    assert built.found.stacks == ()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (decoder(rests={"attn.q_proj.weight": (4, 4)}), "model.layers.2.norm.weight is in a but not in b"),
        (
            decoder(rests={"attn.q_proj.weight": (4, 4), "norm.weight": (4,), "norm.bias": (4,)}),
            "model.layers.2.norm.bias is in b but not in a",
        ),
        (
            decoder(rests={"attn.q_proj.weight": (6, 4), "norm.weight": (4,)}),
            r"model.layers.2.attn.q_proj.weight has shape \[4, 4\] in a and \[6, 4\] in b",
        ),
        (
            {name.removeprefix("model."): shape for name, shape in decoder().items()},
            "model.norm.weight is in a but not in b",
        ),
        (decoder() | {"lm_head.weight": (9, 4)}, "vocabulary of 8 rows and b one of 9"),
        (decoder() | {"model.norm.weight": (5,)}, r"model.norm.weight has shape \[4\] in a and \[5\] in b"),
        ({n: s for n, s in decoder().items() if n != "model.norm.weight"}, "model.norm.weight is in a but not in b"),
    ],
)
def test_slices_of_incompatible_models(other: dict[str, Shape], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        build(stacked(("a", 0, 2), ("b", 2, 4)), pair(decoder(), other))


def test_slices_are_compatible_if_a_layer_is_like_any_of_the_donors() -> None:
    mixed = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    for number in range(4):
        kind = {"mamba.A": (7,)} if number % 2 else {"attn.q_proj.weight": (4, 4), "attn.inv_freq": (2,)}
        mixed |= {f"model.layers.{number}.{rest}": shape for rest, shape in kind.items()}
    without_buffers = {name: shape for name, shape in mixed.items() if "inv_freq" not in name}
    built = build(stacked(("a", 0, 2), ("b", 3, 4), ("b", 2, 3)), pair(mixed, without_buffers))
    assert built.sources("model.layers.2.mamba.A") == ["b:model.layers.3.mamba.A"]
    assert "model.layers.3.attn.inv_freq" not in built.names


def test_a_base_that_is_not_an_input_determines_names_and_config() -> None:
    models = pair(decoder(), decoder(6, head=False))
    built = build(stacked(("b", 0, 6), base_model="a"), models)
    assert built.found.models[built.found.donor].name == "a"
    assert built.sources("lm_head.weight") == ["b:model.embed_tokens.weight"]  # b is tied, and a's config has a head
    assert set(built.unused()) == {"the base model is not an input of this recipe"}
    assert len(built.unused()["the base model is not an input of this recipe"]) == len(decoder())


def test_random_tensors_have_a_key_of_their_own() -> None:
    recipe = complete("dare_linear", "a", "b", base="a")
    recipe["parameters"] = {"weight": 1, "density": 0.5}
    models = pair(decoder(), decoder())
    keys = [build(recipe, models, seed=seed).found.graph.node_key for seed in (0, 1)]
    assert len(set(keys[0])) == len(keys[0])
    assert not set(keys[0]) & set(keys[1])
    assert keys[0] == build(recipe, models, seed=0).found.graph.node_key
    assert set(build(complete("linear", "a", "b"), models).found.graph.node_key) == {0}


def test_errors_of_a_method_name_the_tensor() -> None:
    recipe = complete("linear", "a", "b")
    recipe["models"] = [
        {"model": "a", "parameters": {"weight": 1}},
        {"model": "b", "parameters": {"weight": [{"filter": "norm", "value": -1}, {"value": 1}]}},
    ]
    with pytest.raises(RecipeError, match=r"tensor model.layers.0.norm.weight: the weights sum to 0"):
        build(recipe, pair(decoder(), decoder()))


def test_equal_operations_are_one_object() -> None:
    built = build(complete("linear", "a", "b"), pair(decoder(), decoder()))
    assert len(built.found.graph.operations) == 3  # one a shape


@st.composite
def recipes(draw: st.DrawFn) -> tuple[dict[str, object], dict[str, Checkpoint]]:
    """Up to three models of one width, with and without heads, biases, buffers and extra layers; any recipe of them."""
    models = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        rests: dict[str, Shape] = {"w.weight": (2, 2)}
        for rest, shape in {"w.bias": (2,), "rotary_emb.inv_freq": (1,)}.items():
            if draw(st.booleans()):
                rests[rest] = shape
        count = draw(st.integers(1, 4))
        shapes = decoder(count, head=draw(st.booleans()), rests=rests)
        config = {"num_hidden_layers": count} if draw(st.booleans()) else None
        if config and draw(st.booleans()):
            shapes[f"model.layers.{count}.eh_proj.weight"] = (2, 4)
        models[name] = checkpoint(name, shapes, config=config)
    method = draw(st.sampled_from(["passthrough", "linear", "task_arithmetic"]))
    names = st.sampled_from(sorted(models))
    slices = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 3))
        listed = [draw(names)] if method == "passthrough" else draw(st.lists(names, min_size=1, max_size=3))
        starts = [draw(st.integers(0, 2)) for _ in listed]
        sources = [{"model": n, "layer_range": [s, s + length]} for n, s in zip(listed, starts, strict=True)]
        slices.append({"sources": sources})
    recipe: dict[str, object] = {"merge_method": method, "parameters": {"weight": 1}, "slices": slices}
    if draw(st.booleans()) or method == "task_arithmetic":
        recipe["base_model"] = draw(names)
    return recipe, models


@settings(max_examples=examples(300), deadline=None)
@given(recipes())
def test_any_recipe_is_refused_or_accounts_for_every_tensor(
    drawn: tuple[dict[str, object], dict[str, Checkpoint]],
) -> None:
    recipe, models = drawn
    try:
        built = build(recipe, models)
    except (RecipeError, CheckpointError):
        return
    graph = built.found.graph
    donor = built.found.models[built.found.donor].checkpoint
    numbers = {int(name.split(".")[2]) for name in built.names if name.startswith("model.layers.")}
    extra = [name for name in built.names if name.endswith("eh_proj.weight")]
    assert numbers == set(range(built.found.layers + len(extra)))
    for output in graph.outputs:
        reads = [graph.reads[read] for read in graph.node_sources[output.node]]
        assert {ref.shape for ref in reads} == {graph.shape(output.node)}
        if output.name in donor.tensors:
            assert graph.shape(output.node) == donor.tensors[output.name].shape
    missing = {name for name in donor.tensors if not name.startswith("model.layers.")} - set(built.names)
    assert missing <= {"lm_head.weight"}
