"""The output's config.json: counts, per-layer lists, rules over a layer's number, dtype and tied heads."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.engine.files.config.rearrange import MergedConfig, merged_config

STACKED = [0, 1, 2, 3, 2, 3, 4, 5]  # [0, 4] and [2, 6] of six layers: every layer moved by an even number
ODD = [0, 1, 2, 2, 3, 4, 5]  # [0, 3] and [2, 6]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "eos_token_id": [1, 2, 3, 4, 5, 6],
    "hidden_size": 64,
    "model_type": "llama",
    "num_hidden_layers": 6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


ODD_KEYS = """kv_source_layers attention_types block_types per_layer_config linear_attn_config moe_layers_enum
    hybrid_override_pattern layer_types moe_layer_freq first_k_dense_replace num_kv_shared_layers moe_layer_end_index
    attn_layer_period tie_word_embeddings quantization_config model_type""".split()  # noqa: SIM905


def stacked(config: dict[str, Any], source: list[int] = STACKED, **options: Any) -> MergedConfig:
    """The merged config of a donor with six layers; checks that the donor's config is not modified."""
    before = copy.deepcopy(config)
    merged = merged_config(config, layers=len(source), source_layers=source, **options)
    assert config == before
    return merged


def section(source: list[int] = STACKED, **keys: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The other keys of a config with `keys` after a merge, and the warnings."""
    merged = stacked({"num_hidden_layers": 6, **keys}, source)
    assert merged.config.pop("num_hidden_layers") == len(source)
    return merged.config, tuple(map(str, merged.warnings))


def test_only_the_count_changes() -> None:
    merged = stacked(LLAMA, tied=False, dtype="bfloat16")
    assert merged.config == LLAMA | {"num_hidden_layers": 8}
    assert list(merged.config) == list(LLAMA)
    assert merged.warnings == ()


@given(st.dictionaries(st.text(max_size=9), st.none() | st.integers() | st.lists(st.integers())), st.integers(1, 6))
def test_same_layers_same_config(keys: dict[str, Any], layers: int) -> None:
    config = {**keys, "num_hidden_layers": layers, "layer_types": list(range(layers)), "first_k_dense_replace": 1}
    merged = merged_config(config, layers=layers, source_layers=range(layers))
    assert json.dumps(merged.config) == json.dumps(config)
    assert merged.warnings == ()


def test_real_encoder(encoder: Path) -> None:
    config = json.loads((encoder / "config.json").read_text())
    assert merged_config(config, layers=6, source_layers=range(6), dtype="float32").config == config
    assert stacked(config, dtype="float32").config == config | {"num_hidden_layers": 8}
    assert stacked(config, dtype="bfloat16").config == config | {"num_hidden_layers": 8, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("key", ["n_layer", "n_layers", "num_layers", "num_transformer_layers"])
def test_other_names_of_the_count(key: str) -> None:
    assert stacked({key: 6, "d_model": 8}).config == {key: 8, "d_model": 8}
    assert stacked({key: 6, "num_hidden_layers": 6}, key=key).config == {key: 8, "num_hidden_layers": 8}


def test_count_that_is_not_stated() -> None:
    merged = stacked({"model_type": "llama"}, donor_layers=6)
    assert merged.config == {"model_type": "llama", "num_hidden_layers": 8}
    assert "added num_hidden_layers = 8" in str(merged.warnings[0])
    types = list("abcdef")
    by_list = stacked({"layers_block_type": types}, [5, 0])
    assert (by_list.config, by_list.warnings) == ({"layers_block_type": ["f", "a"]}, ())
    assert stacked({"hybrid_override_pattern": "M-M*-E"}, [0, 3, 5]).config == {"hybrid_override_pattern": "M*E"}


PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_configs",
    "num_key_value_heads",
    "attn_layers",
)


@pytest.mark.parametrize("key", PER_LAYER)
def test_lists_follow_the_layers(key: str) -> None:
    config, warnings = section(**{key: [{"layer": i} for i in range(6)]})
    assert config == {key: [{"layer": i} for i in STACKED]}
    assert warnings == ()
    beyond = [*range(6), "head"]  # an entry for a prediction layer
    assert section(**{key: beyond})[0] == {key: [*STACKED, "head"]}
    assert section(**{key: [1, 2]})[0] == {key: [1, 2]}
    assert section(**{key: None})[0] == {key: None}


def test_unknown_list_of_the_right_length() -> None:
    config, warnings = section(window_of_layer=[1, 2, 3, 4, 5, 6])
    assert config == {"window_of_layer": [1, 2, 3, 4, 3, 4, 5, 6]}
    assert "window_of_layer" in warnings[0]


def test_lists_that_are_not_about_layers() -> None:
    keys = {
        "eos_token_id": [1, 2, 3, 4, 5, 6],
        "suppress_tokens": [1, 2, 3, 4, 5, 6],
        "conv_kernel": [1, 2, 3, 4, 5, 6],
        "image_grid_pinpoints": [1, 2, 3, 4, 5, 6],
        "rope_scaling": {"short_factor": [1, 2, 3, 4, 5, 6]},
        "vision_config": {"out_of_layers": [1, 2, 3, 4, 5, 6], "num_hidden_layers": 6},
    }
    assert section(**keys) == (keys, ())


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("attn_layer_indices", [1, 3], [1, 3, 5]),  # Bamba
        ("cross_attention_layers", [3, 5], [3, 5, 7]),  # Llama 3.2 Vision
        ("mlp_only_layers", [], []),
        ("moe_layers", [0, 6], [0, 8]),  # with a prediction layer
        ("moe_layers_enum", "2,3", "2,3,4,5"),  # Step-3
        ("ple_layer_ids", [1, 4], [1, 4, 6]),  # from 1
        ("linear_attn_config", {"kda_layers": [1, 2], "num_heads": 6}, {"kda_layers": [1, 2], "num_heads": 6}),
        ("linear_attn_config", {"full_attn_layers": [4]}, {"full_attn_layers": [4, 6]}),  # Kimi Linear
        ("per_layer_config", {"0": {"a": 1}, "3": {"a": 2}}, {"0": {"a": 1}, "3": {"a": 2}, "5": {"a": 2}}),
        ("per_layer_config", {"00": 1, "03": 2}, {"00": 1, "03": 2, "05": 2}),
        ("per_layer_config", {"full_attention": {"a": 1}}, {"full_attention": {"a": 1}}),
        ("kv_source_layers", [0, 1, 2, 2, 4, 4], [0, 1, 2, 2, 4, 4, 6, 6]),
        ("attention_types", [[["global", "local"], 3]], [[["global", "local"] * 4, 1]]),  # GPT-Neo
    ],
)
def test_numbers_of_layers_are_translated(key: str, old: Any, new: Any) -> None:
    assert section(**{key: old}) == ({key: new}, ())


def test_shared_keys_whose_layer_is_left_out() -> None:
    config, warnings = section([0, 3], kv_source_layers=[0, 1, 2, 2, 4, 4])
    assert config == {"kv_source_layers": [0, 1]}
    assert "layer 1 uses the keys of layer 2, which is not part of the output" in warnings[0]


@pytest.mark.parametrize(
    ("source", "first_dense", "warns"),
    [
        ([0, 1, 2, 3, 2, 3, 4, 5], 2, False),
        ([2, 3, 4, 5], 0, False),
        ([0, 0, 1, 1, 2, 3], 4, False),
        ([0, 1, 2, 0, 1, 2], 2, True),
    ],
)
def test_dense_layers_at_the_start(source: list[int], first_dense: int, warns: bool) -> None:
    config, warnings = section(source, first_k_dense_replace=2)
    assert config == {"first_k_dense_replace": first_dense}
    assert bool(warnings) == warns
    assert not section(source, first_k_dense_replace=2, mlp_layer_types=["x"] * 6)[1]


def test_other_counts_from_an_end() -> None:
    assert section(max_window_layers=6, use_sliding_window=False) == (
        {"max_window_layers": 8, "use_sliding_window": False},
        (),
    )
    assert section(max_window_layers=28)[0] == {"max_window_layers": 28}
    assert section(num_kv_shared_layers=2) == ({"num_kv_shared_layers": 2}, ())
    assert section(num_kv_shared_layers=3) == (
        {"num_kv_shared_layers": 3},
        section(num_kv_shared_layers=3)[1],
    )
    assert "num_kv_shared_layers" in section(num_kv_shared_layers=3)[1][0]
    assert section(moe_layer_start_index=1, moe_layer_end_index=5)[0] == {
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 7,
    }


@pytest.mark.parametrize(
    ("rule", "spelt_out"),
    [
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, "layers_block_type"),  # Jamba
        ({"full_attention_interval": 2}, "layer_types"),
        ({"sliding_window_pattern": 2}, "layer_types"),
        ({"no_rope_layer_interval": 2}, "no_rope_layers"),
        ({"interleave_moe_layer_step": 2}, "moe_layers"),
        ({"decoder_sparse_step": 2}, None),
        ({"n_layers_per_attn_res_block": 2}, None),  # Inkling 2
        ({"block_types": ["recurrent", "attention"]}, None),  # RecurrentGemma
    ],
)
def test_rules_over_the_number(rule: dict[str, Any], spelt_out: str | None) -> None:
    assert section(**rule) == (rule, ())
    config, warnings = section(ODD, **rule)
    assert config == rule
    assert f"{next(iter(rule))} = " in warnings[0]
    if spelt_out is not None:
        assert section(ODD, **rule, **{spelt_out: [0, 1] * 3})[1] == ()


@pytest.mark.parametrize(
    ("keys", "name", "kinds"),
    [
        ({"model_type": "gemma2"}, "layer_types", "sfsfsf"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, "layer_types", "ssfssf"),
        ({"model_type": "qwen3_next", "full_attention_interval": 3}, "layer_types", "llfllf"),
        ({"model_type": "smollm3", "no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layers", "101010"),
    ],
)
def test_families_that_alternate_without_saying_so(keys: dict[str, Any], name: str, kinds: str) -> None:
    words = {"s": "sliding_attention", "l": "linear_attention", "f": "full_attention", "0": 0, "1": 1}
    config, warnings = section(ODD, **keys)
    assert config == keys | {name: [words[kinds[i]] for i in ODD]}
    assert f"added {name}" in warnings[0]
    assert section([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], **keys) == (keys, ())


def test_nested_layers_and_the_copy_at_the_top() -> None:
    text = {"num_hidden_layers": 6, "layer_types": list("abcdef"), "dtype": "float32", "tie_word_embeddings": False}
    config = {"num_hidden_layers": 6, "text_config": text, "vision_config": {"depth": 6, "dtype": "float32"}}
    merged = stacked(config, [0, 5], main=("text_config",), tied=True, dtype="bfloat16")
    assert merged.config == {
        "num_hidden_layers": 2,
        "text_config": {
            "num_hidden_layers": 2,
            "layer_types": ["a", "f"],
            "dtype": "bfloat16",
            "tie_word_embeddings": True,
        },
        "vision_config": {"depth": 6, "dtype": "bfloat16"},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    other = {"num_hidden_layers": 6, "text_config": {"num_hidden_layers": 12}}  # the top speaks of something else
    assert merged_config(other, layers=1, source_layers=[0], main=("text_config",)).config["num_hidden_layers"] == 6


def test_encoder_and_decoder_take_a_call_each() -> None:
    t5 = {"num_layers": 6, "num_decoder_layers": 6, "is_encoder_decoder": True, "window": [1, 2, 3, 4, 5, 6]}
    encoder = stacked(t5, key="num_layers")
    assert encoder.config == t5 | {"num_layers": 8}
    assert stacked(encoder.config, [0], key="num_decoder_layers").config == t5 | {
        "num_layers": 8,
        "num_decoder_layers": 1,
    }
    bart = {"encoder_layers": 6, "num_hidden_layers": 6, "decoder_layers": 6, "is_encoder_decoder": True}
    assert stacked(bart, key="decoder_layers").config == bart | {"decoder_layers": 8}
    assert stacked(bart, key="encoder_layers").config == bart | {"encoder_layers": 8, "num_hidden_layers": 8}
    led = {**bart, "attention_window": [1, 2, 3, 4, 5, 6]}
    assert stacked(led, [5, 0], key="encoder_layers").config["attention_window"] == [6, 1]
    assert stacked(led, [5, 0], key="decoder_layers").config["attention_window"] == [1, 2, 3, 4, 5, 6]
    t5gemma = {"encoder": {"num_hidden_layers": 6}, "decoder": {"num_hidden_layers": 6}, "is_encoder_decoder": True}
    decoder = stacked(t5gemma, main=("decoder",), key="num_hidden_layers")
    assert decoder.config == t5gemma | {"decoder": {"num_hidden_layers": 8}}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head(tied: bool) -> None:
    assert stacked(LLAMA, tied=tied).config["tie_word_embeddings"] is tied
    assert stacked({"num_hidden_layers": 6}, tied=tied).config["tie_word_embeddings"] is tied
    assert "tie_word_embeddings" not in stacked({"num_hidden_layers": 6}).config
    agreeing = {"text_config": {"num_hidden_layers": 6, "tie_word_embeddings": tied}}
    assert (
        merged_config(agreeing, layers=6, source_layers=range(6), main=("text_config",), tied=tied).config == agreeing
    )


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_dtype_under_either_key(key: str) -> None:
    config = {
        key: "float32",
        "encoder": {key: "float32"},
        "a_config": {key: None},
        "quantization_config": {key: "int4"},
    }
    assert merged_config(config, layers=0, source_layers=[], dtype="float16").config == {
        key: "float16",
        "encoder": {key: "float16"},
        "a_config": {key: None},
        "quantization_config": {key: "int4"},
    }
    parts = merged_config(
        {key: {"": "float32", "vision_config": "float32"}}, layers=0, source_layers=[], dtype="float16"
    )
    assert parts.config == {key: {"": "float16", "vision_config": "float16"}}


def test_embeddings_of_all_layers_in_one_matrix() -> None:
    assert "hidden_size_per_layer_input" in section(hidden_size_per_layer_input=256)[1][0]
    assert section(list(range(6)), hidden_size_per_layer_input=256)[1] == ()


@pytest.mark.parametrize(
    ("keys", "constant"),
    [
        ({"model_type": "diffllama"}, "lambda_init"),
        ({"model_type": "beam"}, "the scale of the residual connections"),
        ({"model_type": "big_bird", "attention_type": "block_sparse"}, "the random blocks"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "the scale of the attention scores"),
    ],
)
def test_constants_that_follow_from_the_index(keys: dict[str, Any], constant: str) -> None:
    config, warnings = section(**keys)
    assert config == keys
    assert len(warnings) == 1
    assert f"{keys['model_type']} derives {constant}" in warnings[0]
    assert section([0, 1, 2, 3], **keys) == (keys, ())  # the layers stay where they are


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "big_bird", "attention_type": "original_full"},
        {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": False},
        {"model_type": "gpt2"},
    ],
)
def test_constants_that_are_not_used(keys: dict[str, Any]) -> None:
    assert section(**keys) == (keys, ())


def test_a_scale_that_the_number_of_layers_divides() -> None:
    config, warnings = section(model_type="minicpm3", scale_depth=1.5)
    assert config["scale_depth"] / math.sqrt(len(STACKED)) == pytest.approx(1.5 / math.sqrt(6), rel=1e-15)
    assert "changed scale_depth from 1.5 to 1.732" in warnings[0]
    assert section([1, 0, 2, 3, 4, 5], scale_depth=1.5) == ({"scale_depth": 1.5}, ())


def test_a_last_layer_that_the_model_runs_with_full_attention() -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    config, warnings = section([0, 1, 2, 3, 4], model_type="gemma4_text", layer_types=types)
    assert config["layer_types"] == types[:5]
    assert "layer_types ends with sliding_attention, but gemma4_text" in warnings[0]
    assert section(model_type="gemma4_text", layer_types=types)[1] == ()
    assert section([0, 1, 2, 3, 4], model_type="gemma3_text", layer_types=types)[1] == ()


def test_a_tensor_that_only_the_last_layer_has() -> None:
    keys = {"model_type": "gpt_neox_japanese"}
    assert section([0, 1, 3, 5], **keys) == (keys, ())
    for source in ([0, 1, 2], [4, 5, 0, 5]):
        assert "only the last layer of gpt_neox_japanese has attention.dense_bias" in section(source, **keys)[1][0]


def test_adapters_in_the_order_of_the_layers_that_use_them() -> None:
    keys = {"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid"] * 3}
    assert section([0, 1, 2, 2, 3, 5], **keys)[1] == ()
    for source in ([0, 1, 2, 1], [2, 3, 5], [0, 1, 3], [1, 3, 5, 5]):
        assert "zamba2 stores shared_transformer.*.*_adapter_list" in section(source, **keys)[1][0]
    keys = {"model_type": "qwen4_exp_text", "ple_layer_ids": [2, 5]}
    assert section([0, 1, 2, 2, 4], **keys)[1] == ()
    assert "ple.ple_embedding" in section([0, 1, 1, 2, 4], **keys)[1][0]


def test_layers_that_the_donor_has_not() -> None:
    config, warnings = section([0, 5, 7], layer_types=list("abcdef"))
    assert config == {"layer_types": ["a", "f", "f"]}
    assert "beyond the donor's 6" in warnings[0]


@given(st.sampled_from(ODD_KEYS), st.recursive(st.none() | st.integers() | st.just("1,2") | st.text(), st.lists))
def test_odd_values_are_kept(key: str, value: Any) -> None:
    config, _ = section(ODD, **{key: value})
    assert isinstance(value, (int, list, str)) or config == {key: value}


def test_layers_must_agree() -> None:
    with pytest.raises(ValueError, match="got 2 source layers for 3 layers"):
        merged_config(LLAMA, layers=3, source_layers=[0, 1])
