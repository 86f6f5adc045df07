"""Reading what a merge made with other people's tools, and saying what it should have been."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

EXACT_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
"""Bits of the significand, the hidden one included."""


def read_model(directory: Path) -> dict[str, Tensor]:
    """Read every tensor of a model directory with the safetensors library; the index must name exactly these."""
    found: dict[str, Tensor] = {}
    homes: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  safe_open is not a dict
                assert name not in found
                found[name], homes[name] = shard.get_tensor(name), file.name
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == homes
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    else:
        assert set(homes.values()) in ({"model.safetensors"}, {"diffusion_pytorch_model.safetensors"})
    return found


def config_of(directory: Path) -> dict[str, Any]:
    """Its config.json."""
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def digests(directory: Path, pattern: str = "*") -> dict[str, str]:
    """A digest of every file below a directory."""
    files = sorted(path for path in directory.rglob(pattern) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def open_files(directory: Path) -> set[str]:
    """The names of a directory's files that this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself is gone
            file = link.readlink()
            if file.parent == directory:
                found.add(file.name)
    return found


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaNs and negative zeros too."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two models are equal tensor for tensor, to the bit."""
    return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


def beyond_one_ulp(output: Tensor, inputs: Sequence[Tensor], coefficients: Sequence[float]) -> int:
    """How many elements of a weighted sum are further from float64's result than the issue's bound.

    The bound is one ulp of the output's dtype at the exact value, and n 2^-23 sum_i |w_i x_i| for cancellation.
    """
    exact = sum(w * x.to(torch.float64) for w, x in zip(coefficients, inputs, strict=True))
    sizes = sum(abs(w) * x.to(torch.float64).abs() for w, x in zip(coefficients, inputs, strict=True))
    assert isinstance(exact, Tensor)
    _, exponent = torch.frexp(exact)
    lowest = int(torch.frexp(torch.tensor(torch.finfo(output.dtype).tiny, dtype=torch.float64))[1])
    ulp = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=lowest) - EXACT_BITS[output.dtype])
    bound = ulp + len(inputs) * 2.0**-23 * sizes
    return int(((output.to(torch.float64) - exact).abs() > bound).sum())
