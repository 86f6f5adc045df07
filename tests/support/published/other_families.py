"""Model families without Llama's names: encoders, GPT-NeoX, T5, and language models that also see."""

from __future__ import annotations

from typing import Any

from tests.support.models import Shape
from tests.support.models.zoo import t5
from tests.support.published.families import (
    FAMILIES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTER,
    KV_HEADS,
    Family,
    Tensors,
    decoder,
    gated,
    separate,
)

__all__ = ["FAMILIES"]


def _linear(name: str, out: int, into: int) -> Tensors:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str) -> Tensors:
    return {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}


def _bert(layers: int, rows: int) -> Tensors:
    embeddings: dict[str, Shape] = {
        "embeddings.word_embeddings.weight": (rows, HIDDEN),
        "embeddings.position_embeddings.weight": (512, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
    }
    tensors = embeddings | _norm("embeddings.LayerNorm")
    for layer in range(layers):
        block = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            tensors |= _linear(f"{block}.attention.self.{part}", HIDDEN, HIDDEN)
        tensors |= _linear(f"{block}.attention.output.dense", HIDDEN, HIDDEN)
        tensors |= _norm(f"{block}.attention.output.LayerNorm")
        tensors |= _linear(f"{block}.intermediate.dense", INTER, HIDDEN)
        tensors |= _linear(f"{block}.output.dense", HIDDEN, INTER)
        tensors |= _norm(f"{block}.output.LayerNorm")
    return tensors | _linear("pooler.dense", HIDDEN, HIDDEN)


def _neox(layers: int, rows: int) -> Tensors:
    tensors: Tensors = {"gpt_neox.embed_in.weight": (rows, HIDDEN)}
    for layer in range(layers):
        block = f"gpt_neox.layers.{layer}"
        tensors |= _norm(f"{block}.input_layernorm") | _norm(f"{block}.post_attention_layernorm")
        tensors |= _linear(f"{block}.attention.query_key_value", 3 * HIDDEN, HIDDEN)
        tensors |= _linear(f"{block}.attention.dense", HIDDEN, HIDDEN)
        tensors |= _linear(f"{block}.mlp.dense_h_to_4h", INTER, HIDDEN)
        tensors |= _linear(f"{block}.mlp.dense_4h_to_h", HIDDEN, INTER)
    return tensors | _norm("gpt_neox.final_layer_norm") | {"embed_out.weight": (rows, HIDDEN)}


def _t5(layers: int, rows: int) -> Tensors:
    """T5 v1.1, whose two sides are equally deep."""
    shapes = t5().tensors
    tensors: Tensors = {}
    for name, shape in shapes.items():
        if ".block.0." not in name and ".block.1." not in name:
            tensors[name] = (rows, shape[1]) if shape[0] == 64 else shape
            continue
        for layer in range(layers) if ".block.1." in name else (0,):
            if layer or ".block.0." in name:
                tensors[name.replace(".block.1.", f".block.{layer}.")] = shape
    return tensors


def _bitsandbytes(layers: int, rows: int) -> Tensors:
    """A tied Llama whose linear layers are stored as NF4 with double quantization."""
    tensors: Tensors = {}
    for name, shape in FAMILIES["Llama-3.2-3B"].tensors(layers, rows).items():
        tensors[name] = shape
        if name.endswith("_proj.weight"):
            elements = shape[0] * shape[1]
            tensors[name] = (elements // 2, 1)
            tensors |= {f"{name}.absmax": (elements // 64,), f"{name}.quant_map": (16,)}
            tensors |= {f"{name}.nested_absmax": (1,), f"{name}.nested_quant_map": (256,)}
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = (94,)
    return tensors


VISION = 16


def _vision_block(block: str, up: str, down: str, inter: int) -> Tensors:
    tensors = _norm(f"{block}.norm1") | _norm(f"{block}.norm2")
    tensors |= _linear(f"{block}.attn.qkv", 3 * HIDDEN, HIDDEN) | _linear(f"{block}.attn.proj", HIDDEN, HIDDEN)
    return tensors | _linear(f"{block}.mlp.{up}", inter, HIDDEN) | _linear(f"{block}.mlp.{down}", HIDDEN, inter)


def _qwen2_vl(layers: int, rows: int) -> Tensors:
    tensors: Tensors = {"visual.patch_embed.proj.weight": (HIDDEN, 3, 2, 4, 4)}
    for layer in range(32):
        tensors |= _vision_block(f"visual.blocks.{layer}", "fc1", "fc2", 4 * HIDDEN)
    tensors |= _norm("visual.merger.ln_q") | _linear("visual.merger.mlp.0", 4 * HIDDEN, 4 * HIDDEN)
    tensors |= _linear("visual.merger.mlp.2", HIDDEN, 4 * HIDDEN)
    return tensors | decoder(layers, rows, attention=lambda head_dim: separate(head_dim, bias=True))


def _qwen3_5_layer(block: str, *, full: bool) -> Tensors:
    attention: Tensors
    if full:  # the query projection also has a gate for the output
        attention = {f"self_attn.{name}": shape for name, shape in separate(HEAD_DIM, norms=True).items()}
        attention["self_attn.q_proj.weight"] = (2 * HEADS * HEAD_DIM, HIDDEN)
    else:
        attention = {
            "linear_attn.A_log": (4,),
            "linear_attn.conv1d.weight": (64, 1, 4),
            "linear_attn.dt_bias": (4,),
            "linear_attn.in_proj_a.weight": (4, HIDDEN),
            "linear_attn.in_proj_b.weight": (4, HIDDEN),
            "linear_attn.in_proj_qkv.weight": (64, HIDDEN),
            "linear_attn.in_proj_z.weight": (HIDDEN, HIDDEN),
            "linear_attn.norm.weight": (8,),
            "linear_attn.out_proj.weight": (HIDDEN, HIDDEN),
        }
    tensors = attention | {f"mlp.{name}": shape for name, shape in gated().items()}
    tensors |= {f"{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {f"{block}.{name}": shape for name, shape in tensors.items()}


def _qwen3_5(layers: int, rows: int) -> Tensors:
    """A tied Qwen3.5 with its vision tower and its layer of multi-token prediction, as published."""
    text = "model.language_model"
    tensors: Tensors = {f"{text}.embed_tokens.weight": (rows, HIDDEN)}
    for layer in range(layers):
        tensors |= _qwen3_5_layer(f"{text}.layers.{layer}", full=layer % 4 == 3)
    tensors |= {f"{text}.norm.weight": (HIDDEN,), "model.visual.pos_embed.weight": (VISION, HIDDEN)}
    tensors["model.visual.patch_embed.proj.weight"] = (HIDDEN, 3, 2, 4, 4)
    tensors["model.visual.patch_embed.proj.bias"] = (HIDDEN,)
    for layer in range(24):
        tensors |= _vision_block(f"model.visual.blocks.{layer}", "linear_fc1", "linear_fc2", INTER)
    tensors |= _norm("model.visual.merger.norm") | _linear("model.visual.merger.linear_fc1", 4 * HIDDEN, 4 * HIDDEN)
    tensors |= _linear("model.visual.merger.linear_fc2", HIDDEN, 4 * HIDDEN)
    tensors |= {f"mtp.{name}.weight": (HIDDEN,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return tensors | {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN)} | _qwen3_5_layer("mtp.layers.0", full=True)


_BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTER,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
}
_NEOX: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTER,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": HEADS,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_parallel_residual": True,
}
_QWEN2_VL = FAMILIES["Qwen2.5-7B"].config | {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "rope_scaling": {"mrope_section": [2, 1, 1], "type": "mrope"},
    "vision_config": {
        "depth": 32,
        "embed_dim": HIDDEN,
        "hidden_size": HIDDEN,
        "in_chans": 3,
        "mlp_ratio": 4,
        "model_type": "qwen2_vl",
        "num_heads": HEADS,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "spatial_patch_size": 4,
        "temporal_patch_size": 2,
    },
}
_QWEN3_5: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTER,
        "layer_types": [("full" if layer % 4 == 3 else "linear") + "_attention" for layer in range(32)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
    },
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": INTER,
        "model_type": "qwen3_5",
        "num_heads": HEADS,
        "num_position_embeddings": VISION,
        "out_hidden_size": HIDDEN,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
_T5 = {key: value for key, value in t5().config.items() if key not in ("eos_token_id", "vocab_size", "num_layers")}
_T5_KEYS = {"layer_norm_epsilon": 1e-06, "relative_attention_num_buckets": 32, "use_cache": True}

_BITSANDBYTES = FAMILIES["Llama-3.2-3B"].config | {
    "quantization_config": {
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "load_in_4bit": True,
        "quant_method": "bitsandbytes",
    }
}

FAMILIES |= {
    "Llama-3.2-3B-bnb-4bit": Family(28, _bitsandbytes, _BITSANDBYTES, "llama 3"),
    "BERT-base": Family(12, _bert, _BERT, "bert", stack="encoder.layer"),
    "BERT-base-chinese": Family(12, _bert, _BERT, "chinese bert", stack="encoder.layer"),
    "Pythia-1.4B": Family(24, _neox, _NEOX, "neox", padding=14, stack="gpt_neox.layers"),
    "T5-v1.1-base": Family(12, _t5, _T5 | _T5_KEYS, "t5", padding=6, stack="encoder.block"),
    "Qwen2-VL-7B": Family(28, _qwen2_vl, _QWEN2_VL, "qwen", padding=23),
    "Qwen3.5-4B": Family(
        32, _qwen3_5, _QWEN3_5, "qwen", padding=23, stack="model.language_model.layers", section="text_config"
    ),
}
"""All families; import `FAMILIES` from here."""
