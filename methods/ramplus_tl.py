"""RAM+ with statistics of single tensors."""

from __future__ import annotations

from .definition import Array, Base, Inputs, NonNegative, add, host, maximum, merge_method
from .ram import PAPER


@merge_method("ramplus_tl", paper=PAPER, base=Base.REQUIRED)
def ramplus_tl(t: Inputs, *, epsilon: NonNegative = 1e-5, r: NonNegative = 0.1, alpha: NonNegative = 0.2) -> Array:
    """RAM with amplified changes of single models, by the ratio of the model's shared to its unshared changes.

    As ram, but changes by model i alone are multiplied by 1 + r min(s_i / u_i, alpha), where model i alone changed u_i
    elements of the tensor, and model i and others changed s_i. (The paper counts the elements of all tensors.)

    Args:
        epsilon: largest absolute difference from the base that does not count as a change.
        r: amplification for a ratio of 1.
        alpha: maximum ratio.
    """
    deltas = [x - t.base for x in t.models]
    changed = [abs(d) > epsilon for d in deltas]
    number = add(changed)
    alone = number == 1

    def gain(changes: float, unshared: float) -> float:
        return r * min((changes - unshared) / unshared, alpha) if unshared else 0.0

    gains = [host(gain, t.count(c), t.count(c & alone)) for c in changed]
    terms = [d * c * (1.0 + alone * g) for d, c, g in zip(deltas, changed, gains, strict=True)]
    return t.base + add(terms) / maximum(number, 1.0)
