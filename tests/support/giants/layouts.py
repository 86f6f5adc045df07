"""The layouts: class of transformers, format of each weight, and description in config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support.models import quantized
from tests.support.models.quantized import Quantize, Quantized

BLOCK = 16
"""Rows and columns of an FP8 block; in the giants 128."""
LAYERS = 3
_SIZES = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = _SIZES | _EXPERTS | _MLA | {"intermediate_size": 48, "n_group": 1, "topk_group": 1}
_DEEPSEEK |= {"num_key_value_heads": 4, "first_k_dense_replace": 1}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Giant:
    """A layout.

    Args:
        class_name: class of transformers.
        settings: settings of its configuration.
        section: ``quantization_config``.
        formats: regular expressions for the names of weights, each with the format that they are stored in.
        more: further keys of config.json.
        prediction: prefix of a prediction layer (MTP), ``N`` for the number of layers; empty without one.
        written: value of ``out_dtype`` that stores an output like the giant; None if its format is not written.
        loads: whether transformers loads the format without a GPU.
        misread: regular expression for the weights that transformers 5.23 decodes with blocks of another size: it
            divides the rows by the number of scales, which is wrong if the last block is partial.
        vision: settings of the vision encoder, of a model that has one.
    """

    class_name: str
    settings: Mapping[str, Any]
    section: Mapping[str, Any]
    formats: Mapping[str, Quantize]
    more: Mapping[str, Any] = field(default_factory=dict)
    prediction: str = ""
    written: Any = "same"
    loads: bool = True
    misread: str = r"^$"
    vision: Mapping[str, Any] | None = None

    def quantize(self, name: str, weight: Tensor) -> Quantized | None:
        """Store a weight in the layout's format for it; None if it is not quantized."""
        for pattern, quantize in self.formats.items():
            if re.search(pattern, name):
                return quantize(weight.float())
        return None


def fp8_blocks(scale: Callable[[Tensor], Tensor] = lambda each: each, ending: str = "weight_scale_inv") -> Quantize:
    """FP8 with partial blocks at the edges."""

    def quantize(weight: Tensor) -> Quantized:
        codes, stored, value = quantized.blocks(weight, BLOCK, BLOCK, scale)
        return Quantized({"weight": codes, ending: stored}, value)

    return quantize


def gpt_oss_blocks(weight: Tensor) -> Quantized:
    """MXFP4 of the transposed matrices of a stack of experts, by compressed-tensors, in gpt-oss's shape."""
    found = [_MXFP4(matrix.T.contiguous()) for matrix in weight]
    codes = torch.stack([each.stored["weight_packed"] for each in found])
    scales = torch.stack([each.stored["weight_scale"] for each in found])
    value = torch.stack([each.value.T for each in found]).contiguous()
    return Quantized({"_blocks": codes.view(*scales.shape, 16), "_scales": scales}, value)


def deepseek_fp4(weight: Tensor) -> Quantized:
    """MXFP4 in I8, with powers of two in ``scale``."""
    found = _MXFP4(weight)
    scales = found.stored["weight_scale"].view(torch.float8_e8m0fnu)
    return Quantized({"weight": found.stored["weight_packed"].view(torch.int8), "scale": scales}, found.value)


def llama_rows(weight: Tensor) -> Quantized:
    """FP8 with a scale for each row, and the upper bound of the scales of activations."""
    return quantized.fp8_rows(weight)


def fp8_channels(weight: Tensor) -> Quantized:
    """FP8 with a scale for each row: compressed-tensors' ``float-quantized``."""
    codes, scale, value = quantized.blocks(weight, 1, weight.shape[1], lambda each: each.to(torch.bfloat16))
    return Quantized({"weight": codes, "weight_scale": scale}, value)


_MXFP4 = quantized.compressed("mxfp4-pack-quantized", quantized.FLOAT4 | {"group_size": 32})
_INT4 = quantized.INT4 | {"group_size": 32}
_FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
_CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
_LINEARS = r"(?:self_attn\.(?!indexer\.weights)[\w.]*|mlp\.(?:.*\.)?(?:gate|up|down))_proj(?:_with_mqa)?\.weight$"
_DSA = rf"{_LINEARS}|indexer\.(?:wq_b|wk)\.weight$"

GIANTS: dict[str, Giant] = {
    "DeepSeek-V3": Giant(
        "DeepseekV3ForCausalLM",
        _DEEPSEEK,
        _FP8 | {"fmt": "e4m3"},
        {_LINEARS: fp8_blocks()},
        {"num_nextn_predict_layers": 1},
        "model.layers.N",
        misread="kv_a_proj_with_mqa",
    ),
    "DeepSeek-V4": Giant(
        "DeepseekV4ForCausalLM",
        _SIZES
        | _EXPERTS
        | {"head_dim": 32, "qk_rope_head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16, "hc_mult": 2}
        | {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 4, "sliding_window": 4}
        | {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
        _FP8 | {"fmt": "e4m3", "scale_fmt": "ue8m0"},
        {
            r"experts\.\d+\.w[123]\.weight$": deepseek_fp4,
            r"(?:attn\.(?:w[qo]_[ab]|wkv)|shared_experts\.w[123]|indexer\.wq_b)\.weight$": fp8_blocks(
                quantized.powers_of_two, "scale"
            ),
        },
        {"expert_dtype": "fp4", "num_nextn_predict_layers": 1},
        "mtp.0",
        [{"filter": "ffn.experts", "value": "bfloat16"}, {"value": "same"}],
    ),
    "GLM-4.5": Giant(
        "Glm4MoeForCausalLM",
        _SIZES | _EXPERTS | _GROUPED | {"intermediate_size": 48, "n_group": 1, "topk_group": 1},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CHANNEL, "input_activations": _TOKEN}},
            "ignore": ["lm_head", r"re:.*mlp\.gate$", r"re:.*eh_proj$"],
        },
        {_LINEARS: fp8_channels},
        {"num_nextn_predict_layers": 1},
        "model.layers.N",
    ),
    "GLM-5": Giant(
        "GlmMoeDsaForCausalLM",
        _DEEPSEEK
        | {"kv_lora_rank": 24, "index_head_dim": 16, "index_n_heads": 4, "index_topk": 4, "head_dim": 8}
        | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
        _FP8 | {"fmt": "e4m3", "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn.indexer.weights_proj"]},
        {_DSA: fp8_blocks()},
        {"num_nextn_predict_layers": 1},
        "model.layers.N",
        misread="kv_a_proj_with_mqa|kv_b_proj",
    ),
    "MiniMax-M2": Giant(
        "MiniMaxM2ForCausalLM",
        _SIZES | _GROUPED | {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
        _FP8 | {"fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
        {r"self_attn\.\w_proj\.weight$|experts\.\d+\.w[123]\.weight$": fp8_blocks()},
    ),
    "gpt-oss": Giant(
        "GptOssForCausalLM",
        _SIZES | _GROUPED | {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"),
            ],
        },
        {r"experts\.(?:gate_up|down)_proj$": gpt_oss_blocks},
        written=None,
    ),
    "Kimi-K2.5": Giant(
        "Kimi_K25ForConditionalGeneration",
        _DEEPSEEK | {"num_nextn_predict_layers": 0},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(_INT4)}},
            "ignore": [
                *("re:.*lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mm_projector.*"),
                *(r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:.*vision_tower.*"),
            ],
        },
        {r"experts\.\d+\.\w+_proj\.weight$": quantized.compressed("pack-quantized", _INT4)},
        written=None,
        vision={"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
                "patch_size": 2, "pos_emb_height": 4, "pos_emb_width": 4},
    ),
    "Llama-3.1-405B-FP8": Giant(
        "LlamaForCausalLM",
        _SIZES | _GROUPED | {"intermediate_size": 48},
        {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": [
                *(f"model.layers.{layer}.mlp.{each}_proj" for layer in (0, 2) for each in ("gate", "up", "down")),
                *(f"model.layers.{layer}.self_attn.{each}_proj" for layer in range(LAYERS) for each in "qkvo"),
                "lm_head",
            ],
        },
        {r"layers\.1\.mlp\.\w+_proj\.weight$": llama_rows},
        loads=False,  # needs a GPU
    ),
}  # fmt: skip
