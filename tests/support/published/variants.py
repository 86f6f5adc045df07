"""Writes a family's base model and its fine-tunes, which differ as published ones do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.models import FineTune, Model, Random, Shape, write_checkpoint
from tests.support.published.families import Family

VERSIONS = ("4.31.0", "4.37.2", "4.40.0.dev0", "4.44.2", "4.51.3")
SCALES = (0.002, 0.004, 0.001)
PACKED = {".absmax": "U8", ".quant_map": "F32", ".nested_absmax": "F32", ".nested_quant_map": "F32", "_nf4": "U8"}
"""The dtypes of the tensors that bitsandbytes adds, by the ends of their names."""


def stored_dtype(tune: int) -> str:
    """The dtype of a tune's tensors: every third one is in float16."""
    return "F16" if tune % 3 == 2 else "BF16"


def varied_config(config: dict[str, Any], family: Family, tune: int) -> dict[str, Any]:
    """The config.json of a fine-tune: keys that depend on who saved it differ, all others are equal."""
    changed = config | {
        "_name_or_path": f"./out/checkpoint-{100 * tune}" if tune % 2 else "base",
        "torch_dtype": "float16" if stored_dtype(tune) == "F16" else "bfloat16",
        "transformers_version": VERSIONS[tune % len(VERSIONS)],
    }
    section = changed[family.section] = dict(changed[family.section]) if family.section else {}
    section = section if family.section else changed
    changed.pop("", None)
    if "use_cache" in section:
        section["use_cache"] = tune % 2 == 0
    if tune % 2 and family.vocabulary.also_end:
        section["eos_token_id"] = family.vocabulary.ends
    return changed


def _generation_config(family: Family, tune: int) -> dict[str, Any]:
    if "eos_token" not in family.vocabulary.special:
        return {}
    ends = family.vocabulary.ends
    content: dict[str, Any] = {"eos_token_id": ends if tune % 2 and ends[1:] else ends[0]}
    if (begin := family.vocabulary.id_of("bos_token")) is not None:
        content["bos_token_id"] = begin
    return {"_from_model_config": True} | content | {"transformers_version": VERSIONS[tune % len(VERSIONS)]}


def write_model(family: Family, directory: Path, tune: int, *, buffers: bool = True) -> Path:
    """Write the base model (tune 0) or a fine-tune of a family.

    Args:
        family: the family.
        directory: the new model's directory.
        tune: number of the fine-tune, which determines its values and how its files differ.
        buffers: whether some of the tunes store buffers, which older versions of transformers did.
    """
    model = family.model()
    tensors: dict[str, Shape] = dict(model.tensors)
    dtypes = {name: dtype for name in tensors for ending, dtype in PACKED.items() if name.endswith(ending)}
    dtypes |= {name: "U8" for name in tensors if f"{name}.absmax" in tensors}
    if buffers and tune % 4 == 1 and "embeddings.position_embeddings.weight" in tensors:
        tensors["embeddings.position_ids"] = (1, 512)
        dtypes["embeddings.position_ids"] = "I64"
    if buffers and tune % 4 == 1 and family.kind == "llama 2" and "architectures" in model.config:
        layers = [f"{family.stack}.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(family.layers)]
        if model.config["model_type"] == "llama":
            tensors |= dict.fromkeys(layers, (4,))
            dtypes |= dict.fromkeys(layers, "F32")
    base = Random(sum(family.stack.encode()) + family.layers)
    fill = FineTune(base, tune, SCALES[tune % len(SCALES)]) if tune else base

    def values(name: str, start: int, count: int) -> Any:
        import numpy as np

        if name.endswith("position_ids"):  # integers are stored as hundredfold values
            return np.arange(start, start + count, dtype=np.float32) / np.float32(100)
        if name.endswith("inv_freq"):
            return (10000.0 ** (-np.arange(start, start + count) / 4)).astype(np.float32)
        return fill(name, start, count)

    config = varied_config(model.config, family, tune)
    varied = Model(tensors, config, dtypes)
    write_checkpoint(directory, varied, dtype=stored_dtype(tune), fill=values, shard_bytes=1_000_000)
    if content := _generation_config(family, tune):
        (directory / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n")
    family.vocabulary.write(directory, chat=tune % 3 != 0, newer=tune % 2 == 1)
    return directory
