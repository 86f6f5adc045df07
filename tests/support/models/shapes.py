"""Tables of true shapes: what the headers and config.json of published models say."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shapes: what its checkpoint's headers and config.json say.

    Args:
        tensors: shapes by name, in the order of the state dict.
        config: config.json.
        dtypes: element types by name, for the tensors that differ from the checkpoint's.
    """

    tensors: dict[str, Shape]
    config: dict[str, Any]
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many elements all tensors have."""
        return sum(prod(shape) for shape in self.tensors.values())


def llama_tensors(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool,
    head_dim: int = 0,
) -> dict[str, Shape]:
    """Shapes by name of a Llama, in the order of transformers' state dict; `head_dim` 0 is hidden / heads."""
    head_dim = head_dim or hidden // heads
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not tied:
        tensors["lm_head.weight"] = (vocabulary, hidden)
    return tensors


def llama(
    *, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> Model:
    """A Llama of these dimensions, with its config.json."""
    beginning, end = (128000, 128001) if vocabulary > 128001 else (1, 2)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": beginning,
        "eos_token_id": end,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    return Model(llama_tensors(layers, hidden, intermediate, heads, kv_heads, vocabulary, tied), config)


def tiny_llama(*, layers: int = 4, tied: bool = False, hidden: int = 32, vocabulary: int = 64) -> Model:
    """A Llama of some 50,000 parameters, that transformers can run."""
    return llama(
        layers=layers, hidden=hidden, intermediate=2 * hidden, heads=4, kv_heads=2, vocabulary=vocabulary, tied=tied
    )


def llama_3_2_1b() -> Model:
    """Llama-3.2-1B: 1,235,814,400 parameters, tied."""
    return llama(layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocabulary=128256, tied=True)


def llama_3_2_3b() -> Model:
    """Llama-3.2-3B: 3,212,749,824 parameters, tied."""
    return llama(layers=28, hidden=3072, intermediate=8192, heads=24, kv_heads=8, vocabulary=128256, tied=True)


def llama_3_8b() -> Model:
    """Llama-3-8B: 8,030,261,248 parameters."""
    return llama(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=128256)


def llama_3_70b() -> Model:
    """Llama-3-70B: 70,553,706,496 parameters."""
    return llama(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocabulary=128256)


def llama_3_1_405b() -> Model:
    """Llama-3.1-405B: 405,853,388,800 parameters."""
    return llama(layers=126, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=128256)


_DEEPSEEK_RANKS = (1536, 512, 128, 64, 128)
"""Ranks of queries and of keys and values, then head widths: without rotation, rotated, of values."""


def deepseek_v3(
    *, layers: int = 61, experts: int = 256, hidden: int = 7168, mtp: bool = True, fp8: bool = True
) -> Model:
    """DeepSeek-V3: 671B parameters in 256 experts a layer, and the 14B of its MTP layer.

    As published: FP8 weights, each with a ``weight_scale_inv`` for its blocks of 128 x 128; 91,991 tensors. The MTP
    layer is numbered as layer 61, beyond config.json's ``num_hidden_layers``. Without `fp8` all is bfloat16.
    """
    dense, heads, vocabulary = min(3, layers), hidden // 56, 129280
    q_rank, kv_rank, nope, rope, value = _DEEPSEEK_RANKS
    tensors: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}

    def linear(name: str, out: int, into: int) -> None:
        tensors[f"{name}.weight"] = (out, into)
        if fp8:
            dtypes[f"{name}.weight"] = "F8_E4M3"
            tensors[f"{name}.weight_scale_inv"] = (ceil(out / 128), ceil(into / 128))
            dtypes[f"{name}.weight_scale_inv"] = "F32"

    def mlp(name: str, intermediate: int) -> None:
        linear(f"{name}.gate_proj", intermediate, hidden)
        linear(f"{name}.up_proj", intermediate, hidden)
        linear(f"{name}.down_proj", hidden, intermediate)

    def block(layer: str, is_dense: bool) -> None:
        linear(f"{layer}.self_attn.q_a_proj", q_rank, hidden)
        tensors[f"{layer}.self_attn.q_a_layernorm.weight"] = (q_rank,)
        linear(f"{layer}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        linear(f"{layer}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        tensors[f"{layer}.self_attn.kv_a_layernorm.weight"] = (kv_rank,)
        linear(f"{layer}.self_attn.kv_b_proj", heads * (nope + value), kv_rank)
        linear(f"{layer}.self_attn.o_proj", hidden, heads * value)
        if is_dense:
            mlp(f"{layer}.mlp", 18432)
        else:
            tensors[f"{layer}.mlp.gate.weight"] = (experts, hidden)
            tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
            dtypes[f"{layer}.mlp.gate.e_score_correction_bias"] = "F32"
            for expert in range(experts):
                mlp(f"{layer}.mlp.experts.{expert}", 2048)
            mlp(f"{layer}.mlp.shared_experts", 2048)
        tensors[f"{layer}.input_layernorm.weight"] = (hidden,)
        tensors[f"{layer}.post_attention_layernorm.weight"] = (hidden,)

    tensors["model.embed_tokens.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        block(f"model.layers.{layer}", layer < dense)
    tensors["model.norm.weight"] = (hidden,)
    tensors["lm_head.weight"] = (vocabulary, hidden)
    if mtp:
        extra = f"model.layers.{layers}"
        before, after = _mtp_tensors(extra, hidden, vocabulary)
        tensors |= before
        block(extra, is_dense=False)
        tensors |= after

    config = _deepseek_config(layers=layers, experts=experts, hidden=hidden, mtp=mtp, fp8=fp8)
    return Model(tensors, config, dtypes)


def _mtp_tensors(layer: str, hidden: int, vocabulary: int) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The tensors of DeepSeek-V3's MTP layer before and after its transformer block, in the published order."""
    before: dict[str, Shape] = {
        f"{layer}.embed_tokens.weight": (vocabulary, hidden),
        f"{layer}.enorm.weight": (hidden,),
        f"{layer}.hnorm.weight": (hidden,),
        f"{layer}.eh_proj.weight": (hidden, 2 * hidden),
    }
    after: dict[str, Shape] = {
        f"{layer}.shared_head.norm.weight": (hidden,),
        f"{layer}.shared_head.head.weight": (vocabulary, hidden),
    }
    return before, after


def _deepseek_config(*, layers: int, experts: int, hidden: int, mtp: bool, fp8: bool) -> dict[str, Any]:
    """The config.json of `deepseek_v3`."""
    q_rank, kv_rank, nope, rope, value = _DEEPSEEK_RANKS
    dense, heads, vocabulary = min(3, layers), hidden // 56, 129280
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": dense,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 18432,
        "kv_lora_rank": kv_rank,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_attention_heads": heads,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_nextn_predict_layers": int(mtp),
        "q_lora_rank": q_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "v_head_dim": value,
        "vocab_size": vocabulary,
    }
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    return config


def qwen3_moe(
    *, layers: int, experts: int, hidden: int = 2048, intermediate: int = 768, vocabulary: int = 151936
) -> Model:
    """A Qwen3 mixture of experts, in bfloat16: 9 tensors for each layer and 3 for each of its experts, and 3 outside.

    Args:
        layers: number of layers.
        experts: number of experts in each layer.
        hidden: width of the residual stream, a multiple of 64.
        intermediate: width of an expert.
        vocabulary: number of tokens.
    """
    head_dim, heads, kv_heads = 128, max(1, hidden // 64), 4
    block: dict[str, Shape] = {
        "self_attn.q_proj.weight": (heads * head_dim, hidden),
        "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, heads * head_dim),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate.weight": (experts, hidden),
    }
    for expert in range(experts):
        block[f"mlp.experts.{expert}.gate_proj.weight"] = (intermediate, hidden)
        block[f"mlp.experts.{expert}.up_proj.weight"] = (intermediate, hidden)
        block[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, intermediate)
    block["input_layernorm.weight"] = (hidden,)
    block["post_attention_layernorm.weight"] = (hidden,)
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    tensors["model.norm.weight"] = (hidden,)
    tensors["lm_head.weight"] = (vocabulary, hidden)
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }
    return Model(tensors, config)
