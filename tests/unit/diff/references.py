"""References for comparisons: float64 on complete tensors with torch, and results made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mergeloom.engine.run.diff.compare import Comparison
from mergeloom.engine.run.diff.result import Diff, Similarity, TensorDiff
from tests.support.models import write_checkpoint


class Reference(NamedTuple):
    """Relative distance, cosine and share of equal elements."""

    distance: float
    cosine: float
    equal: float


def reference(a: Tensor, b: Tensor) -> Reference:
    """Compute the measures of two finite tensors in float64."""
    x, y = a.double().flatten(), b.double().flatten()
    cosine = torch.dot(x, y) / (x.norm() * y.norm())
    return Reference(float((x - y).norm() / x.norm()), float(cosine), int((x == y).sum()) / x.numel())


def is_close(found: Similarity, expected: Reference) -> bool:
    """Whether the measures are those of a reference, up to the rounding of its float64 sums; the share exactly."""
    return (
        math.isclose(found.relative_distance or 0.0, expected.distance, rel_tol=1e-11)
        and math.isclose(found.cosine or 0.0, expected.cosine, rel_tol=1e-11, abs_tol=1e-11)
        and found.equal_share == expected.equal
    )


def compare(directory: Path, a: dict[str, Tensor], b: dict[str, Tensor], **options: int) -> Diff:
    """Write two models below a directory, and compare them."""
    paths = [write_checkpoint(directory / name, model) for name, model in (("a", a), ("b", b))]
    return Comparison(*paths, **options).run()


def made_diff(*tensors: TensorDiff, a: str = "a", b: str = "b", **fields: object) -> Diff:
    """Make the result of a comparison that was never run."""
    return Diff(a, b, tensors, bytes_read=1000, max_ram=1 << 30, peak_ram=64 << 20, **fields)  # type: ignore[arg-type]


def made_tensor(name: str, distance: float = 0.1, *, stack: str = "", layer: int | None = None) -> TensorDiff:
    """Make the comparison of a tensor of 100 elements with this relative distance, none equal unless it is 0."""
    similarity = Similarity(100, 0 if distance else 100, 0, 1.0, 1.0, 0.5 if distance else 1.0, distance**2)
    return TensorDiff(name, stack, layer, (10, 10), ("BF16", "BF16"), similarity)
