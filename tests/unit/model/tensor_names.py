"""Tensor names of real architectures, and the stacks that are found in them."""

from __future__ import annotations

from typing import Any


def stack(prefix: str, count: int, *rests: str) -> list[str]:
    """Names of a stack's tensors: the same in every layer."""
    return [
        f"{prefix}.{i}.{rest}" for i in range(count) for rest in rests or ("self_attn.q_proj.weight", "norm.weight")
    ]


LLAMA = ["model.embed_tokens.weight", *stack("model.layers", 16), "model.norm.weight"]
DEEPSEEK = [
    "model.embed_tokens.weight",
    *stack("model.layers", 3, "self_attn.q_a_proj.weight", "mlp.up_proj.weight"),
    *(f"model.layers.{i}.mlp.experts.{e}.w1.weight" for i in range(3, 62) for e in range(64)),
    *(f"model.layers.61.{rest}" for rest in ("eh_proj.weight", "shared_head.head.weight", "embed_tokens.weight")),
    "model.norm.weight",
    "lm_head.weight",
]
QWEN2_VL = [
    "model.embed_tokens.weight",
    *stack("model.layers", 28),
    "model.norm.weight",
    "lm_head.weight",
    "visual.patch_embed.proj.weight",
    *stack("visual.blocks", 32, "attn.qkv.weight"),
    "visual.merger.ln_q.weight",
    "visual.merger.mlp.0.weight",
    "visual.merger.mlp.2.weight",
]
T5 = [
    "shared.weight",
    "encoder.embed_tokens.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    *stack("encoder.block", 6, "layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"),
    "encoder.final_layer_norm.weight",
    *stack("decoder.block", 4, "layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.q.weight"),
    "decoder.final_layer_norm.weight",
    "lm_head.weight",
]

VISION = "vision_tower.vision_model.encoder.layers"
BOTH_12 = {"text_config": {"num_hidden_layers": 12}, "vision_config": {"num_hidden_layers": 12}}
MAIN: dict[str, tuple[dict[str, int], dict[str, Any] | None]] = {
    "llama": ({"model.layers": 16}, {"num_hidden_layers": 16}),
    "no config": ({"model.layers": 16}, None),
    "gpt2": ({"h": 12}, {"n_layer": 12}),
    "gpt-neox": ({"gpt_neox.layers": 6}, {"num_hidden_layers": 6}),
    "mpt": ({"transformer.blocks": 24}, {"n_layers": 24}),
    "opt": ({"model.decoder.layers": 12}, {"num_hidden_layers": 12}),
    "mamba": ({"backbone.layers": 24}, {"n_layer": 24, "num_hidden_layers": 24}),
    "bert": ({"bert.encoder.layer": 12}, {"num_hidden_layers": 12}),
    "distilbert": ({"distilbert.transformer.layer": 6}, {"n_layers": 6}),
    "sentence-transformers": ({"0.auto_model.encoder.layer": 6}, {"num_hidden_layers": 6}),
    "wrapped": ({"pipeline.stages.0.layers": 6}, None),
    "qwen2-vl": ({"model.layers": 28, "visual.blocks": 32}, {"num_hidden_layers": 28, "vision_config": {"depth": 32}}),
    "qwen2-vl, no config": ({"model.layers": 28, "visual.blocks": 32}, None),
    "qwen2.5-vl, as now saved": (
        {"model.language_model.layers": 28, "model.visual.blocks": 32},
        {"num_hidden_layers": 28, "text_config": {"num_hidden_layers": 28}, "vision_config": {"depth": 32}},
    ),
    "gemma3": (
        {"language_model.model.layers": 34, VISION: 27},
        {"text_config": {"num_hidden_layers": 34}, "vision_config": {"num_hidden_layers": 27}},
    ),
    "llava-1.5, whose text_config has no count": (
        {"language_model.model.layers": 32, VISION: 24},
        {"text_config": {"model_type": "llama"}, "vision_config": {"num_hidden_layers": 24}},
    ),
    "llava as first published": ({"model.layers": 32, f"model.vision_tower.{VISION}": 24}, {"num_hidden_layers": 32}),
    "clip": ({"text_model.encoder.layers": 12, "vision_model.encoder.layers": 12}, BOTH_12),
    "siglip's vision part": ({"vision_model.encoder.layers": 12}, {"num_hidden_layers": 12}),
    "internvl": ({"language_model.model.layers": 24, "mlp1": 24}, {"llm_config": {"num_hidden_layers": 24}}),
    "qwen2.5-omni": (
        {"thinker.model.layers": 28, "talker.model.layers": 28, "thinker.audio_tower.layers": 32},
        {"thinker_config": {"text_config": {"num_hidden_layers": 28}}, "talker_config": {"num_hidden_layers": 28}},
    ),
    "nemotron-h": ({"backbone.layers": 3}, {"layers_block_type": ["mamba", "mlp", "attention"]}),
    "nemotron-h as first published": ({"backbone.layers": 4}, {"hybrid_override_pattern": "M-M*"}),
}
