"""A copy of a single model."""

from __future__ import annotations

from .kernel.language import Array, Inputs
from .kernel.method import merge_method
from .kernel.ranges import Finite
from .kernel.signature import PerInput


@merge_method("passthrough", maximum=1)
def passthrough(t: Inputs, *, scale: PerInput[Finite] = (1.0,)) -> Array:
    """A copy of the input, optionally scaled.

    out = scale x

    Args:
        scale: factor of every element.
    """
    return scale[0] * t.other
