"""Pairs of models with a few matrices, and the products of an adapter's factors in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Floats = NDArray[np.float64]
Values = Mapping[str, Floats]


def save_models(
    directory: Path, base: Values, delta: Values, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[Path, Path]:
    """Save a base model and base + delta, added in float32 and stored in `dtype`. Return the model and the base."""
    ours = {name: torch.from_numpy(np.float32(value)).to(dtype) for name, value in base.items()}
    theirs = dict(ours)
    for name, value in delta.items():
        theirs[name] = (ours[name].float() + torch.from_numpy(np.float32(value))).to(dtype)
    for name, tensors in (("base", ours), ("tuned", theirs)):
        (directory / name).mkdir(parents=True, exist_ok=True)
        save_file({each: value.contiguous() for each, value in tensors.items()}, directory / name / "model.safetensors")
        if config:
            (directory / name / "config.json").write_text(json.dumps(config))
    return directory / "tuned", directory / "base"


def stored_delta(model: Path, base: Path, name: str) -> Floats:
    """The difference of a tensor of two models, as stored."""
    ours, theirs = (load_file(each / "model.safetensors")[name].double().numpy() for each in (base, model))
    return np.asarray(theirs - ours, np.float64)


def adapter_tensors(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, without PEFT's prefix."""
    tensors = load_file(out / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def adapter_config(out: Path) -> dict[str, Any]:
    """The content of adapter_config.json."""
    found: dict[str, Any] = json.loads((out / "adapter_config.json").read_text())
    return found


def product(out: Path, module: str) -> Floats:
    """The product B A of a module of an adapter, whose scale is 1."""
    tensors = adapter_tensors(out)
    a, b = (tensors[f"{module}.lora_{factor}.weight"].double().numpy() for factor in "AB")
    return np.asarray(b @ a, np.float64)


def relative_error(found: Floats, expected: Floats) -> float:
    """The relative error in the Frobenius norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def noise(seed: int, rows: int, columns: int, scale: float = 1.0) -> Floats:
    """A random matrix of a standard deviation."""
    return np.asarray(scale * np.random.default_rng(seed).standard_normal((rows, columns)), np.float64)


def low_rank(seed: int, rows: int, columns: int, rank: int, scale: float = 1e-2) -> Floats:
    """A random matrix of a rank; the norms of its terms fall to a tenth."""
    left, right = noise(seed, rows, rank, scale), noise(seed + 1, rank, columns)
    return np.asarray((left * np.geomspace(1, 0.1, rank)) @ right, np.float64)


def optimum(matrix: Floats, rank: int) -> float:
    """The share of the sum of squares that the best approximation of a rank keeps, by numpy's SVD in float64."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return float((values[:rank] ** 2).sum() / (values**2).sum())
