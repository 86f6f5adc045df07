"""Layers that store what others use: moved layers, damaged models, and gradients over shared tensors."""

from __future__ import annotations

from typing import Any

import pytest

from mergeloom.engine.model.modules import PROJECTOR
from mergeloom.engine.model.warnings import ModelWarning, ModelWarningKind
from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from tests.unit.graph.building import Shape, build, checkpoint, complete, decoder, pair, stacked

PLAIN: dict[str, Shape] = {"attn.q_proj.weight": (4, 4), "norm.weight": (4,)}
BIAS = "attn.relative_attention_bias.weight"


def model(*layers: dict[str, Shape], name: str = "a", **config: Any) -> Checkpoint:
    """A language model with these layers."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    for number, rests in enumerate(layers):
        shapes |= {f"model.layers.{number}.{rest}": shape for rest, shape in rests.items()}
    return checkpoint(name, shapes, config={"num_hidden_layers": len(layers), **config})


def t5(count: int = 4, name: str = "a") -> Checkpoint:
    """A model whose first layer stores the relative positions of all."""
    return model(PLAIN | {BIAS: (32, 4)}, *[PLAIN] * (count - 1), name=name)


MAMBA: dict[str, Shape] = {"mamba.in_proj.weight": (4, 4), "input_layernorm.weight": (4,)}
HYBRID: dict[str, Shape] = {"linear.weight": (4, 4), "mamba_decoder.mamba.in_proj.weight": (4, 4)}
SHARED: dict[str, Shape] = {"shared_transformer.self_attn.q_proj.weight": (4, 4)}
TYPES = ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"]


def zamba2(name: str = "a") -> Checkpoint:
    """A model with four hybrid layers, of which the first two store the shared blocks."""
    layers = [MAMBA, HYBRID | SHARED, MAMBA, HYBRID | SHARED, MAMBA, HYBRID, MAMBA, HYBRID]
    return model(*layers, name=name, layers_block_type=TYPES)


def warnings(recipe: dict[str, object], models: dict[str, Checkpoint]) -> tuple[ModelWarning, ...]:
    """The warnings about the layers of a merge."""
    found = build(recipe, models).found.warnings
    assert {warning.kind for warning in found} <= {ModelWarningKind.LAYER_TENSORS}
    return found


def test_a_stack_without_the_layer_that_stores_what_all_use() -> None:
    (warning,) = warnings(stacked(("a", 1, 4)), {"a": t5()})
    assert str(warning) == (
        f"layer 0 (layer 1 of a) of the output lacks {BIAS}, which a stores in layer 0 of 4: loaders initialize it at "
        f"random; keep layers with {BIAS} where a has them"
    )
    assert warning.names == (f"model.layers.0.{BIAS}",)


def test_a_stack_that_repeats_the_layer_that_stores_what_all_use() -> None:
    first, second = stacked(("a", 0, 3), ("a", 0, 2)), stacked(("a", 0, 4), ("a", 0, 4))
    for recipe, target in ((first, 3), (second, 4)):  # within the donor's layers, and beyond them
        (warning,) = warnings(recipe, {"a": t5()})
        assert str(warning).startswith(
            f"layer {target} (layer 0 of a) of the output has {BIAS}, which a stores in layer 0 of 4: loaders ignore it"
        )
        assert warning.names == (f"model.layers.{target}.{BIAS}",)


def test_both_sides_of_an_encoder_decoder_are_checked() -> None:
    shapes: dict[str, Shape] = {"shared.weight": (8, 4)}
    for side in ("encoder", "decoder"):
        for number in range(3):
            rests = PLAIN | ({BIAS: (32, 4)} if number == 0 else {})
            shapes |= {f"{side}.block.{number}.{rest}": shape for rest, shape in rests.items()}
    donor = checkpoint("a", shapes, config={"num_layers": 3, "num_decoder_layers": 3})
    modules = {
        side: {"slices": [{"sources": [{"model": "a", "layer_range": [1, 3]}]}]} for side in ("encoder", "decoder")
    }
    found = warnings({"merge_method": "passthrough", "modules": modules}, {"a": donor})
    assert [warning.names for warning in found] == [(f"{side}.block.0.{BIAS}",) for side in ("encoder", "decoder")]
    for warning, side in zip(found, ("encoder", "decoder"), strict=True):
        assert warning.problem.startswith(f"layer 0 (layer 1 of a) of the output's {side}.block lacks {BIAS}, which a")


def test_a_stack_without_the_shared_blocks_of_a_hybrid_model() -> None:
    name = next(iter(SHARED))
    found = warnings(stacked(("a", 2, 8)), {"a": zamba2()})  # hybrid layers 3, 5 and 7 of the model
    assert [(warning.names, "lacks" in warning.problem) for warning in found] == [((f"model.layers.3.{name}",), True)]
    found = warnings(stacked(("a", 0, 4), ("a", 2, 8)), {"a": zamba2()})
    assert [(warning.names, "has" in warning.problem) for warning in found] == [((f"model.layers.5.{name}",), True)]
    # the blocks stay in the first two hybrid layers, although these move
    assert warnings(stacked(("a", 1, 2), ("a", 2, 8), ("a", 4, 8)), {"a": zamba2()}) == ()


def test_layers_that_share_keys_with_their_neighbour() -> None:
    keys: dict[str, Shape] = {"attn.k_proj.weight": (4, 4)}
    donor = model(*[PLAIN | keys, PLAIN] * 4)
    assert warnings(stacked(("a", 0, 4), ("a", 2, 8)), {"a": donor}) == ()
    found = warnings(stacked(("a", 1, 3)), {"a": donor})
    assert [(warning.names, " lacks " in warning.problem) for warning in found] == [
        (("model.layers.0.attn.k_proj.weight",), True),
        (("model.layers.1.attn.k_proj.weight",), False),
    ]


def test_a_first_layer_without_a_norm() -> None:
    norm: dict[str, Shape] = {"attn_norm.weight": (4,)}  # ModernBERT
    donor = model(PLAIN, *[PLAIN | norm] * 5)
    assert warnings(complete("linear", "a"), {"a": donor}) == ()
    assert warnings(stacked(("a", 0, 4), ("a", 2, 6)), {"a": donor}) == ()
    (warning,) = warnings(stacked(("a", 0, 3), ("a", 0, 3)), {"a": donor})
    assert str(warning).startswith(
        "layer 3 (layer 0 of a) of the output lacks attn_norm.weight, which a stores in layers 1-5 of 6"
    )


def test_layers_that_a_list_in_the_config_describes() -> None:
    blocks = [{"attention": {"no_op": number % 3 == 0}} for number in range(6)]  # DeciLM
    kinds = [{"mlp.weight": (4, 4)} | ({} if number % 3 == 0 else PLAIN) for number in range(6)]
    recipe = stacked(("a", 1, 5), ("a", 0, 2))
    assert warnings(recipe, {"a": model(*kinds, block_configs=blocks)}) == ()
    assert len(warnings(recipe, {"a": model(*kinds)})) == 2
    assert warnings(recipe, {"a": model(*kinds, dense_layers=[0, 3])}) == ()
    assert len(warnings(recipe, {"a": model(*kinds, layer_types=["full_attention"] * 6)})) == 2


def test_differences_that_two_lists_explain_together() -> None:
    attention, experts = ["full", "sparse"] * 4, ["hash"] * 3 + ["moe"] * 5  # DeepSeek-V4
    kinds = [
        PLAIN
        | ({"attn.indexer.q_proj.weight": (4, 4)} if attention[number] == "sparse" else {})
        | ({"gate.table": (4, 4)} if experts[number] == "hash" else {"gate.bias": (4,)})
        for number in range(8)
    ]
    lists = {"layer_types": attention, "mlp_layer_types": experts}
    others = {"model_type": "deepseek_v4", "eos_token_id": [1, 2]}
    recipe = stacked(("a", 0, 4), ("a", 1, 7))
    assert warnings(recipe, {"a": model(*kinds, **lists, **others)}) == ()
    assert warnings(complete("linear", "a"), {"a": model(*kinds, **lists)}) == ()
    for name in lists:
        assert warnings(recipe, {"a": model(*kinds, **{name: lists[name]})}) != ()


def test_layers_of_different_kinds_can_be_in_any_order() -> None:
    attention: dict[str, Shape] = {"self_attn.q_proj.weight": (4, 4), "input_layernorm.weight": (4,)}
    donor = model(*[MAMBA, attention, MAMBA, MAMBA], layer_types=["mamba", "attention", "mamba", "mamba"])
    assert warnings(stacked(("a", 1, 4), ("a", 0, 2)), {"a": donor}) == ()


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_one_layer_that_lacks_a_projection(layer: int) -> None:
    value: dict[str, Shape] = {"attn.v_proj.weight": (4, 4)}
    layers = [PLAIN if number == layer else PLAIN | value for number in range(4)]
    models = {name: model(*layers, name=name) for name in "ab"}
    found = warnings(complete("linear", "a", "b"), models)
    assert [str(warning) for warning in found] == [
        f"{name}: layer {layer} of model.layers lacks attn.v_proj.weight, which all similar layers have; the model may "
        "be damaged: download it again"
        for name in "ab"
    ]
    assert found[0].names == (f"model.layers.{layer}.attn.v_proj.weight",)
    unused = stacked(*[("a", number, number + 1) for number in range(4) if number != layer])
    assert not any("damaged" in str(warning) for warning in warnings(unused, models))


def test_a_gradient_over_a_tensor_that_other_layers_share() -> None:
    recipe: dict[str, Any] = complete("linear", "a", "b")
    for entry, weight in zip(recipe["models"], ([0.2, 0.8], 0.5), strict=True):
        entry["parameters"] = {"weight": weight}
    models = {name: t5(name=name) for name in "ab"}
    (warning,) = warnings(recipe, models)
    assert str(warning) == (
        f"model.layers.0.{BIAS}: only layer 0 of 4 stores it, so others probably share it, and the gradient of "
        "`weight` has one value for all of them: 0.2 for a, 0.5 for b; set the value for this tensor with a filter"
    )
    recipe["models"][0]["parameters"] = {"weight": [{"filter": BIAS, "value": 0.5}, {"value": [0.2, 0.8]}]}
    assert warnings(recipe, models) == ()


def test_a_gradient_of_a_shared_parameter() -> None:
    recipe: dict[str, Any] = complete("slerp", "a", "b", base="a")
    recipe["parameters"] = {"t": [0.25, 0.75]}
    (warning,) = warnings(recipe, {name: t5(name=name) for name in "ab"})
    assert "the gradient of `t` has one value for all of them: 0.25" in str(warning)


def test_a_gradient_over_shared_blocks_and_over_a_norm_of_the_first_layer() -> None:
    recipe: dict[str, Any] = complete("linear", "a", "b")
    recipe["parameters"] = {"weight": [0.25, 0.75]}
    (first, second) = warnings(recipe, {name: zamba2(name) for name in "ab"})
    assert [warning.names for warning in (first, second)] == [
        (f"model.layers.{layer}.{next(iter(SHARED))}",) for layer in (1, 3)
    ]
    rwkv = [PLAIN | {"pre_ln.weight": (4,), "pre_ln.bias": (4,)}, *[PLAIN] * 3]
    assert warnings(recipe, {name: model(*rwkv, name=name) for name in "ab"}) == ()


def test_ordinary_layers_cause_no_warning() -> None:
    recipe: dict[str, Any] = complete("linear", "a", "b")
    recipe["models"][0]["parameters"] = {"weight": [0, 1]}
    assert warnings(recipe, pair(decoder(), decoder())) == ()
    assert warnings(stacked(("a", 2, 4), ("b", 0, 3)), pair(decoder(), decoder())) == ()
    buffers = model(PLAIN | {"rotary_emb.inv_freq": (2,)}, PLAIN, PLAIN)
    assert warnings(stacked(("a", 1, 3)), {"a": buffers}) == ()


def vlm() -> dict[str, Shape]:
    """A vision-language model."""
    vision = {f"vision_tower.encoder.layers.{number}.{rest}": s for number in range(2) for rest, s in PLAIN.items()}
    text = {f"language_model.{name}": shape for name, shape in decoder().items()}
    return vision | {"multi_modal_projector.linear.weight": (4, 4)} | text


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_model_without_the_tower_of_the_other(names: str) -> None:
    config = {"text_config": {"num_hidden_layers": 4}}
    large, small = names
    text = {name: shape for name, shape in vlm().items() if name.startswith("language_model.")}
    models = {large: checkpoint(large, vlm(), config=config), small: checkpoint(small, text)}
    with pytest.raises(CheckpointError) as caught:
        build(complete("linear", "a", "b"), models)
    assert str(caught.value).endswith(
        f". {small} has no vision_tower: to merge only the parts that both have, use {large} as `base_model`, and list "
        f"both models under `modules` for language_model, and only {large} for vision_tower and multi_modal_projector"
    )
    both, one = [{"model": "a"}, {"model": "b"}], [{"model": large}]
    modules = {"language_model": {"models": both}, "vision_tower": {"models": one}, PROJECTOR: {"models": one}}
    recipe = {"merge_method": "linear", "base_model": large, "modules": modules, "parameters": {"weight": 1}}
    assert set(build(recipe, models).names) == set(vlm())


def test_a_projector_inside_the_tower_is_not_named() -> None:
    tower = {f"visual.blocks.{number}.{rest}": shape for number in range(2) for rest, shape in PLAIN.items()}
    whole = tower | {"visual.merger.mlp.0.weight": (4, 4)} | decoder()
    models = {"a": checkpoint("a", whole, config={"num_hidden_layers": 4}), "b": checkpoint("b", decoder())}
    with pytest.raises(CheckpointError) as caught:
        build(complete("linear", "a", "b"), models)
    text = str(caught.value)
    assert text.endswith("list both models under `modules` for model, and only a for visual")
    both, one = [{"model": "a"}, {"model": "b"}], [{"model": "a"}]
    modules = {"model": {"models": both}, "visual": {"models": one}}
    recipe = {"merge_method": "linear", "base_model": "a", "modules": modules, "parameters": {"weight": 1}}
    assert set(build(recipe, models).names) == set(whole)


def test_models_with_the_same_parts_get_no_advice_about_modules() -> None:
    for other in (decoder(head=False) | {"model.extra.weight": (4,)}, decoder() | {"extra.weight": (4,)}):
        with pytest.raises(CheckpointError, match="has no rule") as caught:
            build(complete("linear", "a", "b"), pair(decoder(), other))
        assert "modules" not in str(caught.value)


def test_the_head_of_another_vocabulary_can_come_from_the_first_model() -> None:
    larger = decoder() | dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (10, 4))
    models = pair(decoder(), larger)
    with pytest.raises(CheckpointError) as caught:
        build(stacked(("a", 0, 3), ("b", 2, 4)), models)
    assert "lm_head.weight: a has a vocabulary of 8 rows and b one of 10" in str(caught.value)
    assert str(caught.value).endswith("; or take it from a with `non_layer: {head: a}`")
    built = build(stacked(("a", 0, 3), ("b", 2, 4), non_layer={"head": "a"}), models)
    assert built.sources("lm_head.weight") == ["a:lm_head.weight"]
