"""Graphs of models with several parts: prediction layers, vision encoders, encoder and decoder."""

from __future__ import annotations

import pytest

from mergeloom.engine.model.warnings import ModelWarningKind
from mergeloom.errors import CheckpointError, RecipeError
from tests.unit.graph.building import build, checkpoint, complete, decoder, layers, pair, stacked


def test_layers_beyond_the_count_are_kept_and_renumbered_with_a_warning() -> None:
    extra = {"model.layers.4.norm.weight": (4,), "model.layers.4.eh_proj.weight": (4, 8)}
    config = {"num_hidden_layers": 4}
    models = {"a": checkpoint("a", decoder() | extra, config=config), "b": checkpoint("b", decoder(), config=config)}
    built = build(stacked(("a", 0, 4), ("a", 2, 4)), models)
    assert built.found.layers == 6
    assert built.sources("model.layers.6.eh_proj.weight") == ["a:model.layers.4.eh_proj.weight"]
    assert [text for text in map(str, built.found.warnings) if "layer 4" in text and "as layer 6" in text]
    assert built.unused() == {}
    kept = build(complete("linear", "a"), models)
    assert kept.sources("model.layers.4.norm.weight") == ["a:model.layers.4.norm.weight"]
    copied = build(complete("linear", "a", "b"), models)
    assert copied.sources("model.layers.4.norm.weight") == ["a:model.layers.4.norm.weight"]
    dropped = build(stacked(("a", 0, 2), ("b", 2, 4)), models)
    assert "model.layers.4.norm.weight" not in dropped.names
    assert "a:model.layers.4.norm.weight" in dropped.unused()["layer 4 is in no slice"]


def test_lists_with_an_entry_per_layer_are_not_sliced_and_a_warning_names_them() -> None:
    lists = {f"model.res.mlp_queries.{number}": (4,) for number in range(4)}
    lists |= {f"model.res.attn_queries.{number}": (4,) for number in range(3)}  # the first layer has none
    others = {f"model.codebooks.{number}.weight": (4, 4) for number in range(2)} | layers(4, prefix="visual.blocks")
    models = pair(decoder() | lists | others, decoder() | lists | others, config={"num_hidden_layers": 4})
    for recipe in (stacked(("a", 0, 4), ("b", 2, 4)), stacked(("a", 1, 4))):
        (warning, second) = build(recipe, models).found.warnings
        assert (warning.kind, warning.names) == (ModelWarningKind.LAYER_TENSORS, ("model.res.mlp_queries",))
        assert "has 4 entries, probably one per layer of model.layers" in warning.problem
        assert second.names == ("model.res.attn_queries",)
    for recipe in (complete("linear", "a", "b"), stacked(("a", 0, 2), ("b", 2, 4))):
        assert build(recipe, models).found.warnings == ()


VISION = {
    "visual.patch_embed.proj.weight": (4, 3),
    **layers(6, {"attn.qkv.weight": (12, 4)}, "visual.blocks"),
    "visual.merger.mlp.0.weight": (4, 4),
}
SEEING = {"num_hidden_layers": 4, "vision_config": {"depth": 6}}


def test_a_vision_encoder_is_merged_with_the_language_model() -> None:
    models = pair(decoder() | VISION, decoder() | VISION, config=SEEING)
    built = build(complete("linear", "a", "b"), models)
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
    built = build(complete("linear", "a", "b"), models)
    assert sorted(built.names) == sorted(T5)
    assert [len(stack.sources) for stack in built.found.stacks] == [3, 2]
    with pytest.raises(RecipeError, match=r"two stacks of layers, encoder.block and decoder.block: use `modules`"):
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
