"""NearSwap: interpolation with a weight per element."""

from __future__ import annotations

from .definition import Absent, Array, Base, Inputs, NonNegative, Positive, maximum, merge_method, minimum


@merge_method(
    "nearswap",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    base=Base.REQUIRED,
    maximum=1,
    absent=Absent.SINGLE_BASE,
)
def nearswap(t: Inputs, *, t_: NonNegative, eps: Positive = 1e-6) -> Array:
    """Interpolation from the base to the other model, strongest for elements where the two are close.

    out = (1-w) base + w x with w = t / |x - base|, but at most 1.

    Args:
        t_: distance up to which the other model's value is used.
        eps: minimum distance to divide by.
    """
    w = minimum(t_ / maximum(abs(t.base - t.other), eps), 1.0)
    return (1.0 - w) * t.base + w * t.other
