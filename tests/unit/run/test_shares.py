"""Shares of changes that survive rounding: their groups, and the warning about low ones."""

from __future__ import annotations

import pytest

from mergeloom.engine.run.survival.findings import findings
from mergeloom.engine.run.survival.shares import TensorShare, by_group, group_of, shares_dict

NAMES = {
    "attention": [
        "model.layers.3.self_attn.q_proj.weight",
        "encoder.layer.0.attention.output.dense.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
        "transformer.h.1.attn.c_attn.weight",
        "layers.2.attn.wq_a.weight",
        "vision_tower.encoder.layers.1.self_attn.qkv.weight",
    ],
    "MLP": [
        "model.layers.3.mlp.down_proj.weight",
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.output.dense.weight",
        "model.layers.1.feed_forward.w1.weight",
        "model.decoder.layers.0.fc1.weight",
        "model.layers.3.mlp.gate.weight",
    ],
    "experts": [
        "model.layers.3.mlp.experts.12.up_proj.weight",
        "model.layers.3.mlp.shared_experts.up_proj.weight",
        "model.layers.0.block_sparse_moe.experts.1.w3.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
    ],
    "embeddings": ["model.embed_tokens.weight", "embeddings.word_embeddings.weight"],
    "head": ["lm_head.weight"],
    "other": ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.mixer.in_proj.weight"],
}


def share(tensor: str, kept: float, change: float = 1.0, stored: str = "FP8") -> TensorShare:
    """A tensor of 1000 bytes more in another dtype."""
    return TensorShare(tensor, stored, kept, change, "bfloat16" if stored == "FP8" else "float32", 1000)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in NAMES.items() for name in names])
def test_groups_of_names(group: str, name: str) -> None:
    assert group_of(name) == group


def test_a_group_has_the_share_of_all_changes() -> None:
    """A large change counts more than a small one."""
    shares = [
        share("layers.0.mlp.up_proj.weight", 9.0, 10.0),
        share("layers.1.mlp.up_proj.weight", 0.1),
        share("stage/layers.0.self_attn.q_proj.weight", 0.25, 0.5),
    ]
    assert by_group(shares) == {"MLP": (pytest.approx(9.1 / 11), 2), "attention": (0.5, 1)}
    assert shares_dict(shares) == {
        "groups": {"MLP": pytest.approx(9.1 / 11), "attention": 0.5},
        "tensors": {each.tensor: each.share for each in shares},
    }


def test_nothing_is_found_if_at_least_half_is_kept() -> None:
    assert not list(findings([]))
    assert not list(findings([share("a.weight", 0.5), share("b.weight", 1.2), share("c.weight", 0.5, 1.0, "bfloat16")]))


def test_the_warning_says_what_to_write() -> None:
    low = [
        share("model.layers.0.mlp.up_proj.weight", 0.2),
        share("model.layers.1.mlp.up_proj.weight", 0.1),
        share("model.layers.1.self_attn.q_proj.weight", 0.4),
        share("model.layers.1.mlp.experts.7.up_proj.weight", 0.4),
        share("model.layers.2.mlp.experts.9.down_proj.weight", 0.4),
    ]
    (found,) = findings([*low, share("model.layers.2.mlp.up_proj.weight", 0.9)])
    assert found.names == tuple(each.tensor for each in low)
    assert "FP8 leaves less than half of the change from the base model in 5 of 6 tensors" in found.problem
    assert "(MLP 15%, attention 40%, experts 40%; least in model.layers.1.mlp.up_proj.weight, 10%)" in found.problem
    rules = ["mlp.up_proj", "self_attn.q_proj", "mlp.experts."]
    listed = ", ".join(f"{{filter: {each}, value: bfloat16}}" for each in rules)
    assert f"out_dtype: [{listed}, {{value: same}}]; the tensors are then 5KB larger" in found.advice
    assert all(any(rule in each.tensor for rule in rules) for each in low)


def test_each_dtype_has_a_warning_of_its_own() -> None:
    shares = [share("a.q_proj.weight", -0.1), share("b.q_proj.weight", 0.0, 1.0, "bfloat16"), share("c.weight", 1.0)]
    first, second = findings(shares)
    assert "FP8 leaves less than half of the change from the base model in 1 of 2 tensors" in first.problem
    assert "bfloat16 leaves less than half of the change from the base model in 1 of 1 tensor " in second.problem
    assert "out_dtype: [{filter: b.q_proj, value: float32}, {value: bfloat16}]; the tensor is then 1" in second.advice


def test_many_kinds_of_tensors_are_written_in_one_dtype() -> None:
    (found,) = findings([share(f"layers.0.block{number}.weight", 0.0) for number in range(20)])
    assert "out_dtype: bfloat16; the tensors are then 20KB larger" in found.advice
