"""Names the quantization format of a checkpoint, and the repository with the unquantized model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ....io.checkpoint.checkpoint import Checkpoint
from ....io.small_files import read_small
from .descriptions import NOT_DECODED, unknown_setting

_SECTIONS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that describe a quantization. The last is MLX's."""
_METADATA = "_quantization_metadata"
"""Key in a file's metadata with which ComfyUI describes a quantization."""
_METHODS = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "modelopt": "ModelOpt",
    "hqq": "HQQ",
    "aqlm": "AQLM",
}
"""Names of formats whose `quant_method` is spelled differently."""
_ENDINGS = (
    ("bitsandbytes with 8 bits", (".SCB",)),
    ("bitsandbytes with 4 bits", (".quant_map", ".absmax")),
    ("compressed-tensors", (".weight_packed",)),
    ("GPTQ", (".g_idx",)),
    ("AWQ", (".qweight",)),  # like GPTQ, but without g_idx
    ("MLX", (".biases",)),
    ("MXFP4", ("_blocks",)),
    ("EXL2", (".q_scale_max",)),
    ("EXL3", (".trellis",)),
    ("AQLM", (".codebooks",)),
    ("quanto", (".weight._data",)),
    ("FP8 in blocks", ("_scale_inv",)),
)
"""Endings of tensor names that only occur in one format; the first match counts."""
_IN_NAMES = re.compile(
    r"(?:[-_.](?:i?gptq|awq|bnb|fp8|nvfp4|mxfp[48]|nf4|hqq|aqlm|mlx|exl[23]|eetq|quanto|(?:u?int|fp|q|w)\d\w*|w\d+a\d+\w*"
    r"|\d+-?bits?|\d+(?:\.\d+)?bpw|dynamic|block|marlin|autoround|quantized|unsloth|g\d+|128g|32g|64g))+$",
    re.IGNORECASE,
)
"""The end of a repository's name that says how it is quantized."""
_BASE_MODEL = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)
_LARGEST_CARD = 1 << 20


def quantization_config(config: Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any]] | None:
    """The part of config.json that describes a quantization, with its key; None without one.

    The text part of a vision-language model may have one of its own.
    """
    sections = [("", config or {})]
    sections += [(f"{key}.", value) for key, value in (config or {}).items() if key.endswith("_config")]
    for prefix, section in sections:
        if isinstance(section, Mapping):
            for key in _SECTIONS:
                value = section.get(key)
                if isinstance(value, Mapping) and value:
                    return prefix + key, value
    return None


def declared_format(config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> str | None:
    """Where a model says that it is quantized, as the beginning of a reason; None if it doesn't."""
    described = quantization_config(config)
    if described is not None:
        key, section = described
        method = section.get("quant_method")
        unknown = unknown_description(config)
        if unknown is not None:
            return f"config.json has {unknown}, which is not known"
        return f"config.json has {key}" + (f" with quant_method {method}" if isinstance(method, str) else "")
    return f"the files have {_METADATA}" if _METADATA in metadata else None


def unknown_description(config: Mapping[str, Any] | None) -> str | None:
    """The setting in config.json that describes a quantization nobody has heard of, with its key; None without one."""
    described = quantization_config(config)
    if described is None or str(described[1].get("quant_method")).lower() in NOT_DECODED:
        return None
    unknown = unknown_setting(described[1])
    return None if unknown is None else f"{described[0]}.{unknown}"


def format_name(checkpoint: Checkpoint, quantized: Iterable[str]) -> str:
    """The name of a quantized checkpoint's format.

    Args:
        checkpoint: the checkpoint.
        quantized: names of its quantized tensors and of those that belong to them; at least one.
    """
    described = quantization_config(checkpoint.config)
    method = described[1].get("quant_method") if described is not None else None
    found = ""
    names = list(quantized)
    for label, endings in _ENDINGS:
        if any(name.endswith(endings) for name in names):
            found = label
            break
    if isinstance(method, str) and method:
        known = _METHODS.get(method, method)
        return found if found.startswith(known) else known
    if found:
        return found
    codes = {checkpoint.tensors[name].dtype.name for name in names}
    return "scaled FP8" if any(name.startswith("F8") and name != "F8_E8M0" for name in codes) else "unknown format"


def unquantized(model: str, checkpoint: Checkpoint) -> str:
    """Advice on where to find the unquantized version of a model.

    Args:
        model: name of the model in the recipe.
        checkpoint: its checkpoint.
    """
    base = _base_model(checkpoint)
    if base is not None:
        return f"use the unquantized model that it was made from (its model card names {base})"
    name = os.path.basename(model.rstrip("/")) or model  # noqa: PTH119  a Hub id, too
    shorter = _IN_NAMES.sub("", name)
    if shorter not in ("", name):
        return f"use the unquantized model that it was made from (probably named {shorter})"
    return "use the repository with the unquantized model, in bfloat16 or float16"


def _base_model(checkpoint: Checkpoint) -> str | None:
    """The ``base_model`` in the model card of a local checkpoint, or None."""
    directory = checkpoint.path if checkpoint.standalone or checkpoint.path.is_dir() else checkpoint.path.parent
    card = directory / "README.md"
    if not card.is_file() or card.stat().st_size > _LARGEST_CARD:
        return None
    text = read_small(card).decode("utf-8", errors="replace")
    match = _BASE_MODEL.search(text.split("\n---", 1)[0]) if text.startswith("---") else None
    return None if match is None else match[1]
