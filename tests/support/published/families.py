"""Model families of published recipes: real tensor names, numbers of layers and keys of config.json, small widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.models import Model, Shape
from tests.support.published.vocabularies import Vocabulary, vocabulary

Tensors = dict[str, Shape]

HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 4, 2, 8


@dataclass(frozen=True)
class Family:
    """A model family at a small width.

    Args:
        layers: number of layers, as published.
        tensors: function from the number of layers and of embedding rows to the shapes by name.
        config: config.json without the keys that `model` sets.
        kind: kind of vocabulary.
        padding: embedding rows without a token.
        missing: tokens without a row, at the end of the vocabulary.
        stack: prefix of the layers' names.
        section: key of config.json that holds the language model's config, or empty.
    """

    layers: int
    tensors: Callable[[int, int], Tensors]
    config: dict[str, Any]
    kind: str
    padding: int = 0
    missing: int = 0
    stack: str = "model.layers"
    section: str = ""

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer."""
        return vocabulary(self.kind)

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return self.vocabulary.size + self.padding - self.missing

    def model(self, layers: int | None = None) -> Model:
        """Shapes and config.json, with another number of layers if given."""
        count = layers or self.layers
        facts: dict[str, Any] = {"num_layers" if "num_decoder_layers" in self.config else "num_hidden_layers": count}
        facts["vocab_size"] = self.rows
        config = self.config | {"torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
        if "num_decoder_layers" in config:
            config["num_decoder_layers"] = count
        section = config | facts if not self.section else config[self.section] | facts
        ids = {f"{role}_id": self.vocabulary.id_of(role) for role in ("bos_token", "eos_token")}
        section |= {key: row for key, row in ids.items() if row is not None}
        for key in ("layer_types", "max_window_layers"):  # as long as the model is deep
            if key in section:
                section[key] = section[key][:count] if key == "layer_types" else count
        config = section if not self.section else config | {self.section: section}
        return Model(self.tensors(count, self.rows), config)


def decoder(
    layers: int,
    rows: int,
    *,
    head_dim: int = HEAD_DIM,
    tied: bool = False,
    attention: Callable[[int], Tensors] | None = None,
    mlp: Callable[[], Tensors] | None = None,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    norm_bias: bool = False,
) -> Tensors:
    """Shapes by name of a decoder-only model with Llama's names.

    Args:
        layers: number of layers.
        rows: rows of the embedding.
        head_dim: width of a head.
        tied: whether the head is not stored.
        attention: function from the width of a head to the tensors of the attention; None for Llama's.
        mlp: function that returns the tensors of the MLP; None for Llama's.
        norms: names of a layer's norms.
        norm_bias: whether norms have biases.
    """
    ends = ("weight", "bias") if norm_bias else ("weight",)
    block: Tensors = {f"self_attn.{name}": shape for name, shape in (attention or separate)(head_dim).items()}
    block |= {f"mlp.{name}": shape for name, shape in (mlp or gated)().items()}
    block |= {f"{norm}.{end}": (HIDDEN,) for norm in norms for end in ends}
    tensors: Tensors = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    tensors |= {f"model.norm.{end}": (HIDDEN,) for end in ends}
    return tensors if tied else tensors | {"lm_head.weight": (rows, HIDDEN)}


def separate(head_dim: int, kv_heads: int = KV_HEADS, *, bias: bool = False, norms: bool = False) -> Tensors:
    """The tensors of an attention with separate projections."""
    widths = {"q": HEADS * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    tensors: Tensors = {f"{part}_proj.weight": (width, HIDDEN) for part, width in widths.items()}
    tensors |= {f"{part}_proj.bias": (width,) for part, width in widths.items() if bias}
    tensors |= {f"{part}_norm.weight": (head_dim,) for part in "qk" if norms}
    return tensors | {"o_proj.weight": (HIDDEN, HEADS * head_dim)}


def gated(inter: int = INTER) -> Tensors:
    """The tensors of a gated MLP."""
    up: Shape = (inter, HIDDEN)
    return {"gate_proj.weight": up, "up_proj.weight": up, "down_proj.weight": (HIDDEN, inter)}


def _all_heads(head_dim: int) -> Tensors:
    return separate(head_dim, HEADS)


def _biased(head_dim: int) -> Tensors:
    return separate(head_dim, bias=True)


def _normed(head_dim: int) -> Tensors:
    return separate(head_dim, norms=True)


def _fused(head_dim: int) -> Tensors:
    return {
        "qkv_proj.weight": ((HEADS + 2 * HEADS) * head_dim, HIDDEN),
        "o_proj.weight": (HIDDEN, HEADS * head_dim),
    }


def _fused_mlp() -> Tensors:
    return {"gate_up_proj.weight": (2 * INTER, HIDDEN), "down_proj.weight": (HIDDEN, INTER)}


def _experts() -> Tensors:
    """Qwen3-MoE's experts, as published: one by one."""
    tensors: Tensors = {"gate.weight": (8, HIDDEN)}
    for expert in range(8):
        tensors |= {f"experts.{expert}.{name}": shape for name, shape in gated(16).items()}
    return tensors


def _mixtral(layers: int, rows: int) -> Tensors:
    tensors = {name: shape for name, shape in decoder(layers, rows).items() if ".mlp." not in name}
    for layer in range(layers):
        moe = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = (8, HIDDEN)
        for expert in range(8):
            tensors |= {f"{moe}.experts.{expert}.{name}.weight": (INTER, HIDDEN) for name in ("w1", "w3")}
            tensors[f"{moe}.experts.{expert}.w2.weight"] = (HIDDEN, INTER)
    return tensors


_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _config(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTER,
        "model_type": model_type,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
        "use_cache": True,
    } | more


_LLAMA = _config("LlamaForCausalLM", "llama", pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None)
_LLAMA_2 = _LLAMA | {"max_position_embeddings": 4096, "num_key_value_heads": HEADS}
_LLAMA_3 = _LLAMA | {"attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 8192}
_LLAMA_3 |= {"rope_theta": 500000.0}
_ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
_LLAMA_3_1 = _LLAMA_3 | {
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": _ROPE | {"rope_type": "llama3"},
}
_MISTRAL = _config("MistralForCausalLM", "mistral", max_position_embeddings=32768, rms_norm_eps=1e-05)
_MISTRAL |= {"rope_theta": 10000.0, "sliding_window": 4096}
_QWEN = {"attention_dropout": 0.0, "max_position_embeddings": 32768, "max_window_layers": 48, "rms_norm_eps": 1e-06}
_QWEN |= {"rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False}
_GEMMA = {
    "attention_bias": False,
    "head_dim": HEAD_DIM,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-06,
}
_GEMMA |= {"query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 10000.0, "pad_token_id": 0}


def _llama_2(layers: int, rows: int) -> Tensors:
    return decoder(layers, rows, attention=_all_heads)


def _tied(layers: int, rows: int) -> Tensors:
    return decoder(layers, rows, tied=True)


FAMILIES: dict[str, Family] = {
    "Llama-2-7B": Family(32, _llama_2, _LLAMA_2, "llama 2"),
    "Llama-2-13B": Family(40, _llama_2, _LLAMA_2, "llama 2"),
    "Sheared-Llama-2.7B": Family(32, _llama_2, _LLAMA_2, "llama 2"),
    "Llama-160M": Family(12, _llama_2, _LLAMA_2 | {"max_position_embeddings": 2048}, "llama 2"),
    "Yi-34B": Family(60, decoder, _LLAMA | {"max_position_embeddings": 4096, "rope_theta": 5000000.0}, "yi", missing=2),
    "Llama-3-8B": Family(32, decoder, _LLAMA_3, "llama 3"),
    "Llama-3.1-8B": Family(32, decoder, _LLAMA_3_1, "llama 3"),
    "Llama-3.1-70B": Family(80, decoder, _LLAMA_3_1, "llama 3"),
    "Llama-3.2-1B": Family(16, _tied, _LLAMA_3_1 | {"head_dim": HEAD_DIM, "tie_word_embeddings": True}, "llama 3"),
    "Llama-3.2-3B": Family(28, _tied, _LLAMA_3_1 | {"head_dim": HEAD_DIM, "tie_word_embeddings": True}, "llama 3"),
    "Mistral-7B": Family(32, decoder, _MISTRAL, "llama 2"),
    "Mistral-Nemo": Family(
        40,
        lambda layers, rows: decoder(layers, rows, head_dim=16),
        _MISTRAL | {"head_dim": 16, "max_position_embeddings": 131072, "rope_theta": 1000000.0, "sliding_window": None},
        "nemo",
    ),
    "Mixtral-8x7B": Family(
        32,
        _mixtral,
        _MISTRAL
        | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2}
        | {"num_local_experts": 8, "output_router_logits": False, "router_aux_loss_coef": 0.02, "rope_theta": 1000000.0}
        | {"sliding_window": None},
        "llama 2",
    ),
    "Qwen2.5-7B": Family(
        28,
        lambda layers, rows: decoder(layers, rows, attention=_biased),
        _config("Qwen2ForCausalLM", "qwen2", **_QWEN),
        "qwen",
        padding=23,
    ),
    "Qwen2.5-14B": Family(
        48,
        lambda layers, rows: decoder(layers, rows, attention=_biased),
        _config("Qwen2ForCausalLM", "qwen2", **_QWEN),
        "qwen",
        padding=23,
    ),
    "Qwen3-4B": Family(
        36,
        lambda layers, rows: decoder(layers, rows, attention=_normed, tied=True),
        _config("Qwen3ForCausalLM", "qwen3", **_QWEN)
        | {"attention_bias": False, "head_dim": HEAD_DIM, "tie_word_embeddings": True, "sliding_window": None},
        "qwen",
        padding=23,
    ),
    "Qwen3-30B-A3B": Family(
        48,
        lambda layers, rows: decoder(layers, rows, attention=_normed, mlp=_experts),
        _config("Qwen3MoeForCausalLM", "qwen3_moe", **_QWEN)
        | {"attention_bias": False, "decoder_sparse_step": 1, "head_dim": HEAD_DIM, "mlp_only_layers": []}
        | {"moe_intermediate_size": 16, "norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 4}
        | {"output_router_logits": False, "router_aux_loss_coef": 0.001, "sliding_window": None},
        "qwen",
        padding=23,
    ),
    "Gemma-2-9B": Family(
        42,
        lambda layers, rows: decoder(layers, rows, tied=True, norms=_GEMMA_NORMS),
        _config("Gemma2ForCausalLM", "gemma2", **_GEMMA)
        | {"attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0}
        | {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True},
        "gemma",
    ),
    "Gemma-3-1B": Family(
        26,
        lambda layers, rows: decoder(layers, rows, tied=True, norms=_GEMMA_NORMS, attention=_normed),
        _config("Gemma3ForCausalLM", "gemma3_text", **_GEMMA)
        | {"max_position_embeddings": 32768, "rope_local_base_freq": 10000, "rope_scaling": None}
        | {"rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "tie_word_embeddings": True},
        "gemma",
    ),
    "Phi-3-mini": Family(
        32,
        lambda layers, rows: decoder(layers, rows, attention=_fused, mlp=_fused_mlp),
        _config("Phi3ForCausalLM", "phi3", num_key_value_heads=HEADS, rms_norm_eps=1e-05, rope_theta=10000.0)
        | {"attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0, "max_position_embeddings": 4096}
        | {"original_max_position_embeddings": 4096, "pad_token_id": 3, "resid_pdrop": 0.0, "rope_scaling": None}
        | {"sliding_window": 2047},
        "phi 3",
    ),
    "StableLM-3B": Family(
        32,
        lambda layers, rows: decoder(layers, rows, attention=_all_heads, norm_bias=True),
        _config("StableLmForCausalLM", "stablelm", num_key_value_heads=HEADS, layer_norm_eps=1e-05)
        | {"attention_dropout": 0.0, "hidden_dropout": 0.0, "max_position_embeddings": 4096}
        | {"partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_theta": 10000, "use_qkv_bias": False},
        "neox",
    ),
}
"""By name. The keys of config.json are those of the published models; widths, ids and vocabularies are small."""
