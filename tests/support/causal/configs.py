"""Tiny configurations of transformers' causal language models: few layers, narrow, a small vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

LAYERS = 6
"""Layers of each model. No other list of modules has this length."""
VOCABULARY = 96

_NAMES: dict[int, str] = {
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks",
    2: """encoder_layers num_encoder_layers depth num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads
        linear_num_key_heads num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts mamba_n_groups n_groups
        type_vocab_size""",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
    32: "hidden_size d_model n_embd embed_dim emb_dim dim_model_base embedding_dim embedding_size",
    48: """intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size
        feed_forward_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size""",
    24: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads
        linear_num_value_heads num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num
        index_n_heads sliding_window sliding_window_size local_attention window_size attention_chunk_size index_topk""",
    8: """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim indexer_head_dim dim_head swa_head_dim
        kv_channels linear_head_dim linear_key_head_dim linear_value_head_dim attention_head_size d_head mamba_head_dim
        mamba_d_head kv_lora_rank mamba_d_state ssm_state_size state_size mamba_chunk_size chunk_size rotary_dim
        mamba_n_heads mamba_num_heads hidden_size_per_layer_input""",
    12: "q_lora_rank o_lora_rank gated_norm_rank laurel_rank adapter_rank hc_lowrank d_rel",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts",
    64: """max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions
        max_target_positions mamba_d_ssm""",
    0: "num_mtp_layers num_nextn_predict_layers",
    28: "image_size",
    14: "patch_size",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
"""The fields that every configuration class with them gets, and their values."""

_SIDES = dict.fromkeys([*_NAMES[LAYERS].split(), "depth", "encoder_layers"], 3)
"""The numbers of layers of vision encoders and the like."""

_NO_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}

OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 20,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": {"hidden_size_global": 32, "num_hidden_layers": 2},
        "decoder_config": {"hidden_size_global": 32, "num_hidden_layers": 3},
        "patcher_config": {"num_hidden_layers": 2},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "hidden_size": 32},
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_assistant": {"text_config": {**_NO_PER_LAYER_INPUT, "global_head_dim": 16}, "backbone_hidden_size": 32},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_unified_assistant": {
        "text_config": {**_NO_PER_LAYER_INPUT, "global_head_dim": 16, "num_kv_shared_layers": 1},
        "backbone_hidden_size": 32,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * (LAYERS // 3)},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"]
    },
    "qwen4_exp_text": {
        "eos_token_id": 3,
        "ple_layer_ids": [2, 5],
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 2,
        "heads_per_ngram": 2,
        "split_ngram_parts": 2,
        "hc_count": 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * (LAYERS // 2),
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
    },
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 2},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2)},
}
"""What single models need in addition, by ``model_type``."""


def tiny_config(kind: Any) -> Any:
    """A tiny configuration, as an object of the configuration class `kind`."""
    return _tiny(kind, OVERRIDES.get(kind.model_type, {}), _SIZES)


def _tiny(kind: Any, overrides: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    values: dict[str, Any] = {}
    for each in dataclasses.fields(kind):
        if each.name in sizes:
            values[each.name] = sizes[each.name]
        elif each.name.endswith(("token_id", "token_index")) and _is_beyond(each.default):
            values[each.name] = 5
    for name, spec in kind.sub_configs_defaults.items():
        sub = CONFIG_MAPPING[spec.model_type] if spec.model_type else spec.config_class
        is_language = name in ("text_config", "decoder", "global_config")
        if not spec.optional:
            values[name] = _tiny(sub, overrides.get(name, {}), _SIZES if is_language else _SIZES | _SIDES)
    values |= {name: value for name, value in overrides.items() if name not in kind.sub_configs_defaults}
    config = kind(**values)
    if _is_beyond(getattr(config, "eos_token_id", None)):  # some classes set it after the fields
        config.eos_token_id = 5
    return config


def _is_beyond(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(each, int) and each >= VOCABULARY for each in values)
