"""Recipes of single files, float64 arithmetic to compare their merges with, and a directory like those of UIs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeloom.engine.run.plan import Options
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.models.diffusion import VAE, sd15, values, write_file

CPU = Options(device="cpu", threads=1, max_ram=4 << 30)
CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
METADATA = {
    "format": "pt",
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.title": "First",
    "modelspec.hash_sha256": "0x12",
    "ss_steps": "100",
    "sd_merge_recipe": "{}",
}


def linear(*files: Path, weights: tuple[float, ...] = (0.25, 0.75), **more: Any) -> dict[str, Any]:
    """A recipe that takes the weighted mean of files."""
    models = [
        {"model": str(file), "parameters": {"weight": weight}} for file, weight in zip(files, weights, strict=True)
    ]
    return {"merge_method": "linear", "models": models, **more}


def check_mean(found: npt.NDArray[Any], inputs: list[npt.NDArray[Any]], weights: tuple[float, ...]) -> None:
    """Check a weighted mean with float64 arithmetic: half an ulp of the output, and what float32 sums lose."""
    exact = sum(weight * value.astype(np.float64) for weight, value in zip(weights, inputs, strict=True))
    bound = 2.0 ** -(np.finfo(found.dtype).nmant + 1) * np.abs(exact) + 2.0**-22 * sum(map(np.abs, inputs)) + 2.0**-25
    assert (np.abs(found.astype(np.float64) - exact) <= bound).all()


def write_pair(directory: Path) -> tuple[Path, Path]:
    """Write two checkpoints of Stable Diffusion to a directory with other files that don't belong to them."""
    write_checkpoint(directory, tiny_llama(layers=2))  # a config.json and a model.safetensors of something else
    (directory / "tokenizer.json").write_text("{}")
    (directory / "LICENSE").write_text("of another model")
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    write_file(directory / "vae.safetensors", values(VAE, 5))
    return (
        write_file(directory / "a.safetensors", sd15(0), **METADATA),
        write_file(directory / "b.safetensors", sd15(1), format="pt"),
    )
