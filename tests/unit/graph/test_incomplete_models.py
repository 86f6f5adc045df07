"""Damaged models: a few layers, or the parts outside the layers, lack tensors."""

from __future__ import annotations

from typing import Any

import pytest

from mergeloom.io.checkpoint.checkpoint import Checkpoint
from tests.unit.graph.building import Shape, build, checkpoint, complete

SMALL: dict[str, Shape] = {"input_layernorm.weight": (4,), "self_attn.k_proj.weight": (4, 4)}
VALUE: dict[str, Shape] = {"self_attn.v_proj.weight": (4, 4)}
MLP: dict[str, Shape] = {f"mlp.{name}_proj.weight": (4, 4) for name in ("down", "gate", "up")}
LAYER = SMALL | VALUE | MLP
OUTSIDE: dict[str, Shape] = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8}


def model(
    count: int, lacking: dict[int, dict[str, Shape]], outside: dict[str, Shape] = OUTSIDE, **config: Any
) -> Checkpoint:
    """A model in which some layers lack tensors."""
    shapes = dict(outside)
    for number in range(count):
        shapes |= {
            f"model.layers.{number}.{rest}": shape
            for rest, shape in LAYER.items()
            if rest not in lacking.get(number, {})
        }
    return checkpoint("a", shapes, config={"num_hidden_layers": count, **LLAMA, **config})


def warnings(found: Checkpoint) -> list[str]:
    """The warnings about a complete model."""
    return [str(warning) for warning in build(complete("linear", "a"), {"a": found}).found.warnings]


@pytest.mark.parametrize(
    ("count", "layers", "lacking", "says"),
    [
        (32, (3, 17), VALUE, "layers 3, 17 of model.layers lack self_attn.v_proj.weight, which"),
        (8, (1, 2), VALUE, "layers 1-2 of model.layers lack self_attn.v_proj.weight, which"),
        (
            8,
            (6, 7),
            MLP,
            "layers 6-7 of model.layers lack mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weig",
        ),
        (4, (3,), MLP, "layer 3 of model.layers lacks mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weig"),
        (4, (0,), {"input_layernorm.weight": (4,)}, "layer 0 of model.layers lacks input_layernorm.weight, which"),
    ],
)
def test_a_few_layers_that_lack_tensors(count: int, layers: tuple[int, ...], lacking: Any, says: str) -> None:
    damaged = model(count, dict.fromkeys(layers, lacking))
    built = build(complete("linear", "a"), {"a": damaged}).found
    (warning,) = built.warnings
    assert str(warning).startswith(f"a: {says}")
    assert "the model may be damaged: download it again" in str(warning)
    assert set(warning.names) == {f"model.layers.{layer}.{rest}" for layer in layers for rest in lacking}


@pytest.mark.parametrize(
    ("count", "layers", "lacking", "config"),
    [
        (24, range(5, 24, 6), VALUE, {}),  # Gemma 4's full attention, if config.json doesn't say so
        (32, (7, 15, 23, 31), VALUE, {}),  # an unknown period
        (12, range(9, 12), SMALL | VALUE, {"num_kv_shared_layers": 3}),
        (12, range(10, 12), {"self_attn.k_proj.weight": (4, 4)} | VALUE, {}),  # keys and values of earlier layers
        (32, (21, 24), SMALL | VALUE, {"drop_attn_list": [24, 21]}),  # LLM-Drop
        (32, range(2), MLP, {"first_k_dense_replace": 2}),
        (8, range(4, 8), MLP, {}),
    ],
)
def test_layers_that_lack_tensors_by_design(count: int, layers: Any, lacking: Any, config: Any) -> None:
    assert warnings(model(count, dict.fromkeys(layers, lacking), **config)) == []


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_act": "gelu_new"},
        {"_name_or_path": "x1/y"},
        {"eos_token_id": [0, 1, 2, 3]},
        {"layer_types": ["full_attention"] * 4},
    ],
)
def test_other_keys_explain_no_difference_between_layers(config: dict[str, Any]) -> None:
    (warning,) = warnings(model(4, {2: VALUE}, **config))
    assert warning.startswith("a: layer 2 of model.layers lacks self_attn.v_proj.weight")


def test_keys_of_layers_explain_a_difference() -> None:
    for config in (
        {"hybrid_override_pattern": "**-*"},
        {"moe_layers_enum": "2"},
        {"full_attn_layers": [3]},
        {"an_unknown_list": [1, 1, 0, 1]},
        {"local_layer_ids": [2]},
    ):
        assert warnings(model(4, {2: VALUE}, **config)) == []


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        (("model.norm.weight",), "a has no final norm, probably named model.norm.weight: loaders initialize"),
        (("model.embed_tokens.weight",), "a has no embedding, probably named model.embed_tokens.weight: loaders"),
        (("model.norm.weight", "model.embed_tokens.weight"), "a has no final norm and no embedding, probably named"),
    ],
)
def test_a_language_model_without_a_norm_or_an_embedding(absent: tuple[str, ...], says: str) -> None:
    outside = {name: shape for name, shape in OUTSIDE.items() if name not in absent}
    (warning,) = build(complete("linear", "a"), {"a": model(4, {}, outside)}).found.warnings
    assert str(warning).startswith(says)
    assert warning.names == absent
    assert warnings(model(4, {}, outside, architectures=["LlamaModel"])) == []


@pytest.mark.parametrize(
    "names", [("model.final_layernorm.weight", "model.wte.weight"), ("model.ln_f.weight", "emb.w")]
)
def test_other_names_of_a_norm_and_an_embedding(names: tuple[str, str]) -> None:
    assert warnings(model(4, {}, {names[0]: (4,), names[1]: (8, 4)})) == []
