"""RAM (reinforced agent merging): adds changes of a single model in full and averages changes of several models."""

from __future__ import annotations

from .definition import Array, Base, Inputs, NonNegative, add, maximum, merge_method

PAPER = "https://arxiv.org/abs/2601.13572"


@merge_method("ram", paper=PAPER, base=Base.REQUIRED)
def ram(t: Inputs, *, epsilon: NonNegative = 1e-5) -> Array:
    """The base plus, for each element, the mean change over the models that changed it.

    A model changed an element if |x_i - base| is above epsilon; smaller differences count as 0. A change by a single
    model is added in full, changes by several models are averaged.

    Args:
        epsilon: largest absolute difference from the base that does not count as a change.
    """
    deltas = [x - t.base for x in t.models]
    changed = [abs(d) > epsilon for d in deltas]
    return t.base + add([d * c for d, c in zip(deltas, changed, strict=True)]) / maximum(add(changed), 1.0)
