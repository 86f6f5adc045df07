"""Stacks of layers, for the tensor names and configs of real architectures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.engine.model.layers import (
    LayerName,
    Stack,
    find_layers,
)
from mergeloom.engine.model.roles import is_buffer
from mergeloom.errors import CheckpointError
from mergeloom.io.safetensors.header import read_header
from tests.unit.model.tensor_names import DEEPSEEK, LLAMA, MAIN, QWEN2_VL, T5, stack


@pytest.mark.parametrize(("stacks", "config"), MAIN.values(), ids=MAIN.keys())
def test_main_stack(stacks: dict[str, int], config: dict[str, Any] | None) -> None:
    names = [
        "embed.weight",
        "lm_head.weight",
        *(name for prefix, count in stacks.items() for name in stack(prefix, count)),
    ]
    found = find_layers(names, config)
    prefix, count = next(iter(stacks.items()))
    assert [(s.prefix, s.count, s.extras) for s in found.mains] == [(prefix, count, ())]
    for name in names:
        layer = found.split(name)
        assert (layer is not None) == name.startswith(prefix + ".")


@pytest.mark.parametrize("config", [{"num_hidden_layers": 4, "num_local_experts": 4}, None])
def test_experts_are_not_layers(config: dict[str, Any] | None) -> None:
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight" for i in range(4) for e in range(4)]
    assert [(s.prefix, s.count) for s in find_layers(names, config).stacks] == [("model.layers", 4)]
    assert find_layers(names[:4], None).main == Stack("model.layers", 1)


@pytest.mark.parametrize(
    ("config", "path", "key"),
    [
        ({"n_layer": 16}, (), "n_layer"),
        ({"text_config": {"num_hidden_layers": 16}, "num_hidden_layers": 16}, ("text_config",), "num_hidden_layers"),
        ({"llm_config": {"num_layers": 16}}, ("llm_config",), "num_layers"),
        ({"text_config": {"model_type": "llama"}}, ("text_config",), None),
        ({"layer_types": ["full_attention"] * 16}, (), None),
        ({}, (), None),
    ],
)
def test_location_of_the_count(config: dict[str, Any], path: tuple[str, ...], key: str | None) -> None:
    assert find_layers(LLAMA, config).main == Stack("model.layers", 16, (), path, key)


def test_real_encoder(encoder: Path) -> None:
    names = read_header(encoder / "model.safetensors").tensors
    config = json.loads((encoder / "config.json").read_text())
    found = find_layers(names, config)
    assert found.stacks == found.mains == (Stack("encoder.layer", 6, (), (), "num_hidden_layers"),)
    outside = [name for name in names if found.split(name) is None]
    assert {name.split(".")[0]: found.is_after(name) for name in outside} == {"embeddings": False, "pooler": True}
    assert [name for name in outside if is_buffer(name)] == [name for name in outside if name.endswith("position_ids")]


def test_split() -> None:
    found = find_layers(DEEPSEEK, {"num_hidden_layers": 61, "num_nextn_predict_layers": 1})
    assert found.main == Stack("model.layers", 61, (61,), (), "num_hidden_layers")
    name = "model.layers.3.mlp.experts.17.w1.weight"
    assert found.split(name) == LayerName("model.layers", 3, "mlp.experts.17.w1.weight", extra=False)
    assert found.split("model.layers.61.eh_proj.weight") == LayerName("model.layers", 61, "eh_proj.weight", extra=True)
    for outside in ("model.norm.weight", "model.layers_norm.3.weight", "model.layers", "model.layers.x.weight"):
        assert found.split(outside) is None


def test_separate_prediction_layers_are_outside_the_stack() -> None:
    names = [*stack("model.layers", 8), *stack("mtp.layers", 1), "mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight"]
    found = find_layers(names, {"num_hidden_layers": 8})
    assert [(s.prefix, s.count) for s in found.stacks] == [("model.layers", 8), ("mtp.layers", 1)]
    assert found.split("mtp.layers.0.norm.weight") is None
    assert all(found.is_after(name) for name in names if name.startswith("mtp."))


def test_encoder_and_decoder_are_two_stacks() -> None:
    found = find_layers(T5, {"num_layers": 6, "num_decoder_layers": 4, "is_encoder_decoder": True})
    encoder, decoder = found.mains
    assert (encoder.prefix, encoder.count, encoder.config_key) == ("encoder.block", 6, "num_layers")
    assert (decoder.prefix, decoder.count, decoder.config_key) == ("decoder.block", 4, "num_decoder_layers")
    assert found.main == encoder
    assert found.split("decoder.block.3.layer.1.EncDecAttention.q.weight") == LayerName(
        "decoder.block", 3, "layer.1.EncDecAttention.q.weight", extra=False
    )
    assert (found.module("encoder"), found.module("decoder"), found.module("shared")) == (encoder, decoder, None)
    owners = {name: found.owner(name) for name in T5}
    assert owners["shared.weight"] is owners["lm_head.weight"] is None
    assert owners["encoder.final_layer_norm.weight"] == owners["encoder.embed_tokens.weight"] == encoder
    assert owners["decoder.final_layer_norm.weight"] == decoder
    assert found.on(decoder).main == decoder
    assert found.on(decoder).split("encoder.block.0.layer.0.SelfAttention.q.weight") is None


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        ({"encoder_layers": 4, "decoder_layers": 3, "num_hidden_layers": 4}, [(), ()]),  # Whisper
        ({"encoder": {"num_hidden_layers": 4}, "decoder": {"num_hidden_layers": 3}}, [("encoder",), ("decoder",)]),
        ({"num_hidden_layers": 3, "encoder_config": {"num_hidden_layers": 4}}, [("encoder_config",), ()]),
        ({"encoder_num_hidden_layers": 4, "decoder_num_hidden_layers": 3}, [(), ()]),  # Moonshine
        (None, [(), ()]),
    ],
)
def test_counts_of_encoder_and_decoder(config: dict[str, Any] | None, paths: list[tuple[str, ...]]) -> None:
    names = [
        *stack("model.encoder.layers", 4),
        *stack("model.decoder.layers", 3),
        *stack("model.encoder.conv.layers", 2),
    ]
    found = find_layers(names, config)
    assert [(s.prefix, s.count) for s in found.mains] == [("model.encoder.layers", 4), ("model.decoder.layers", 3)]
    assert [s.config_path for s in found.mains] == paths


def test_encoder_alone_is_one_stack() -> None:
    found = find_layers([name for name in T5 if "decoder" not in name], {"num_layers": 6, "num_decoder_layers": 4})
    assert found.mains == (Stack("encoder.block", 6, (), (), "num_layers"),)


def test_modules_of_a_vision_language_model() -> None:
    found = find_layers(QWEN2_VL, {"num_hidden_layers": 28, "vision_config": {"depth": 32}})
    text, vision = found.stacks[:2]
    assert found.mains == (text,)
    assert found.split("visual.blocks.3.attn.qkv.weight") is None
    assert found.module("text_decoder") == found.module("default") == found.module("model.layers") == text
    assert found.module("vision_tower") == found.module("visual") == found.module("visual.blocks") == vision
    assert found.module("multi_modal_projector") is None
    assert found.owner("visual.merger.mlp.0.weight") == vision
    assert found.owner("lm_head.weight") == found.owner("model.embed_tokens.weight") == text
    assert not any(found.is_after(name) for name in QWEN2_VL if name.startswith("visual."))
    alone = found.on(vision)
    assert alone.split("visual.blocks.3.attn.qkv.weight") == LayerName(
        "visual.blocks", 3, "attn.qkv.weight", extra=False
    )
    assert alone.is_after("visual.merger.ln_q.weight")
    assert not alone.is_after("visual.patch_embed.proj.weight")


def test_no_layers_at_all() -> None:
    found = find_layers(["linear.weight", "linear.bias"], {})
    assert (found.stacks, found.mains, found.main) == ((), (), Stack("", 0))
    assert found.split("linear.weight") is None


def without(names: Iterable[str], *parts: str) -> list[str]:
    return [name for name in names if not any(part in name for part in parts)]


@pytest.mark.parametrize(
    ("names", "config", "says"),
    [
        pytest.param(LLAMA, {"num_hidden_layers": 32}, ["num_hidden_layers = 32", "model.layers has 0-15"], id="count"),
        pytest.param(without(LLAMA, ".5."), {"num_hidden_layers": 16}, ["0-4, 6-15"], id="lost layer"),
        pytest.param(without(LLAMA, ".5."), None, ["no number of layers", "0-4, 6-15"], id="lost layer, no config"),
        pytest.param(  # not the vision encoder, although it has this number of layers
            without(QWEN2_VL, "model.layers.31"), {"num_hidden_layers": 32}, ["visual.blocks has 0-31"], id="vision"
        ),
        pytest.param(
            [*stack("first.layers", 4), *stack("second.layers", 4)], None, ["first.layers", "second.layers"], id="two"
        ),
        pytest.param(  # XLM has a layer's parts in several lists
            [*stack("transformer.attentions", 12), *stack("transformer.ffns", 12)],
            {"n_layers": 12},
            ["n_layers = 12", "in several lists"],
            id="spread",
        ),
        pytest.param(  # ALBERT has one layer for all
            ["encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"],
            {"num_hidden_layers": 12},
            ["= 12"],
            id="albert",
        ),
        pytest.param(
            without(T5, "decoder.block.3"),
            {"num_layers": 6, "num_decoder_layers": 4},
            ["num_decoder_layers = 4", "decoder.block has 0-2"],
            id="decoder",
        ),
    ],
)
def test_errors_list_the_stacks(names: list[str], config: dict[str, Any] | None, says: list[str]) -> None:
    with pytest.raises(CheckpointError) as raised:
        find_layers(names, config)
    assert all(part in str(raised.value) for part in says), raised.value


@given(
    st.booleans(),
    st.lists(st.sampled_from(["model", "h", "layers", "encoder", "x"]), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_any_prefix(is_module: bool, components: list[str], count: int, extras: int) -> None:
    prefix = ".".join([*(["0.auto_model"] if is_module else []), *components, "layers"])
    extras = min(extras, count)
    names = stack(prefix, count + extras, "mlp.experts.0.weight", "mlp.experts.1.weight", "a.0.b.1.weight")
    found = find_layers(iter(names), {"num_hidden_layers": count})
    assert found.mains == (Stack(prefix, count, tuple(range(count, count + extras)), (), "num_hidden_layers"),)
    layers = [found.split(name) for name in names]
    assert [layer.index for layer in layers if layer] == [i for i in range(count + extras) for _ in range(3)]
    assert [layer.extra for layer in layers if layer] == [i >= count for i in range(count + extras) for _ in range(3)]


def test_a_hundred_thousand_names() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.{p}.weight" for i in range(62) for e in range(256) for p in "abcdef"]
    found = find_layers(names, {"num_hidden_layers": 61})
    layers = [found.split(name) for name in names]
    assert len({id(layer.rest) for layer in layers if layer}) == 256 * 6  # one string for each, in all layers
