"""Names of the tensors of public diffusion checkpoints, at small shapes, and of adapters for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Arrays = dict[str, npt.NDArray[np.generic]]

_BLOCK = {
    "in_layers.0.weight": (8,),
    "in_layers.0.bias": (8,),
    "in_layers.2.weight": (8, 8, 3, 3),
    "in_layers.2.bias": (8,),
    "emb_layers.1.weight": (8, 16),
    "out_layers.3.weight": (8, 8, 3, 3),
}
_ATTENTION = {
    "norm.weight": (8,),
    "proj_in.weight": (8, 8),
    "transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "transformer_blocks.0.attn1.to_k.weight": (8, 8),
    "transformer_blocks.0.attn2.to_v.weight": (8, 12),
    "transformer_blocks.0.ff.net.0.proj.weight": (64, 8),
    "proj_out.weight": (8, 8),
}
UNET = {
    "time_embed.0.weight": (16, 8),
    "time_embed.0.bias": (16,),
    "input_blocks.0.0.weight": (8, 4, 3, 3),
    "input_blocks.0.0.bias": (8,),
    **{f"input_blocks.{n}.0.{name}": shape for n in (1, 2) for name, shape in _BLOCK.items()},
    **{f"input_blocks.{n}.1.{name}": shape for n in (1, 2) for name, shape in _ATTENTION.items()},
    "input_blocks.3.0.op.weight": (8, 8, 3, 3),
    **{f"middle_block.0.{name}": shape for name, shape in _BLOCK.items()},
    **{f"output_blocks.0.0.{name}": shape for name, shape in _BLOCK.items()},
    "out.0.weight": (8,),
    "out.2.weight": (4, 8, 3, 3),
}
"""A UNet with the original names."""
VAE = {
    "encoder.conv_in.weight": (8, 3, 3, 3),
    "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
    "encoder.mid.attn_1.q.weight": (8, 8, 1, 1),
    "decoder.conv_in.weight": (8, 4, 3, 3),
    "decoder.up.0.block.0.conv1.weight": (8, 8, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.weight": (4, 4, 1, 1),
}
_CLIP_LAYER = {"self_attn.q_proj.weight": (8, 8), "self_attn.q_proj.bias": (8,), "mlp.fc1.weight": (32, 8)}
CLIP = {
    "embeddings.token_embedding.weight": (32, 8),
    "embeddings.position_embedding.weight": (11, 8),
    **{f"encoder.layers.{n}.{name}": shape for n in range(12) for name, shape in _CLIP_LAYER.items()},
    "final_layer_norm.weight": (8,),
}
OPEN_CLIP = {
    "token_embedding.weight": (32, 12),
    "positional_embedding": (11, 12),
    **{f"transformer.resblocks.{n}.attn.in_proj_weight": (36, 12) for n in range(3)},
    "ln_final.weight": (12,),
    "text_projection": (12, 12),
    "logit_scale": (),
}
FLUX = {
    "img_in.weight": (16, 4),
    "txt_in.weight": (16, 8),
    "time_in.in_layer.weight": (16, 8),
    "guidance_in.in_layer.weight": (16, 8),
    **{f"double_blocks.{n}.img_attn.qkv.weight": (48, 16) for n in range(4)},
    **{f"double_blocks.{n}.txt_mod.lin.bias": (96,) for n in range(4)},
    **{f"single_blocks.{n}.linear1.weight": (112, 16) for n in range(7)},
    "final_layer.linear.weight": (4, 16),
}
DIFFUSERS_UNET = {
    "conv_in.weight": (8, 4, 3, 3),
    "time_embedding.linear_1.weight": (16, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
    "mid_block.resnets.0.conv1.weight": (8, 8, 3, 3),
    "up_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
    "conv_out.weight": (4, 8, 3, 3),
}
KOHYA = {
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha": (),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 8),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": (8, 4),
    "lora_unet_input_blocks_1_1_proj_in.alpha": (),
    "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": (4, 8, 1, 1),
    "lora_unet_input_blocks_1_1_proj_in.lora_up.weight": (8, 4, 1, 1),
    "lora_unet_input_blocks_2_1_proj_in.alpha": (),
    "lora_unet_input_blocks_2_1_proj_in.lora_down.weight": (4, 8, 1, 1),
    "lora_unet_input_blocks_2_1_proj_in.lora_up.weight": (8, 4, 1, 1),
}
"""A LoRA of kohya's sd-scripts."""


def prefixed(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes under names with a prefix."""
    return {prefix + name: shape for name, shape in shapes.items()}


def values(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str = "float16") -> Arrays:
    """Random values of these shapes."""
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def sd15(seed: int, *, channels: int = 4, ema: bool = False, vae: bool = True, dtype: str = "float16") -> Arrays:
    """A checkpoint of Stable Diffusion 1.5: UNet, text encoder, VAE, noise schedule and perhaps an EMA copy."""
    unet = UNET | {"input_blocks.0.0.weight": (8, channels, 3, 3)}
    shapes = prefixed("model.diffusion_model.", unet)
    shapes |= prefixed("cond_stage_model.transformer.text_model.", CLIP)
    shapes |= prefixed("first_stage_model.", VAE) if vae else {}
    shapes |= {"model_ema." + f"diffusion_model.{name}".replace(".", ""): unet[name] for name in unet} if ema else {}
    found = values(shapes, seed, dtype)
    positions = np.arange(11, dtype=np.int64).reshape(1, 11)
    found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 20) ** 2
    found["betas"] = betas.astype(np.float32)
    found["alphas_cumprod"] = np.cumprod(1 - betas).astype(np.float32)
    found["sqrt_one_minus_alphas_cumprod"] = np.sqrt(1 - np.cumprod(1 - betas)).astype(np.float32)
    if ema:
        found["model_ema.decay"] = np.array(0.9999, np.float32)
        found["model_ema.num_updates"] = np.array(1000 + seed, np.int32)
    return found


def sdxl(seed: int) -> Arrays:
    """A checkpoint of SDXL: UNet, two text encoders and a VAE."""
    shapes = prefixed("model.diffusion_model.", UNET | {"label_emb.0.0.weight": (16, 24)})
    shapes |= prefixed("conditioner.embedders.0.transformer.text_model.", CLIP)
    shapes |= prefixed("conditioner.embedders.1.model.", OPEN_CLIP)
    shapes |= prefixed("first_stage_model.", VAE)
    return values(shapes, seed)


def write_file(file: Path, tensors: Mapping[str, npt.NDArray[np.generic]], **metadata: str) -> Path:
    """Write a file with the safetensors library, and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file, metadata or None)
    return file
