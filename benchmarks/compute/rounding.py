"""Measures what rounding costs: the share of a small update of a model's weights that its stored form keeps.

    python -m benchmarks.compute.rounding [--seed 0]

The base is what a form can store, b = stored(w). An update of rank 16 and a given size is added to it, v = b + u, and
the result is stored in the same form, q = stored(v). Of the update, the share <q - b, v - b> / <v - b, v - b> survives;
what else differs is noise. bfloat16 and FP8 blocks are written and read by merges, and compared with torch's casts;
INT4 and MXFP4 are those of compressed-tensors. The weights are those of a real sentence encoder, and Gaussian numbers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import mergeloom
from tests.support import models

SIZES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Sizes of updates, relative to the weights."""
RANK = 16
BLOCK = 128
GAUSSIAN = (2048, 2048)

Weights = Mapping[str, Tensor]
"""Matrices by name, in float32."""
Store = Callable[[Weights], dict[str, Tensor]]
"""A function that returns the values that are read back after weights were stored in a form."""


class Survival(NamedTuple):
    """What a form keeps of an update.

    Args:
        share: the part of the update that survives; 1 if nothing is lost.
        noise: the length of all other changes, relative to that of the update.
    """

    share: float
    noise: float


# ------------------------------------------------------------------------------------------------ forms


def by_torch(weight: Tensor, form: str) -> Tensor:
    """Store a matrix by torch's casts, independently of mergeloom."""
    if form == "bfloat16":
        return weight.to(torch.bfloat16).float()
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = blocks.abs().amax((1, 3), keepdim=True) / largest
    codes = (blocks / scales).clamp(-largest, largest).to(torch.float8_e4m3fn)
    return (codes.float() * scales).view(rows, columns)


def by_merges(form: str, config: Mapping[str, Any]) -> Store:
    """Store weights with one merge and read them with another; both are compared with torch's casts."""

    def store(weights: Weights) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as directory:
            given, stored, values = (Path(directory) / name for name in ("given", "stored", "values"))
            models.write_checkpoint(given, weights, config=config)
            chosen = {"out_dtype" if form == "fp8_blocks" else "dtype": form}
            mergeloom.merge(_passed_through(given) | chosen, stored, device="cpu")
            mergeloom.merge(_passed_through(stored) | {"dtype": "float32"}, values, device="cpu")
            found = {name: load_file(values / "model.safetensors")[name] for name in weights}
        for name, weight in weights.items():
            if not torch.equal(found[name], by_torch(weight, form)):
                raise AssertionError(f"{name} as {form} differs from torch's casts")
        return found

    return store


def _passed_through(model: Path) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}]}


def by_library(form: str) -> Store:
    """Store weights in 4 bits with compressed-tensors, in groups of 32.

    INT4 has the scales of quantization-aware training, the largest magnitude divided by 7: the library's own, divided
    by 7.5, move a model that is stored with the former even if nothing is added.
    """
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    common: dict[str, Any] = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
    is_float = form == "MXFP4"
    more = {"type": "float", "scale_dtype": torch.uint8} if is_float else {"type": "int"}
    arguments = QuantizationArgs(**common, **more)

    def stored(weight: Tensor) -> Tensor:
        groups = weight.view(weight.shape[0], -1, 32)
        low, high = groups.amin(-1), groups.amax(-1)
        scales, zeros = calculate_qparams(low, high, arguments)
        if not is_float:
            scales = torch.maximum(-low, high) / 7
        return fake_quantize(weight, scales, zeros, arguments)

    return lambda weights: {name: stored(weight) for name, weight in weights.items()}


# ------------------------------------------------------------------------------------------------ measuring


def update_of(weight: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Return a random update of low rank, with a given length relative to that of a matrix."""
    rows, columns = weight.shape
    update = torch.randn(rows, RANK, generator=generator) @ torch.randn(RANK, columns, generator=generator)
    return update * (size * weight.norm() / update.norm())


def survival(base: Weights, values: Weights, stored: Weights) -> Survival:
    """Compare the changes that are stored with those that were made, over all matrices.

    Args:
        base: the values before the update.
        values: the values after it, before they are stored.
        stored: the values that are read back.
    """
    along = length = total = 0.0
    for name, before in base.items():
        made = values[name].double() - before.double()
        kept = stored[name].double() - before.double()
        along, length = along + float((made * kept).sum()), length + float((made * made).sum())
        total += float((kept * kept).sum())
    share = along / length
    return Survival(share, max(0.0, total / length - share * share) ** 0.5)


def measure(weights: Weights, store: Store, sizes: tuple[float, ...], seed: int) -> list[Survival]:
    """Measure what a form keeps of updates of several sizes."""
    base = store(weights)
    found = []
    for size in sizes:
        generator = torch.Generator().manual_seed(seed)
        values = {name: each + update_of(each, size, generator) for name, each in base.items()}
        found.append(survival(base, values, store(values)))
    return found


def encoder() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the matrices of the layers of all-MiniLM-L6-v2, and a config."""
    stored = load_file(models.encoder_dir() / "model.safetensors")
    chosen = {name: each.float() for name, each in stored.items() if ".layer." in name and each.ndim == 2}
    return chosen, {"model_type": "bert", "num_hidden_layers": 6}


def gaussian(seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a matrix of Gaussian numbers, and a config."""
    values = torch.randn(GAUSSIAN, generator=torch.Generator().manual_seed(seed))
    return {"model.layers.0.mlp.up_proj.weight": values}, {"model_type": "llama", "num_hidden_layers": 1}


def table(weights: Weights, config: Mapping[str, Any], seed: int) -> str:
    """Return a table in Markdown: a row for each size of the update, a column for each form."""
    stores = {
        "bfloat16": by_merges("bfloat16", config),
        "FP8 blocks": by_merges("fp8_blocks", config),
        "INT4": by_library("INT4"),
        "MXFP4": by_library("MXFP4"),
    }
    columns = [measure(weights, store, SIZES, seed) for store in stores.values()]
    lines = [f"| update | {' | '.join(stores)} |", f"|---|{'---|' * len(stores)}"]
    for number, size in enumerate(SIZES):
        cells = [f"{found[number].share:.0%} ({found[number].noise:.2g})" for found in columns]
        lines.append(f"| {size:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for the encoder, and one for Gaussian numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the updates and of the Gaussian numbers")
    seed = parser.parse_args().seed
    for title, (weights, config) in {"all-MiniLM-L6-v2": encoder(), "Gaussian": gaussian(seed)}.items():
        elements = sum(each.numel() for each in weights.values())
        print(f"{title}, {elements:,} weights: share of the update that survives (noise)\n")
        print(table(weights, config, seed), end="\n\n")


if __name__ == "__main__":
    main()
