"""Keys that are unknown, and look like rules for layers, are reported if layers moved."""

from __future__ import annotations

from typing import Any

import pytest

from mergeloom.engine.files.config.rearrange import merged_config
from mergeloom.engine.files.config.unknown_rules import unknown_rules

EVEN = [0, 1, 2, 3, 2, 3, 4, 5]
ODD = [0, 1, 2, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_layer_frequency", 2),
        ("dense_attention_every_n_layers", 2),
        ("mamba_step", 2),
        ("cla_share_factor", 2),
        ("layers_per_group", 2),
        ("sliding_window_pattern", "LG"),
        ("attention_pattern", "LG"),
        ("block_pattern", ["recurrent", "attention"]),
        ("layer_group_pattern", [0, 1]),
        ("moe_mask", [0, 1]),
        ("attention_layout", "lg"),
        ("attention_type_cycle", ["a", "b"]),
        ("no_rope_period", 2),
        ("rope_every_n", 2),
    ],
)
def test_periods_and_patterns(key: str, value: Any) -> None:
    assert list(unknown_rules({key: value}, 6, ODD)) == [(key, value)]
    assert list(unknown_rules({key: value}, 6, EVEN)) == []
    (warning,) = merged_config({"num_hidden_layers": 6, key: value}, layers=7, source_layers=ODD).warnings
    assert f"{key} = {value} looks like a rule for layers" in warning.problem
    assert "edit config.json" in warning.advice
    assert warning.names == (key,)
    assert merged_config({"num_hidden_layers": 6, key: value}, layers=6, source_layers=range(6)).warnings == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory_layers", [1, 4]),
        ("global_block_idxs", [5]),
        ("hybrid_pattern", "MMMAMM"),
        ("first_dense_layers", 3),
        ("window_layers", "0,3"),
        ("local_attn_layers", {"0": 1, "3": 1}),
        ("kv_reuse_group", [[0, 1], [2, 3]]),
        ("layer_group_pattern", [0, 0, 0, 1]),
    ],
)
def test_lists_and_counts_of_layers(key: str, value: Any) -> None:
    assert list(unknown_rules({key: value}, 6, EVEN)) == [(key, value)]


def test_a_rule_in_a_section() -> None:
    attention = {"local_every": 2, "clip_qkv": 8}
    assert list(unknown_rules({"attn_config": attention}, 6, ODD)) == [("attn_config.local_every", 2)]
    assert list(unknown_rules({"attn_config": attention}, 6, EVEN)) == []
    for section in ({"attn_config": attention | {"num_layers": 6}}, {"vision_config": attention}):
        assert list(unknown_rules(section, 6, ODD)) == []  # about other layers


def test_layers_that_did_not_move() -> None:
    kept = [0, 1, 2, 3, 3, 4]
    assert list(unknown_rules({"memory_layers": [1], "first_dense_layers": 2}, 6, kept)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 4),
        ("num_attention_heads", 4),
        ("num_experts_per_tok", 2),
        ("time_step_rank", 4),
        ("vision_feature_layer", 2),
        ("model_type", "MM"),
        ("hidden_act", "silu"),
        ("architectures", ["A", "B"]),
        ("eos_token_id", [1, 2]),
        ("full_attention_interval", 4),  # known, with a warning of its own
        ("num_nextn_predict_layers", 1),
        ("moe_layer_frequency", True),
        ("moe_layer_frequency", 64),  # more than the number of layers
        ("mrope_section", [1, 2]),
        ("out_indices", [1, 2]),
        ("patch_sizes", [2, 4]),
        ("_sliding_window_pattern", 6),  # for remote code; layer_types says the same
        ("_moe_every", 2),
        ("encoder_no_repeat_ngram_size", 4),
        ("attention_pattern", "all"),
        ("rope_type", "yarn"),
        ("quantization_config", {"group_every": 2}),
        ("backbone_config", {"return_idx": [1, 2, 3]}),
    ],
)
def test_other_keys(key: str, value: Any) -> None:
    assert list(unknown_rules({key: value}, 6, ODD)) == []
