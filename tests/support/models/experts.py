"""Models with experts in both layouts: transformers writes them, and torch converts where it writes only one layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers with experts.

    Args:
        class_name: the class of the model.
        config_name: the class of its configuration.
        sizes: names of the configuration for the experts, their rows and the hidden size.
        module: module of the fused experts in a layer.
        writes_both: whether transformers writes separate experts, too; torch separates them otherwise.
    """

    class_name: str
    config_name: str
    sizes: tuple[str, str, str]
    module: str
    writes_both: bool = False


ARCHITECTURES = {
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        ("num_local_experts", "intermediate_size", "hidden_size"),
        "mlp.experts",
        writes_both=True,
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        ("num_experts", "moe_intermediate_size", "hidden_size"),
        "mlp.experts",
        writes_both=True,
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        ("num_local_experts", "intermediate_size", "hidden_size"),
        "mlp.experts",
    ),
    "llama4_text": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        ("num_local_experts", "intermediate_size", "hidden_size"),
        "feed_forward.experts",
    ),
}

COMMON = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "num_experts_per_tok": 2,
    "intermediate_size_mlp": 24,
    "interleave_moe_layer_step": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model: experts, rows of one expert, hidden size."""

    experts: int = 4
    rows: int = 12
    hidden: int = 16


def write_both(model_type: str, directory: Path, seed: int, sizes: Sizes = Sizes(), **more: Any) -> tuple[Path, Path]:
    """Write a model with random values in both layouts; return the fused and the separate one."""
    import transformers

    kind = ARCHITECTURES[model_type]
    named = dict(zip(kind.sizes, (sizes.experts, sizes.rows, sizes.hidden), strict=True))
    config_class = getattr(transformers, kind.config_name)
    config = config_class(**COMMON | named | more)
    torch.manual_seed(seed)
    model = getattr(transformers, kind.class_name)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    fused, separate = directory / f"fused{seed}", directory / f"separate{seed}"
    model.to(torch.bfloat16).save_pretrained(fused, save_original_format=False)
    if kind.writes_both:
        model.save_pretrained(separate)
    else:
        rewrite(fused, separate, lambda tensors: separated(tensors, model_type))
    return fused, separate


def read_all(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a model."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def rewrite(source: Path, target: Path, change: Any) -> Path:
    """Write a model with changed tensors and the other files of another one."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    tensors = {name: tensor.contiguous().clone() for name, tensor in change(read_all(source)).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def set_config(model: Path, **values: Any) -> None:
    """Change keys of a model's config.json; None removes a key."""
    config = json.loads((model / "config.json").read_text()) | values
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def separated(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Convert fused experts to separate ones with torch, as the modules of the architecture use them."""
    module = ARCHITECTURES[model_type].module
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, found, rest = name.partition(f"{module}.")
        if not found:
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            prefix = f"{owner}{module}.{expert}."
            if rest == "down_proj":  # [I, H] is multiplied from the left
                result[f"{prefix}down_proj.weight"] = matrix.T
            elif rest == "down_proj_bias":
                result[f"{prefix}down_proj.bias"] = matrix
            elif model_type == "gpt_oss":
                ending = "bias" if rest.endswith("bias") else "weight"
                result[f"{prefix}gate_proj.{ending}"] = matrix[..., ::2].T if matrix.dim() > 1 else matrix[::2]
                result[f"{prefix}up_proj.{ending}"] = matrix[..., 1::2].T if matrix.dim() > 1 else matrix[1::2]
            else:
                gate, up = matrix.chunk(2, dim=-1)
                result[f"{prefix}gate_proj.weight"], result[f"{prefix}up_proj.weight"] = gate.T, up.T
    return result
