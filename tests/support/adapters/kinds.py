"""Adapters of many kinds, made by PEFT on small models of transformers, and what PEFT makes of them in float64."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.outputs import read_model

HIDDEN, WIDE, VOCABULARY = 16, 24, 40


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Args:
        model: key of `MODELS`.
        config: arguments of peft's `LoraConfig`.
    """

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)


ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, Kind] = {
    "linear layers": Kind("llama", {"target_modules": "all-linear"}),
    "ranks and alphas by pattern": Kind(
        "llama",
        {
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
            "alpha_pattern": {"v_proj": 3, r"layers\.0\..*": 5},
        },
    ),
    "rank-stabilized": Kind("qwen", {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 7}),
    "DoRA": Kind("llama", {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "DoRA of Conv1D": Kind("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "DoRA of an embedding": Kind("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding and head": Kind("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embedding": Kind("qwen", {"target_modules": ["embed_tokens"]}),
    "all biases": Kind("qwen", {"target_modules": ATTENTION, "bias": "all"}),
    "biases of adapted modules": Kind("qwen", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "LoRA bias": Kind("qwen", {"target_modules": ATTENTION, "lora_bias": True}),
    "trained norms": Kind("llama", {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "norm"]}),
    "trained head and embedding of a tied model": Kind(
        "tied llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]}
    ),
    "trained tokens": Kind("llama", {"target_modules": ATTENTION, "trainable_token_indices": [1, 5, 39]}),
    "trained tokens of a tied model": Kind("qwen", {"target_modules": ATTENTION, "trainable_token_indices": [0, 7]}),
    "Conv1D": Kind("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "Conv1D and a linear head": Kind("gpt2", {"target_modules": ["c_proj", "wte"]}),
    "fused experts of Mixtral": Kind("mixtral", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "one parameter of the experts": Kind("mixtral", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "fused experts of Qwen": Kind("qwen3 moe", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "fused experts of gpt-oss": Kind("gpt-oss", {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
}


def _llama(*, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes(), tie_word_embeddings=tied))


def _qwen() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_sizes(), tie_word_embeddings=True))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=8)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_sizes(), num_local_experts=4))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = _sizes() | {"moe_intermediate_size": HIDDEN // 2, "num_experts": 3, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))  # 2I == H: shapes say nothing of the orientation


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = _sizes() | {"num_local_experts": 3, "head_dim": 8, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes))


def _sizes() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
    }


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(tied=False),
    "tied llama": lambda: _llama(tied=True),
    "qwen": _qwen,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "qwen3 moe": _qwen3_moe,
    "gpt-oss": _gpt_oss,
}


def write_kind(kind: Kind, directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write a base in bfloat16, and an adapter whose tensors are all random; return both directories."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base, adapter = directory / "base", directory / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[kind.model]()
        model.to(torch.bfloat16).save_pretrained(base)
        get_peft_model(model, LoraConfig(**({"r": 4} | dict(kind.config)))).save_pretrained(adapter)
    randomize(adapter, seed)
    return base, adapter


def randomize(adapter: Path, seed: int) -> None:
    """Replace the values of an adapter, of which PEFT makes half zeros. Magnitudes stay near the lengths of rows."""
    generator = torch.Generator().manual_seed(seed)
    file = adapter / "adapter_model.safetensors"
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        noise = torch.randn(tensor.shape, generator=generator) / 8
        found[name] = (tensor.float() * (1.5 + noise) if "magnitude" in name else noise).to(torch.float32)
    save_file(found, file)


def merged_by_peft(base: Path, adapter: Path, out: Path) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Merge with PEFT in float64; return the tensors, and what transformers reports when it loads the result."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        adapted = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
        adapted.merge_and_unload().save_pretrained(out)
    return read_model(out), load_report(out)


def load_report(model: Path) -> dict[str, list[str]]:
    """What transformers reports when it loads a model: missing, unexpected and mismatched keys, sorted."""
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    return {key: sorted(map(str, value)) for key, value in report.items() if value}


def is_tied(model: Path) -> bool:
    """Whether config.json ties the head to the embedding."""
    found: bool = json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    return found
