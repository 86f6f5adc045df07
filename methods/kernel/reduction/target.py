"""What a selection searches for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A magnitude to search for.

    Args:
        rank: k for the k-th largest, starting at 1; None if it is a fraction of the number of nonzero magnitudes.
        share: the fraction.
        exact: whether the k elements have to be selected exactly; False to find only the k-th largest magnitude.
    """

    rank: int | None
    share: float = 1.0
    exact: bool = True
