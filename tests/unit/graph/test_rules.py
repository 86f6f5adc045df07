"""Rules for single tensors: missing tensors, tied heads, buffers, shapes and dtypes."""

from __future__ import annotations

import pytest

from mergeloom.engine.recipe.entries.dtype_lookup import promote
from mergeloom.errors import CheckpointError
from mergeloom.io.tensors.dtypes import DTYPES
from tests.unit.graph.building import Shape, Shapes, build, checkpoint, complete, decoder, layers, pair, stacked

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
    recipe = complete(method, *models, base=base)
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
        build(complete(method, "a", "b", base=base), models)
    with pytest.raises(CheckpointError, match=r"model.layers.1.norm.weight is in a but not in b"):
        build(complete(method, "b", "a", base=base), models)


def test_names_that_differ_outside_the_layers() -> None:
    renamed = {name.removeprefix("model."): shape for name, shape in decoder().items()}
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is in a but not in b"):
        build(complete("linear", "a", "b"), pair(decoder(), renamed))


def test_layers_are_matched_by_number_whatever_their_prefix() -> None:
    first = {f"model.{name}": shape for name, shape in layers(2, prefix="layers").items()}
    built = build(complete("linear", "a", "b"), pair(first, layers(2, prefix="transformer.layers")))
    assert built.sources("model.layers.1.norm.weight") == [
        "a:model.layers.1.norm.weight",
        "b:transformer.layers.1.norm.weight",
    ]


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic"])
def test_a_tied_model_gives_its_embedding_for_the_head(method: str) -> None:
    base = None if method == "linear" else "a"
    built = build(complete(method, "a", "b", base=base), pair(decoder(), decoder(head=False)))
    assert built.sources("lm_head.weight") == ["a:lm_head.weight", "b:model.embed_tokens.weight"]
    assert built.found.head
    assert built.unused() == {}


def test_no_head_is_written_if_no_model_has_one() -> None:
    built = build(complete("linear", "a", "b"), pair(decoder(head=False), decoder(head=False)))
    assert not built.found.head
    assert "lm_head.weight" not in built.names


def test_the_unused_head_of_a_middle_slice_is_reported() -> None:
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
        built = build(complete(method, "a", "b", base=base, dtype="float16"), models)
        for name in ("embeddings.position_ids", "model.layers.0.rotary_emb.inv_freq"):
            assert built.sources(name) == [f"{base or 'a'}:{name}"]
            assert built.how(name) == "copy"
            assert built.dtype(name) == dtypes[name]
        assert list(built.unused()) == [f"not a parameter: copied from {base or 'a'}"]
    # a buffer that only one model has, or whose shape differs, is not an error
    other = {name: shape for name, shape in shapes.items() if "inv_freq" not in name}
    built = build(complete("linear", "a", "b"), pair(shapes, other | {"embeddings.position_ids": (1, 16)}))
    assert built.sources("embeddings.position_ids") == ["a:embeddings.position_ids"]


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
        build(complete("linear", "a", "b"), pair(decoder(), decoder() | change))


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
    built = build(complete("linear", *models), models)
    assert built.dtype("weight") == expected
    assert built.found.dtype == DTYPES[expected].torch_name


def test_the_recipes_dtype_and_out_dtype() -> None:
    shapes, dtypes = {"w.weight": (4,), "norm.weight": (4,)}, {"norm.weight": "F32"}
    models = pair(shapes, shapes, dtype=dtypes)
    plain = build(complete("linear", "a"), models)
    assert [plain.how(name) for name in shapes] == ["copy", "copy"]
    assert plain.found.dtype is None  # mixed: config.json stays as it is
    cast = build(complete("linear", "a", dtype="float32"), models)
    assert [(cast.how(name), cast.dtype(name)) for name in shapes] == [("passthrough", "F32"), ("copy", "F32")]
    assert cast.found.dtype == "float32"
    both = build(complete("linear", "a", "b", dtype="float32", out_dtype="float16"), models)
    assert [both.dtype(name) for name in shapes] == ["F16", "F16"]
    assert both.found.dtype == "float16"


def test_integers_are_compared_not_merged() -> None:
    rests: Shapes = {"w.weight": (4, 4), "table": (6,)}
    shapes, name = decoder(3, rests=rests), "model.layers.2.table"
    dtypes = {f"model.layers.{n}.table": "I32" for n in range(3)}
    models = pair(shapes, shapes, dtype=dtypes)
    built = build(complete("linear", "a", "b", dtype="float16"), models)
    assert (built.how(name), built.dtype(name)) == ("same", "I32")
    assert build(stacked(("a", 0, 3), parameters={"scale": 2}), models).how(name) == "copy"
    models["b"] = checkpoint("b", shapes, dtype=dtypes | {"model.layers.2.table": "I64"})
    sources = [{"model": model, "layer_range": [2, 3]} for model in "ab"]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1}}
    with pytest.raises(CheckpointError, match=r"model.layers.0.table is I32 in a and I64 in b"):
        build(recipe, models)
