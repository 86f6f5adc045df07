"""The keys of config.json that depend on the number or the order of layers, with a source for each rule.

A key that is missing here is still handled if its value is a list with one entry per layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_TRANSFORMERS = "https://github.com/huggingface/transformers/blob/v4.57.1/src/transformers/models"
_HUB = "https://huggingface.co"

PER_LAYER = frozenset(
    """layer_types layers_block_type mlp_layer_types attention_layers attn_layers block_configs no_rope_layers
    num_key_value_heads num_attention_heads num_key_value_heads_per_layer num_attention_heads_per_layer num_kv_heads
    num_query_heads ffn_multipliers intermediate_size moe_intermediate_size moe_topk num_experts num_shared_expert
    indexer_types layer_rope_theta swiglu_limits swiglu_limits_shared activation_sparsity_pattern attn_type_list
    hybrid_layer_pattern moe_layer_freq sliding_window sliding_window_size compress_ratios hybrid_override_pattern
    index_topk_pattern attention_window""".split()  # noqa: SIM905
)
"""Lists with one entry per layer. They can have additional entries for prediction heads after the last layer."""

LAYER_INDICES = frozenset(
    """attn_layer_indices attention_layer_indices cross_attention_layers mlp_only_layers moe_layers moe_layers_enum
    full_attn_idxs full_attention_layers global_attention_layers global_attn_layers hybrid_layer_ids local_layer_ids
    rope_scaling_layers slstm_at dense_layers""".split()  # noqa: SIM905
)
"""Lists of layer indices that start at 0."""

LAYER_INDICES_FROM_1 = frozenset({"full_attn_layers", "kda_layers", "ple_layer_ids"})
"""Lists of layer indices that start at 1."""

NOT_PER_LAYER = re.compile(
    r"token|architectures|words|_ids?$|id2|label|langu?ages|image_|patch_|video_|conv_|tdnn_|mrope|scaling|multipliers"
    r"|out_features|out_indices|stage|depths|hidden_sizes|num_heads|grid|limit$|strides?$|ratios?$|dims?$|vision_|pruned"
)
"""Names of lists that do not describe layers, whatever their length."""

SIDES = re.compile(r"encoder|decoder")
"""Names of keys and sections that belong to one side of an encoder-decoder model."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A key whose value decides by a layer's index what the layer is.

    Args:
        replaced_by: list with one entry per layer that overrides the rule if it is present, or None.
        source: URL of a configuration that has the key.
    """

    replaced_by: str | None
    source: str


PERIODS = {
    "attn_layer_period": Rule("layers_block_type", f"{_TRANSFORMERS}/jamba/configuration_jamba.py"),
    "expert_layer_period": Rule(None, f"{_TRANSFORMERS}/jamba/configuration_jamba.py"),
    "full_attention_interval": Rule("layer_types", f"{_TRANSFORMERS}/qwen3_next/configuration_qwen3_next.py"),
    "sliding_window_pattern": Rule("layer_types", f"{_TRANSFORMERS}/gemma3/configuration_gemma3.py"),
    "_sliding_window_pattern": Rule("layer_types", f"{_TRANSFORMERS}/gemma3/configuration_gemma3.py"),
    "global_attn_every_n_layers": Rule("layer_types", f"{_TRANSFORMERS}/modernbert/configuration_modernbert.py"),
    "layer_group_size": Rule("layer_types", f"{_HUB}/inclusionAI/Ring-mini-linear-2.0/blob/main/config.json"),
    "no_rope_layer_interval": Rule("no_rope_layers", f"{_TRANSFORMERS}/smollm3/configuration_smollm3.py"),
    "interleave_moe_layer_step": Rule("moe_layers", f"{_TRANSFORMERS}/llama4/configuration_llama4.py"),
    "moe_layer_freq": Rule("mlp_layer_types", f"{_HUB}/deepseek-ai/DeepSeek-V2/blob/main/configuration_deepseek.py"),
    "moe_layer_interval": Rule("mlp_layer_types", f"{_TRANSFORMERS}/ernie4_5_moe/configuration_ernie4_5_moe.py"),
    "decoder_sparse_step": Rule("mlp_layer_types", f"{_TRANSFORMERS}/qwen2_moe/configuration_qwen2_moe.py"),
    "n_layers_per_attn_res_block": Rule(None, "https://huggingface.co/docs/transformers/main/en/model_doc/inkling2"),
    "index_topk_freq": Rule(
        "indexer_types", "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/deepseek_v2.py"
    ),
}
"""Periods: a layer keeps its kind only if it moves by a multiple of the value."""

LEADING = {
    "first_k_dense_replace": Rule("mlp_layer_types", f"{_TRANSFORMERS}/deepseek_v3/configuration_deepseek_v3.py"),
    "num_dense_layers": Rule("mlp_layer_types", f"{_TRANSFORMERS}/lfm2_moe/configuration_lfm2_moe.py"),
    "moe_layer_start_index": Rule("mlp_layer_types", f"{_TRANSFORMERS}/ernie4_5_moe/configuration_ernie4_5_moe.py"),
    "num_hash_layers": Rule("mlp_layer_types", f"{_HUB}/deepseek-ai/DeepSeek-V4-Flash/blob/main/config.json"),
    "max_window_layers": Rule("layer_types", f"{_TRANSFORMERS}/qwen2/configuration_qwen2.py"),
}
"""Counts of the first layers, which differ from the others."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model family whose layers alternate by their index even if config.json does not say so.

    Args:
        folder: folder of the family in transformers.
        period: default period.
        list_key: list that states the kind of each layer explicitly.
        period_key: key that overrides the period.
        last: kind of the last layer of each period.
        others: kind of the other layers.
    """

    folder: str
    period: int
    list_key: str = "layer_types"
    period_key: str = "sliding_window_pattern"
    last: Any = "full_attention"
    others: Any = "sliding_attention"

    @property
    def source(self) -> str:
        """URL of the configuration class that defines the period."""
        return f"{_TRANSFORMERS}/{self.folder}/configuration_{self.folder}.py"


FAMILIES = {
    "gemma2": Family("gemma2", 2),
    "gemma3_text": Family("gemma3", 6),
    "gemma3n_text": Family("gemma3n", 5),
    "vaultgemma": Family("vaultgemma", 2),
    "cohere2": Family("cohere2", 4),
    "olmo3": Family("olmo3", 4),
    "gpt_oss": Family("gpt_oss", 2),
    "qwen3_next": Family("qwen3_next", 4, period_key="full_attention_interval", others="linear_attention"),
    "llama4_text": Family("llama4", 4, "no_rope_layers", "no_rope_layer_interval", last=0, others=1),
    "smollm3": Family("smollm3", 4, "no_rope_layers", "no_rope_layer_interval", last=0, others=1),
}
"""Model families by ``model_type``."""
