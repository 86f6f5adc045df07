"""Roles of tensors, for the tensor names of real architectures and every entry of the name tables."""

from __future__ import annotations

import re

import pytest

from mergeloom.engine.model import name_tables
from mergeloom.engine.model.layers import find_layers
from mergeloom.engine.model.name_tables import NamePattern
from mergeloom.engine.model.roles import (
    is_after_layers,
    is_buffer,
    is_embedding,
    is_head,
    is_optional,
    is_side_module,
    is_vision,
    tied_embedding,
)
from tests.unit.model.tensor_names import LLAMA, T5

TABLES = {name: table for name, table in vars(name_tables).items() if name.isupper()}
ENTRIES = [pytest.param(name, entry, id=f"{name}-{entry.example}") for name, table in TABLES.items() for entry in table]


def role(table: str, example: str) -> bool:
    """Whether a tensor has the role of a table."""
    match table:
        case "HEADS" | "TOP_LEVEL_HEADS":
            return is_head(example)
        case "EMBEDDINGS":
            return is_embedding(example)
        case "BUFFERS":
            return is_buffer(example)
        case "MASKED_ATTENTION":
            return is_buffer(example, (1, 1, 8, 8)) and not is_buffer(example, (8,))
        case "AFTER_LAYERS" | "AFTER_LAYERS_BY_DEFAULT":
            return is_after_layers(example, in_side_module=True)
        case "BEFORE_LAYERS":
            return not is_after_layers(example)
        case "VISION":
            return is_vision(example) and is_side_module(example) and not is_after_layers(example)
        case "OTHER_INPUTS":
            return is_side_module(example) and not is_after_layers(example)
        case "SIDE_OUTPUTS":
            return is_side_module(example) and is_after_layers(example)
        case "LANGUAGE":
            return not is_side_module(example)
    raise AssertionError(f"no test for the table {table}")


@pytest.mark.parametrize(("table", "entry"), ENTRIES)
def test_every_entry_of_a_table_matches_its_example(table: str, entry: NamePattern) -> None:
    assert re.search(entry.pattern, entry.example)
    assert role(table, entry.example)


def test_tables_have_no_duplicates() -> None:
    for table in TABLES.values():
        assert len({entry.pattern for entry in table}) == len(table)


BEFORE = """model.embed_tokens.weight transformer.wte.weight transformer.wpe.weight gpt_neox.embed_in.weight
    shared.weight bert.embeddings.LayerNorm.weight transformer.word_embeddings_layernorm.weight
    model.tok_embeddings.weight model.rotary_emb.inv_freq model.decoder.layernorm_embedding.weight
    model.encoder.conv1.weight model.per_layer_projection_norm.weight model.embed_tokens_per_layer.weight
    model.image_newline vision_tower.vision_model.post_layernorm.weight vision_tower.vision_model.head.probe
    backbone.embeddings.weight multi_modal_projector.linear_1.weight model.mm_projector.0.weight
    model.decoder.project_in.weight text_model.embeddings.position_embedding.weight never.heard.of.it"""
AFTER = """model.norm.weight lm_head.weight lm_head.bias language_model.lm_head.weight transformer.ln_f.weight
    backbone.norm_f.weight model.final_layernorm.weight model.decoder.final_layer_norm.weight
    gpt_neox.final_layer_norm.bias embed_out.weight output.weight bert.pooler.dense.weight classifier.out_proj.weight
    score.weight qa_outputs.bias cls.predictions.transform.LayerNorm.weight cls.seq_relationship.weight
    final_logits_bias proj_out.weight decoder.weight pre_classifier.weight text_model.final_layer_norm.weight
    text_projection.weight logit_scale vocab_transform.weight model.embedding_norm.weight
    model.decoder.project_out.weight transformer.ff_out.weight mtp.norm.weight head.weight
    model.decoder.layer_norm.weight altup_unembed_projections.0.weight"""


def test_before_and_after() -> None:
    layers = find_layers(LLAMA, {"num_hidden_layers": 16})
    assert [name for name in BEFORE.split() if layers.is_after(name)] == []
    assert [name for name in AFTER.split() if not layers.is_after(name)] == []


def test_heads() -> None:
    heads = """lm_head.weight output.weight embed_out.weight language_model.lm_head.weight
        transformer.output_layer.weight cls.predictions.decoder.weight lm_head.decoder.weight proj_out.weight
        vocab_projector.weight 0.lm_head.weight"""
    others = """lm_head.bias model.norm.weight encoder.layer.0.output.weight model.layers.61.shared_head.head.weight
        talker.lm_head.weight bert.encoder.layer.3.attention.output.dense.weight vision_model.head.weight score.weight
        model.decoder.weight"""
    assert [name for name in heads.split() if not is_head(name)] == []
    assert [name for name in others.split() if is_head(name)] == []


@pytest.mark.parametrize(
    ("head", "names", "embedding"),
    [
        ("lm_head.weight", LLAMA, "model.embed_tokens.weight"),
        ("lm_head.weight", ["transformer.wpe.weight", "transformer.wte.weight"], "transformer.wte.weight"),
        ("lm_head.weight", T5, "shared.weight"),
        (
            "lm_head.weight",
            ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
            "decoder.embed_tokens.weight",
        ),
        ("proj_out.weight", ["model.decoder.embed_tokens.weight"], "model.decoder.embed_tokens.weight"),
        ("embed_out.weight", ["gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        (
            "language_model.lm_head.weight",
            ["audio_tower.embed_tokens.weight", "language_model.model.embed_tokens.weight"],
            "language_model.model.embed_tokens.weight",
        ),
        (
            "cls.predictions.decoder.weight",
            ["bert.embeddings.position_embeddings.weight", "bert.embeddings.word_embeddings.weight"],
            "bert.embeddings.word_embeddings.weight",
        ),
        ("lm_head.weight", ["model.norm.weight"], None),
    ],
)
def test_tied_embedding(head: str, names: list[str], embedding: str | None) -> None:
    assert is_head(head)
    assert tied_embedding(head, names) == embedding
    assert embedding is None or is_embedding(embedding)


def test_optional() -> None:
    optional = """lm_head.weight model.layers.0.self_attn.q_proj.bias bias model.layers.3.mlp.experts.down_proj_bias
        decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"""
    required = "model.norm.weight model.embed_tokens.weight model.layers.0.mixer.dt_bias model.layers.0.mlp.gate.weight"
    assert [name for name in optional.split() if not is_optional(name)] == []
    assert [name for name in required.split() if is_optional(name)] == []


def test_buffers() -> None:
    buffers = """model.layers.0.self_attn.rotary_emb.inv_freq h.0.attn.masked_bias embeddings.position_ids inv_freq
        vision_model.embeddings.position_ids conv.bn.num_batches_tracked rope.freqs encoder.version
        gpt_neox.layers.0.attention.rotary_emb.inv_freq encoder.layers.0.attn.relative_position_index"""
    assert [name for name in buffers.split() if not is_buffer(name)] == []
    others = "model.norm.weight conv.bn.running_mean h.0.attn.c_attn.bias decoder.embed_positions.weight"
    assert [name for name in others.split() if is_buffer(name, (1, 1, 8, 8))] == []
    for mask in ("h.0.attn.bias", "gpt_neox.layers.0.attention.bias", "transformer.h.0.attn.attention.bias"):
        assert is_buffer(mask, (1, 1, 1024, 1024))
        assert not is_buffer(mask, (768,))
        assert not is_buffer(mask)
