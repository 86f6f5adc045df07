"""Geometry in the span of a few vectors, which is known from their inner products alone.

Slerp, means on the sphere and model stock give vectors in the span of their inputs. One pass computes the inner product
of each pair of inputs, Python functions turn these into coefficients, and the output is the weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..kernel.language import Array, Inputs, add, host, wide

Vector = Sequence[float]
"""The coefficients of a vector in the span."""


class Span:
    """The span of several vectors, given by their inner products.

    Args:
        gram: Gram matrix, which contains the inner product of each pair of vectors.
    """

    def __init__(self, gram: Sequence[Sequence[float]]) -> None:
        self.gram = gram
        self.lengths = [math.sqrt(gram[i][i]) for i in range(len(gram))]

    def dot(self, a: Vector, b: Vector) -> float:
        """The inner product of two vectors."""
        return math.fsum(
            x * y * product for x, row in zip(a, self.gram, strict=True) for y, product in zip(b, row, strict=True)
        )

    def length(self, a: Vector) -> float:
        """The norm of a vector."""
        return math.sqrt(max(0.0, self.dot(a, a)))

    def direction(self, index: int) -> list[float]:
        """The unit vector in the direction of vector `index`, whose norm must not be 0."""
        return [1.0 / self.lengths[index] if i == index else 0.0 for i in range(len(self.gram))]

    def cosine(self, i: int, j: int, floor: float = 0.0) -> float:
        """The cosine of the angle between vectors `i` and `j`, with `floor` as the minimum product of their norms."""
        product = max(self.lengths[i] * self.lengths[j], floor)
        return max(-1.0, min(1.0, self.gram[i][j] / product)) if product else 0.0


def combination(
    t: Inputs,
    vectors: Sequence[Array],
    coefficients: Callable[[Span], Vector],
    *,
    inner: Callable[[Array], Array] | None = None,
) -> Array:
    """The sum of vectors multiplied by coefficients that are computed from their inner products.

    Args:
        t: inputs.
        vectors: vectors.
        coefficients: computes the coefficient of each vector from their span.
        inner: sums a product of two vectors: `t.sum`, `t.row_sum` or `t.column_sum`; None for `t.sum`. Products for
            single rows and columns are in float64.
    """
    exact = [wide(v) for v in vectors] if inner else vectors
    sums = inner or t.sum
    gram = [[sums(exact[min(i, j)] * exact[max(i, j)]) for j in range(len(exact))] for i in range(len(exact))]
    factors = host(lambda rows: coefficients(Span(rows)), gram, outputs=len(vectors))
    return add([c * v for c, v in zip(factors, vectors, strict=True)])


def arc(angle: float, t: float) -> tuple[float, float]:
    """The coefficients of two unit vectors `angle` apart for the point at fraction `t` of the arc between them."""
    sine = math.sin(angle)
    return (math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine) if sine else (1 - t, t)


def linear_combination(*terms: tuple[float, Vector]) -> list[float]:
    """The sum of vectors multiplied by factors, given as (factor, vector) pairs."""
    factors = [factor for factor, _ in terms]
    columns = zip(*(vector for _, vector in terms), strict=True)
    return [math.fsum(f * x for f, x in zip(factors, column, strict=True)) for column in columns]


_OPPOSITE = 2.0**-10
"""Sine below which two directions count as opposite; float32 products do not resolve smaller angles near pi."""


def sphere_mean(span: Span, weights: Sequence[float], steps: int, tol: float, eps: float) -> list[float]:
    """The weighted mean on the unit sphere of the directions of the span's vectors.

    Starts with the direction of the weighted mean of the unit vectors and takes up to `steps` Karcher steps (to the
    tangent space, the mean there, and back to the sphere) until a step is shorter than `tol`. Vectors with a norm up to
    `eps` have no direction, and one opposite to the mean has no tangent. Returns zero if the directions cancel out.
    """
    directed = [(w, span.direction(i)) for i, w in enumerate(weights) if span.lengths[i] > eps]
    start = linear_combination(*directed) if directed else [0.0] * len(weights)
    if (length := span.length(start)) <= eps:
        return [0.0] * len(weights)
    mean = linear_combination((1 / length, start))
    for _ in range(steps):
        tangents = []
        for w, direction in directed:
            cosine = max(-1.0, min(1.0, span.dot(direction, mean)))
            angle = math.acos(cosine)
            if math.sin(angle) > (eps if cosine > 0 else max(eps, _OPPOSITE)):
                tangents.append((w * angle / math.sin(angle), linear_combination((1.0, direction), (-cosine, mean))))
        tangent = linear_combination(*tangents) if tangents else [0.0] * len(weights)
        if (length := span.length(tangent)) < tol:
            break
        mean = linear_combination((math.cos(length), mean), (math.sin(length) / length, tangent))
    return mean
