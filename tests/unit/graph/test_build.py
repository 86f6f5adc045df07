"""From a recipe and headers to a graph: the rules for every kind of tensor, and an account of every input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.engine.graph.build import BuiltGraph, build_graph
from mergeloom.engine.graph.graph import Kind
from mergeloom.engine.graph.rules import promote
from mergeloom.engine.recipe.load import load_recipe
from mergeloom.errors import CheckpointError, RecipeError
from mergeloom.io.safetensors.checkpoint import Checkpoint
from mergeloom.io.safetensors.dtypes import DTYPES
from mergeloom.io.safetensors.tensors import TensorRef
from mergeloom.methods import merge_methods

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def checkpoint(
    name: str, shapes: Shapes, dtype: str | Mapping[str, str] = "BF16", config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint whose bytes don't exist; a dtype for each, or for all that aren't named BF16."""
    tensors: dict[str, TensorRef] = {}
    offset = 4096
    for tensor, shape in shapes.items():
        found = DTYPES[dtype if isinstance(dtype, str) else dtype.get(tensor, "BF16")]
        nbytes = found.nbytes(prod(shape))
        tensors[tensor] = TensorRef(Path(name, "model.safetensors"), offset, nbytes, found, shape)
        offset += nbytes
    return Checkpoint(Path(name), MappingProxyType(tensors), config, {}, (Path(name, "model.safetensors"),), ())


def layers(count: int, rests: Shapes | None = None, prefix: str = "model.layers") -> dict[str, Shape]:
    """The tensors of a stack."""
    chosen = rests or {"attn.q_proj.weight": (4, 4), "norm.weight": (4,)}
    return {f"{prefix}.{number}.{rest}": shape for number in range(count) for rest, shape in chosen.items()}


def decoder(count: int = 4, *, head: bool = True, rests: Shapes | None = None) -> dict[str, Shape]:
    """The tensors of a small language model."""
    embeddings: dict[str, Shape] = {"model.embed_tokens.weight": (8, 4)}
    return embeddings | layers(count, rests) | {"model.norm.weight": (4,)} | ({"lm_head.weight": (8, 4)} if head else {})


@dataclass
class Built:
    """A graph, seen by its outputs."""

    found: BuiltGraph

    @property
    def names(self) -> list[str]:
        """The outputs' names."""
        return [output.name for output in self.found.graph.outputs]

    def node(self, name: str) -> int:
        """The node that makes an output."""
        return next(output.node for output in self.found.graph.outputs if output.name == name)

    def sources(self, name: str) -> list[str]:
        """What an output is made of: ``model:tensor``."""
        graph = self.found.graph
        return [
            f"{graph.models[graph.read_models[read]]}:{graph.read_names[read]}"
            for read in graph.node_sources[self.node(name)]
        ]

    def how(self, name: str) -> str:
        """``copy``, ``same``, or the method."""
        operation = self.found.graph.operation(self.node(name))
        return operation.method if operation.kind is Kind.MERGE else operation.kind.value

    def dtype(self, name: str) -> str:
        """An output's element type."""
        return self.found.graph.node_dtype[self.node(name)].name

    def parameter(self, name: str, parameter: str) -> Any:
        """The value of a parameter for an output."""
        return dict(self.found.graph.operation(self.node(name)).parameters)[parameter]

    def unused(self) -> dict[str, list[str]]:
        """Input tensors that aren't used, as ``model:tensor``, by the reason."""
        found: dict[str, list[str]] = {}
        for unused in self.found.unused:
            found.setdefault(unused.reason, []).extend(f"{unused.model}:{name}" for name in unused.tensors)
        return found

    def check_account(self) -> None:
        """Every input tensor is read, or named once with a reason."""
        graph = self.found.graph
        read = {(graph.models[model], name) for model, name in zip(graph.read_models, graph.read_names, strict=True)}
        named = [(unused.model, name) for unused in self.found.unused for name in unused.tensors]
        everything = [(model.name, name) for model in self.found.models for name in model.checkpoint.tensors]
        assert sorted([*read, *named]) == sorted(everything)
        assert all(unused.reason for unused in self.found.unused)
        assert len(set(self.names)) == len(self.names)


def build(recipe: Mapping[str, object], models: Mapping[str, Checkpoint], *, seed: int = 0) -> Built:
    """The graph of a recipe whose models are these checkpoints; a weight of 1 for all where a weight is needed."""
    methods = merge_methods()
    loaded = load_recipe(recipe, methods=methods)
    found = Built(build_graph(loaded, loaded.output, methods, lambda ref: models[ref.text], seed=seed))
    found.check_account()
    return found


def whole(method: str, *models: str, base: str | None = None, **more: object) -> dict[str, object]:
    """A recipe of whole models."""
    known = {parameter.name for parameter in merge_methods()[method].parameters}
    parameters = {name: value for name, value in {"weight": 1, "t": 0.5}.items() if name in known}
    recipe: dict[str, object] = {"merge_method": method, "models": [{"model": model} for model in models]}
    return recipe | {"parameters": parameters} | ({"base_model": base} if base else {}) | more


def stacked(*parts: tuple[str, int, int], **more: object) -> dict[str, object]:
    """A recipe that stacks layers."""
    slices = [{"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in parts]
    return {"merge_method": "passthrough", "slices": slices, **more}


def pair(first: Shapes, second: Shapes, **dtypes: Any) -> dict[str, Checkpoint]:
    """Models ``a`` and ``b``."""
    return {"a": checkpoint("a", first, **dtypes), "b": checkpoint("b", second, **dtypes)}


# ------------------------------------------------------------------------------------------------ layers and slices


def test_slices_follow_each_other_and_dropped_layers_are_named() -> None:
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


def test_a_layer_that_stands_twice_is_one_node() -> None:
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
    sources = [{"model": name, "layer_range": [0, 3], "parameters": {"weight": [0, 1]}} for name in "ab"]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}] * 2, "parameters": {"normalize": False}}
    built = build(recipe, pair(decoder(3), decoder(3)))
    weights = [built.parameter(f"model.layers.{n}.norm.weight", "weight") for n in range(6)]
    assert weights == [(0, 0), (0.5, 0.5), (1, 1)] * 2
    assert built.parameter("model.embed_tokens.weight", "weight") == (0, 0)
    assert built.parameter("lm_head.weight", "weight") == (0, 0)


def test_filters_fit_the_sources_name_for_its_own_parameters_and_the_outputs_for_shared_ones() -> None:
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
        (whole("linear", "a", "long"), "4 of a, 6 of long"),
        (stacked(("flat", 0, 2)), "flat has no layers to slice"),
    ],
)
def test_layers_that_are_not_there(recipe: dict[str, object], says: str) -> None:
    models = {
        "a": checkpoint("a", decoder(4)),
        "long": checkpoint("long", decoder(6)),
        "flat": checkpoint("flat", {"weight": (4, 4)}),
    }
    with pytest.raises(RecipeError, match=says):
        build(recipe, models)


def test_a_model_without_layers_is_merged_whole() -> None:
    built = build(whole("linear", "a", "b"), pair({"weight": (4, 4)}, {"weight": (4, 4)}))
    assert built.names == ["weight"]
    assert built.found.layers == 0
    assert built.found.stacks == ()


# ------------------------------------------------------------------------------------------------ other models' slices


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
def test_slices_of_models_that_do_not_fit_together(other: dict[str, Shape], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        build(stacked(("a", 0, 2), ("b", 2, 4)), pair(decoder(), other))


def test_slices_fit_where_a_layer_is_like_any_of_the_donors() -> None:
    mixed = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    for number in range(4):
        kind = {"mamba.A": (7,)} if number % 2 else {"attn.q_proj.weight": (4, 4), "attn.inv_freq": (2,)}
        mixed |= {f"model.layers.{number}.{rest}": shape for rest, shape in kind.items()}
    without_buffers = {name: shape for name, shape in mixed.items() if "inv_freq" not in name}
    built = build(stacked(("a", 0, 2), ("b", 3, 4), ("b", 2, 3)), pair(mixed, without_buffers))
    assert built.sources("model.layers.2.mamba.A") == ["b:model.layers.3.mamba.A"]
    assert "model.layers.3.attn.inv_freq" not in built.names


def test_a_base_that_is_no_input_gives_the_names_and_the_config() -> None:
    models = pair(decoder(), decoder(6, head=False))
    built = build(stacked(("b", 0, 6), base_model="a"), models)
    assert built.found.models[built.found.donor].name == "a"
    assert built.sources("lm_head.weight") == ["b:model.embed_tokens.weight"]  # b is tied, and a's config has a head
    assert set(built.unused()) == {"the base model is not an input of this recipe"}
    assert len(built.unused()["the base model is not an input of this recipe"]) == len(decoder())


# ------------------------------------------------------------------------------------------------ missing tensors

BIAS = {"attn.q_proj.weight": (4, 4), "attn.q_proj.bias": (4,)}
PLAIN = {"attn.q_proj.weight": (4, 4)}
NAME = "model.layers.0.attn.q_proj.bias"


@pytest.mark.parametrize(
    ("method", "models", "base", "having", "expected"),
    [
        ("linear", "abc", None, "bc", ("linear", "bc")),
        ("linear", "abc", None, "c", ("copy", "c")),
        ("karcher", "abc", None, "ab", ("karcher", "ab")),
        ("slerp", "ab", "a", "a", ("copy", "a")),
        ("slerp", "ab", "a", "b", ("copy", "b")),
        ("nuslerp", "ab", None, "b", ("copy", "b")),
        ("nearswap", "ab", "a", "a", ("copy", "a")),
        ("nearswap", "ab", "a", "b", None),
        ("model_stock", "abc", "a", "a", ("copy", "a")),
        ("model_stock", "abc", "a", "b", None),
        ("model_stock", "abc", "a", "ab", None),
        ("task_arithmetic", "abc", "a", "ab", ("task_arithmetic", "ab")),
        ("task_arithmetic", "abc", "a", "a", ("copy", "a")),
        ("task_arithmetic", "abc", "a", "bc", None),
        ("ties", "abc", "a", "ac", ("ties", "ac")),
        ("multislerp", "abc", "a", "ab", ("copy", "b")),
        ("multislerp", "abc", "a", "abc", ("multislerp", "abc")),
    ],
)
def test_an_optional_tensor_that_some_models_lack(
    method: str, models: str, base: str | None, having: str, expected: tuple[str, str] | None
) -> None:
    found = {name: checkpoint(name, decoder(1, rests=BIAS if name in having else PLAIN)) for name in models}
    recipe = whole(method, *models, base=base)
    if expected is None:
        with pytest.raises(CheckpointError, match=rf"{NAME} is in \w but not in \w: .* {method} has no rule"):
            build(recipe, found)
        return
    built = build(recipe, found)
    assert built.how(NAME) == expected[0]
    assert built.sources(NAME) == [f"{model}:{NAME}" for model in expected[1]]


@pytest.mark.parametrize("method", ["linear", "karcher", "slerp", "nuslerp", "nearswap", "task_arithmetic", "ties"])
def test_a_required_tensor_that_a_model_lacks(method: str) -> None:
    base = "a" if method in ("slerp", "nearswap", "task_arithmetic", "ties") else None
    models = pair(decoder(2), {n: s for n, s in decoder(2).items() if n != "model.layers.1.norm.weight"})
    with pytest.raises(CheckpointError, match=r"model.layers.1.norm.weight is in a but not in b"):
        build(whole(method, "a", "b", base=base), models)
    with pytest.raises(CheckpointError, match=r"model.layers.1.norm.weight is in a but not in b"):
        build(whole(method, "b", "a", base=base), models)


def test_names_that_differ_outside_the_layers() -> None:
    renamed = {name.removeprefix("model."): shape for name, shape in decoder().items()}
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is in a but not in b"):
        build(whole("linear", "a", "b"), pair(decoder(), renamed))


def test_layers_are_matched_by_number_whatever_stands_before_them() -> None:
    first = {f"model.{name}": shape for name, shape in layers(2, prefix="layers").items()}
    built = build(whole("linear", "a", "b"), pair(first, layers(2, prefix="transformer.layers")))
    assert built.sources("model.layers.1.norm.weight") == [
        "a:model.layers.1.norm.weight",
        "b:transformer.layers.1.norm.weight",
    ]


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_a_tied_model_gives_its_embedding_for_the_head(method: str) -> None:
    base = None if method == "linear" else "a"
    built = build(whole(method, "a", "b", base=base), pair(decoder(), decoder(head=False)))
    assert built.sources("lm_head.weight") == ["a:lm_head.weight", "b:model.embed_tokens.weight"]
    assert built.found.head
    assert built.unused() == {}


def test_without_any_head_none_is_written() -> None:
    built = build(whole("linear", "a", "b"), pair(decoder(head=False), decoder(head=False)))
    assert not built.found.head
    assert "lm_head.weight" not in built.names


def test_a_head_in_the_middle_is_named() -> None:
    models = {
        "a": checkpoint("a", decoder(2, head=False)),
        "b": checkpoint("b", decoder(2)),
        "c": checkpoint("c", decoder(2, head=False)),
    }
    built = build(stacked(("a", 0, 1), ("b", 0, 1), ("c", 1, 2)), models)
    assert built.unused()["the output's head is tied to its embedding"] == ["b:lm_head.weight"]
    built = build(stacked(("a", 0, 1), ("c", 1, 2), ("b", 0, 1)), models)
    assert built.sources("lm_head.weight") == ["b:lm_head.weight"]


def test_buffers_come_from_the_base_else_from_the_first() -> None:
    rests = {"w.weight": (4, 4), "rotary_emb.inv_freq": (2,)}
    shapes = decoder(1, rests=rests) | {"embeddings.position_ids": (1, 8)}
    dtypes = {"embeddings.position_ids": "I64", "model.layers.0.rotary_emb.inv_freq": "F32"}
    models = pair(shapes, shapes, dtype=dtypes)
    for base in (None, "b"):
        method = "task_arithmetic" if base else "linear"
        built = build(whole(method, "a", "b", base=base, dtype="float16"), models)
        for name in ("embeddings.position_ids", "model.layers.0.rotary_emb.inv_freq"):
            assert built.sources(name) == [f"{base or 'a'}:{name}"]
            assert built.how(name) == "copy"
            assert built.dtype(name) == dtypes[name]
        assert list(built.unused()) == [f"not a parameter: copied from {base or 'a'}"]
    # a buffer that only one of them has, or that differs in shape, is in nobody's way
    other = {name: shape for name, shape in shapes.items() if "inv_freq" not in name}
    built = build(whole("linear", "a", "b"), pair(shapes, other | {"embeddings.position_ids": (1, 16)}))
    assert built.sources("embeddings.position_ids") == ["a:embeddings.position_ids"]


# ------------------------------------------------------------------------------------------------ shapes and dtypes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.norm.weight": (5,)}, r"model.norm.weight has shape \[4\] in a and \[5\] in b"),
        ({"model.layers.1.attn.q_proj.weight": (4, 1, 4)}, r"\[4, 4\] in a and \[4, 1, 4\] in b"),
        ({"model.embed_tokens.weight": (9, 4)}, "a has a vocabulary of 8 rows and b one of 9"),
        ({"lm_head.weight": (7, 4)}, "lm_head.weight: a has a vocabulary of 8 rows and b one of 7"),
        ({"model.embed_tokens.weight": (8, 6)}, r"\[8, 4\] in a and \[8, 6\] in b"),
    ],
)
def test_shapes_that_differ(change: dict[str, Shape], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        build(whole("linear", "a", "b"), pair(decoder(), decoder() | change))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["BF16", "BF16"], "BF16"),
        (["BF16", "F16"], "F32"),
        (["BF16", "F32"], "F32"),
        (["F16", "F64", "F32"], "F64"),
        (["F8_E4M3", "BF16"], "BF16"),
        (["F8_E4M3", "F8_E4M3"], "F8_E4M3"),
        (["F8_E4M3", "F8_E5M2"], "F32"),
        (["F8_E5M2", "F16", "F16"], "F16"),
    ],
)
def test_dtypes_are_promoted_as_torch_does(dtypes: list[str], expected: str) -> None:
    assert promote(DTYPES[name] for name in dtypes).name == expected
    models = {str(n): checkpoint(str(n), {"weight": (4,)}, dtype=name) for n, name in enumerate(dtypes)}
    built = build(whole("linear", *models), models)
    assert built.dtype("weight") == expected
    assert built.found.dtype == DTYPES[expected].torch_name


def test_the_recipes_dtype_and_out_dtype() -> None:
    shapes, dtypes = {"w.weight": (4,), "norm.weight": (4,)}, {"norm.weight": "F32"}
    models = pair(shapes, shapes, dtype=dtypes)
    plain = build(whole("linear", "a"), models)
    assert [plain.how(name) for name in shapes] == ["copy", "copy"]
    assert plain.found.dtype is None  # mixed: config.json stays as it is
    cast = build(whole("linear", "a", dtype="float32"), models)
    assert [(cast.how(name), cast.dtype(name)) for name in shapes] == [("passthrough", "F32"), ("copy", "F32")]
    assert cast.found.dtype == "float32"
    both = build(whole("linear", "a", "b", dtype="float32", out_dtype="float16"), models)
    assert [both.dtype(name) for name in shapes] == ["F16", "F16"]
    assert both.found.dtype == "float16"


def test_integers_are_compared_not_merged() -> None:
    rests: Shapes = {"w.weight": (4, 4), "table": (6,)}
    shapes, name = decoder(3, rests=rests), "model.layers.2.table"
    dtypes = {f"model.layers.{n}.table": "I32" for n in range(3)}
    models = pair(shapes, shapes, dtype=dtypes)
    built = build(whole("linear", "a", "b", dtype="float16"), models)
    assert (built.how(name), built.dtype(name)) == ("same", "I32")
    assert build(stacked(("a", 0, 3), parameters={"scale": 2}), models).how(name) == "copy"
    models["b"] = checkpoint("b", shapes, dtype=dtypes | {"model.layers.2.table": "I64"})
    sources = [{"model": model, "layer_range": [2, 3]} for model in "ab"]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1}}
    with pytest.raises(CheckpointError, match=r"model.layers.0.table is I32 in a and I64 in b"):
        build(recipe, models)


# ------------------------------------------------------------------------------------------------ kinds of models


def test_layers_beyond_the_count_are_kept_renumbered_and_said() -> None:
    extra = {"model.layers.4.norm.weight": (4,), "model.layers.4.eh_proj.weight": (4, 8)}
    config = {"num_hidden_layers": 4}
    models = {"a": checkpoint("a", decoder() | extra, config=config), "b": checkpoint("b", decoder(), config=config)}
    built = build(stacked(("a", 0, 4), ("a", 2, 4)), models)
    assert built.found.layers == 6
    assert built.sources("model.layers.6.eh_proj.weight") == ["a:model.layers.4.eh_proj.weight"]
    assert [warning for warning in built.found.warnings if "layer 4" in warning and "as layer 6" in warning]
    assert built.unused() == {}
    kept = build(whole("linear", "a"), models)
    assert kept.sources("model.layers.4.norm.weight") == ["a:model.layers.4.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model.layers.4.norm.weight is in a but not in b"):
        build(whole("linear", "a", "b"), models)
    dropped = build(stacked(("a", 0, 2), ("b", 2, 4)), models)
    assert "model.layers.4.norm.weight" not in dropped.names
    assert "a:model.layers.4.norm.weight" in dropped.unused()["layer 4 is in no slice"]


VISION = {
    "visual.patch_embed.proj.weight": (4, 3),
    **layers(6, {"attn.qkv.weight": (12, 4)}, "visual.blocks"),
    "visual.merger.mlp.0.weight": (4, 4),
}
SEEING = {"num_hidden_layers": 4, "vision_config": {"depth": 6}}


def test_a_vision_tower_is_merged_with_the_language_model() -> None:
    models = pair(decoder() | VISION, decoder() | VISION, config=SEEING)
    built = build(whole("linear", "a", "b"), models)
    assert built.how("visual.blocks.5.attn.qkv.weight") == "linear"
    assert built.unused() == {}
    stack = build(stacked(("a", 0, 4), ("b", 2, 4)), models)
    assert stack.found.layers == 6
    assert stack.sources("visual.merger.mlp.0.weight") == ["a:visual.merger.mlp.0.weight"]
    assert stack.sources("visual.blocks.0.attn.qkv.weight") == ["a:visual.blocks.0.attn.qkv.weight"]


def test_modules_of_a_vision_model() -> None:
    models = pair(decoder() | VISION, decoder() | VISION, config=SEEING)
    text = {"slices": [{"sources": [{"model": "a", "layer_range": part}]} for part in ([0, 3], [1, 4])]}
    both = {"merge_method": "passthrough", "modules": {"text_decoder": text, "visual": {"models": [{"model": "b"}]}}}
    built = build(both, models)
    assert built.found.layers == 6
    assert built.sources("visual.blocks.0.attn.qkv.weight") == ["b:visual.blocks.0.attn.qkv.weight"]
    alone = build({"merge_method": "passthrough", "modules": {"text_decoder": text}}, models)
    assert not any(name.startswith("visual") for name in alone.names)
    assert len(alone.unused()["no module of the recipe includes this part of the model"]) == len(VISION)
    part = {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}
    for modules, says in (
        ({"text_decoder": text, "visual": part}, "visual.blocks can't be sliced, only those of model.layers"),
        ({"ears": text}, "a has no part named 'ears'; its stacks of layers: model.layers, visual.blocks"),
    ):
        with pytest.raises(RecipeError, match=says):
            build({"merge_method": "passthrough", "modules": modules}, models)


def test_a_vision_models_projector_is_a_module_of_its_own() -> None:
    for between in (
        "multi_modal_projector.linear_1.weight",
        "visual.merger.ln_q.weight",
        "model.connector.proj.weight",
    ):
        shapes = decoder() | VISION | {between: (4, 4)}
        models = {name: checkpoint(name, shapes, config=SEEING) for name in "abc"}
        modules = {
            name: {"models": [{"model": model}]}
            for name, model in (("text_decoder", "a"), ("vision_tower", "b"), ("multi_modal_projector", "c"))
        }
        built = build({"merge_method": "passthrough", "modules": modules}, models)
        assert sorted(built.names) == sorted(shapes)
        assert built.sources(between) == [f"c:{between}"]
        assert built.sources("visual.blocks.0.attn.qkv.weight") == ["b:visual.blocks.0.attn.qkv.weight"]
        assert built.sources("model.norm.weight") == ["a:model.norm.weight"]
        modules["multi_modal_projector"] = {"slices": [{"sources": [{"model": "c", "layer_range": [0, 1]}]}]}
        with pytest.raises(RecipeError, match=r"multi_modal_projector can't be sliced"):
            build({"merge_method": "passthrough", "modules": modules}, models)
    with pytest.raises(RecipeError, match="a has no part named 'multi_modal_projector'"):
        build(
            {"merge_method": "passthrough", "modules": {"multi_modal_projector": {"models": [{"model": "a"}]}}},
            pair(decoder(), decoder()),
        )


def test_what_an_encoder_and_a_decoder_share_is_a_module_of_its_own() -> None:
    models = {name: checkpoint(name, T5, config=BOTH) for name in "abc"}
    modules = {
        name: {"models": [{"model": model}]} for name, model in (("shared", "c"), ("encoder", "a"), ("decoder", "b"))
    }
    built = build({"merge_method": "passthrough", "modules": modules}, models)
    assert sorted(built.names) == sorted(T5)
    assert {name: built.sources(name)[0][0] for name in T5} == {
        name: {"e": "a", "d": "b"}.get(name[0], "c") for name in T5
    }
    del modules["shared"]
    built = build({"merge_method": "passthrough", "modules": modules}, models)
    assert built.sources("shared.weight") == ["a:shared.weight"]


def test_two_modules_that_make_the_same_tensors() -> None:
    module = {"models": [{"model": "a"}]}
    recipe = {"merge_method": "passthrough", "modules": {"text_decoder": module, "model.layers": module}}
    with pytest.raises(CheckpointError, match=r"two tensors of the output have the name model.embed_tokens.weight"):
        build(recipe, pair(decoder(), decoder()))


T5 = {
    "shared.weight": (8, 4),
    **layers(3, {"q.weight": (4, 4)}, "encoder.block"),
    "encoder.block.0.relative_attention_bias.weight": (8, 2),
    "encoder.final_layer_norm.weight": (4,),
    **layers(2, {"q.weight": (4, 4)}, "decoder.block"),
    "decoder.final_layer_norm.weight": (4,),
    "lm_head.weight": (8, 4),
}
BOTH = {"is_encoder_decoder": True, "num_layers": 3, "num_decoder_layers": 2}


def test_an_encoder_and_a_decoder() -> None:
    models = pair(T5, T5, config=BOTH)
    built = build(whole("linear", "a", "b"), models)
    assert sorted(built.names) == sorted(T5)
    assert [len(stack.sources) for stack in built.found.stacks] == [3, 2]
    with pytest.raises(
        RecipeError, match=r"two stacks of layers, encoder.block and decoder.block: use `modules`"
    ):
        build(stacked(("a", 0, 2)), models)
    modules = {
        "encoder": {"slices": [{"sources": [{"model": "a", "layer_range": part}]} for part in ([0, 2], [1, 3])]},
        "decoder": {"models": [{"model": "b"}]},
    }
    sliced = build({"merge_method": "passthrough", "modules": modules}, models)
    assert [stack.sources for stack in sliced.found.stacks] == [(0, 1, 1, 2), (0, 1)]
    assert sliced.sources("shared.weight") == ["a:shared.weight"]
    assert sliced.sources("encoder.final_layer_norm.weight") == ["a:encoder.final_layer_norm.weight"]
    assert sliced.sources("decoder.final_layer_norm.weight") == ["b:decoder.final_layer_norm.weight"]
    assert sliced.names.count("shared.weight") == 1


# ------------------------------------------------------------------------------------------------ parameters, keys


def test_random_tensors_have_a_key_of_their_own() -> None:
    recipe = whole("dare_linear", "a", "b", base="a")
    recipe["parameters"] = {"weight": 1, "density": 0.5}
    models = pair(decoder(), decoder())
    keys = [build(recipe, models, seed=seed).found.graph.node_key for seed in (0, 1)]
    assert len(set(keys[0])) == len(keys[0])
    assert not set(keys[0]) & set(keys[1])
    assert keys[0] == build(recipe, models, seed=0).found.graph.node_key
    assert set(build(whole("linear", "a", "b"), models).found.graph.node_key) == {0}


def test_what_a_method_refuses_is_said_with_the_tensor() -> None:
    recipe = whole("linear", "a", "b")
    recipe["models"] = [
        {"model": "a", "parameters": {"weight": 1}},
        {"model": "b", "parameters": {"weight": [{"filter": "norm", "value": -1}, {"value": 1}]}},
    ]
    with pytest.raises(RecipeError, match=r"tensor model.layers.0.norm.weight: the weights sum to 0"):
        build(recipe, pair(decoder(), decoder()))


def test_equal_operations_are_one_object() -> None:
    built = build(whole("linear", "a", "b"), pair(decoder(), decoder()))
    assert len(built.found.graph.operations) == 3  # one a shape


# ------------------------------------------------------------------------------------------------ any recipe


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


@settings(max_examples=300, deadline=None)
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
