"""The models that mergekit's configurations and the golden merges name, written into one directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.support import models
from tests.support.outputs import read_model

TEMPLATES = {"a": "{{ 'A' }}", "b": "{{ 'B' }}", "base": "{{ 'B' }}"}
WORDS = 32
"""Tokens of the models' tokenizers; their embeddings have 64 rows."""


def write_zoo(directory: Path) -> Path:
    """Write every model below `directory`, in float32, and return it."""
    base = models.Random(0)
    tiny, tied = models.tiny_llama(), models.tiny_llama(tied=True)
    new = models.Model(
        {"stem.weight": (8, 8), **{f"trunk.layers.{n}.mix.weight": (8, 8) for n in range(3)}},
        {"architectures": ["NewModel"], "model_type": "new", "num_hidden_layers": 3},
    )
    kinds: dict[str, tuple[models.Model, models.Fill]] = {
        "base": (tiny, base),
        **{name: (tiny, models.FineTune(base, seed)) for seed, name in enumerate("abc", 1)},
        "deep": (models.tiny_llama(layers=6), models.FineTune(base, 4)),
        "tied": (tied, models.FineTune(base, 5)),
        "tied2": (tied, models.FineTune(base, 6)),
        "qwen": (qwen(), base),
        "qwen2": (qwen(), models.FineTune(base, 7)),
        "t5": (t5(), base),
        "t5b": (t5(), models.FineTune(base, 8)),
        "words": (tiny, models.FineTune(base, 9)),
        "new": (new, base),
        "new2": (new, models.FineTune(base, 10)),
        "sees": (sees(), base),
        "pickled": (tiny, base),
    }
    for name, (model, fill) in kinds.items():
        written = models.write_checkpoint(directory / name, model, dtype="F32", fill=fill)
        models.write_tokenizer(written, WORDS + 12 * (name == "words"))
        if name in TEMPLATES:
            file = written / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATES[name]}))
    torch.save(read_model(directory / "pickled"), directory / "pickled" / "pytorch_model.bin")
    (directory / "pickled" / "model.safetensors").unlink()
    return directory


def qwen() -> models.Model:
    """A Qwen2: a Llama with biases of queries, keys and values."""
    llama = models.tiny_llama()
    tensors: dict[str, models.Shape] = {}
    for name, shape in llama.tensors.items():
        tensors[name] = shape
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name.replace("weight", "bias")] = shape[:1]
    config = llama.config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return models.Model(tensors, {key: config[key] for key in config if key not in ("attention_bias", "mlp_bias")})


def sees() -> models.Model:
    """A reduced Qwen2-VL: Qwen2's text model and a vision tower."""
    text = qwen()
    tower = {f"visual.blocks.{layer}.attn.qkv.weight": (96, 32) for layer in range(2)}
    config = text.config | {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}
    config["vision_config"] = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "model_type": "qwen2_vl", "num_heads": 4}
    return models.Model(text.tensors | {"visual.merger.ln_q.weight": (32,), **tower}, config)


def t5() -> models.Model:
    """A T5 (v1.1) of two and two layers."""
    width, inner, wide, vocabulary = 16, 16, 32, 64
    tensors: dict[str, models.Shape] = {"shared.weight": (vocabulary, width)}
    for side in ("encoder", "decoder"):
        for layer in range(2):
            block = f"{side}.block.{layer}.layer"
            for number, kind in enumerate(
                ("SelfAttention",) if side == "encoder" else ("SelfAttention", "EncDecAttention")
            ):
                tensors |= {f"{block}.{number}.{kind}.{part}.weight": (inner, width) for part in "qkv"}
                tensors[f"{block}.{number}.{kind}.o.weight"] = (width, inner)
                if layer == 0 and number == 0:
                    tensors[f"{block}.{number}.{kind}.relative_attention_bias.weight"] = (32, 2)
                tensors[f"{block}.{number}.layer_norm.weight"] = (width,)
            last = f"{block}.{1 if side == 'encoder' else 2}"
            tensors |= {
                f"{last}.DenseReluDense.wi_0.weight": (wide, width),
                f"{last}.DenseReluDense.wi_1.weight": (wide, width),
                f"{last}.DenseReluDense.wo.weight": (width, wide),
                f"{last}.layer_norm.weight": (width,),
            }
        tensors[f"{side}.final_layer_norm.weight"] = (width,)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "d_ff": wide,
        "d_kv": 8,
        "d_model": width,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "model_type": "t5",
        "num_decoder_layers": 2,
        "num_heads": 2,
        "num_layers": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
    }
    return models.Model(tensors | {"lm_head.weight": (vocabulary, width)}, config)
