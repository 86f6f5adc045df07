"""A copy of a single model."""

from __future__ import annotations

from .definition import Array, Finite, Inputs, PerInput, merge_method


@merge_method("passthrough", maximum=1)
def passthrough(t: Inputs, *, scale: PerInput[Finite] = (1.0,)) -> Array:
    """A copy of the input, optionally scaled.

    out = scale x

    Args:
        scale: factor of every element.
    """
    return scale[0] * t.other
