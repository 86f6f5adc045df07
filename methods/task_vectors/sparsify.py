"""Sparse task vectors: by magnitude, without outliers, at random, and at random by rank."""

from __future__ import annotations

from collections.abc import Sequence

from ..kernel.language import Array, Inputs
from ..kernel.spec import MethodError
from .common import task_vectors


def trimmed(t: Inputs, density: Sequence[float]) -> list[Array]:
    """Keep the largest elements of each task vector: the given fraction, but at least one unless it is 0."""
    counts = [max(1, int(share * t.size)) if share else 0 for share in density]
    return [d * t.largest(d, k) for d, k in zip(task_vectors(t), counts, strict=True)]


def without_outliers(t: Inputs, density: Sequence[float], gamma: Sequence[float]) -> list[Array]:
    """Drop the fraction gamma of the largest elements, and keep the fraction density of those that follow.

    If fewer elements than that would follow, fewer of the largest are dropped.
    """
    sparse = []
    for d, share, outliers in zip(task_vectors(t), density, gamma, strict=True):
        kept = int(share * t.size)
        dropped = min(int(outliers * t.size), t.size - kept)
        sparse.append(d * (t.largest(d, dropped + kept) & ~t.largest(d, dropped)))
    return sparse


def dropped_at_random(t: Inputs, density: Sequence[float], *, unbiased: bool) -> list[Array]:
    """Keep each element with the same probability; `unbiased` divides it by the probability."""
    kept = [d * (t.uniform(x) < p) for d, x, p in zip(task_vectors(t), t.models, density, strict=True)]
    return [d / p if unbiased and p else d for d, p in zip(kept, density, strict=True)]


def pruned_by_rank(t: Inputs, density: Sequence[float], epsilon: Sequence[float], *, unbiased: bool) -> list[Array]:
    """Keep each element with a probability that rises with the rank of its magnitude in its row (MagPrune).

    It rises linearly from density - epsilon for the smallest element to density + epsilon for the largest. Among equal
    elements, later ones rank higher. The element of a one-column row is kept with probability density. `unbiased`
    divides kept elements by their probability.

    Raises:
        MethodError: a probability is not between 0 and 1.
    """
    sparse = []
    for index, (d, x, mean, half) in enumerate(zip(task_vectors(t), t.models, density, epsilon, strict=True)):
        if mean in (0, 1):  # nothing is random
            sparse.append(d * mean)
            continue
        _check_probabilities(mean, half, index)
        lowest, slope = (mean - half, 2 * half / (t.columns - 1)) if t.columns > 1 else (mean, 0.0)
        p = t.row_rank(d) * slope + lowest
        kept = d * (t.uniform(x) < p)
        sparse.append(kept / p if unbiased else kept)
    return sparse


def _check_probabilities(density: float, epsilon: float, index: int) -> None:
    if 0 < density - epsilon <= density + epsilon < 1:
        return
    widest = min(density, 1 - density)
    raise MethodError(
        f"density - epsilon and density + epsilon must lie strictly between 0 and 1, got density {density:g} and "
        f"epsilon {epsilon:g}: at this density epsilon must be below {widest:g}",
        parameters=["epsilon", "density"],
        index=index,
    )
