"""Names of an adapter's modules in a checkpoint: the longest ending that fits one tensor, in any version's names."""

from __future__ import annotations

import pytest

from mergeloom.engine.model.adapters.matching import TensorNames

TEXT = [
    "model.embed_tokens.weight",
    "lm_head.weight",
    *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(12)),
]
LLAVA = [
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
]
NEW_LLAVA = [
    "lm_head.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
]
Q = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (TEXT, "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        (TEXT, "layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        (TEXT, "base.model.layers.11.self_attn.q_proj.weight", "model.layers.11.self_attn.q_proj.weight"),
        (TEXT, "model.language_model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        (TEXT, "language_model.lm_head.weight", "lm_head.weight"),
        (LLAVA, f"model.language_model.{Q}", f"language_model.model.{Q}"),
        (LLAVA, f"model.{Q}", f"language_model.model.{Q}"),
        (LLAVA, f"model.vision_tower.vision_model.encoder.{Q}", f"vision_tower.vision_model.encoder.{Q}"),
        (LLAVA, "lm_head.weight", "language_model.lm_head.weight"),
        (LLAVA, "model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        (NEW_LLAVA, f"language_model.model.{Q}", f"model.language_model.{Q}"),
        (NEW_LLAVA, f"vision_tower.vision_model.encoder.{Q}", f"model.vision_tower.vision_model.encoder.{Q}"),
        (["h.0.attn.c_attn.weight"], "transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        (
            ["model.layers.3.block_sparse_moe.gate.weight"],
            "model.layers.3.mlp.gate.weight",
            "model.layers.3.block_sparse_moe.gate.weight",
        ),
    ],
)
def test_a_name_stands_for_one_tensor(names: list[str], wanted: str, found: str) -> None:
    assert TensorNames(names).candidates(wanted) == [found]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (TEXT, "model.layers.12.self_attn.q_proj.weight"),  # no such layer
        (["model.layers.0.self_attn.q_proj.weight"], "model.layers.1.self_attn.q_proj.weight"),  # nor in a model of one
        (TEXT, "model.blocks.1.self_attn.q_proj.weight"),  # a number alone shows nothing
        (TEXT, "score.weight"),
        (["encoder.layers.0.blocks.1.q.weight"], "blocks.1.q.weight"),  # another layer's block
        ([], "lm_head.weight"),
    ],
)
def test_numbers_of_layers_are_never_dropped(names: list[str], wanted: str) -> None:
    assert TensorNames(names).candidates(wanted) == []


def test_all_tensors_are_returned_that_a_name_may_stand_for() -> None:
    assert TensorNames([f"a.{Q}", f"b.{Q}"]).candidates(Q) == [f"a.{Q}", f"b.{Q}"]
