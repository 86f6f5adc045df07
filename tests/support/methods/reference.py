"""Reference implementations of the merge methods in float64, written from the papers and mergekit's documentation.

They share no code with the methods under test. A reference returns the valid outputs: one tensor, or several if a
decision (an election, a rank, a threshold) is so close that rounding can change it. Each element of an output must
agree with one of them. The sum of the absolute values of the terms scales the tolerance.

References do not compute random masks: the kept elements are an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLOSE = 2.0**-20
"""Relative distance within which a decision can go either way."""


@dataclass
class Expected:
    """The valid outputs of a method.

    Args:
        outputs: alternatives, the first of which is the float64 result.
        size: sum of the absolute values of the terms of each element.
    """

    outputs: list[Tensor]
    size: Tensor


def linear(x: Sequence[Tensor], *, weight: Sequence[float], normalize: bool = True) -> Expected:
    total = sum(weight) if normalize else 1.0
    terms = [w / total * t for w, t in zip(weight, x, strict=True)]
    return _sum(terms)


def passthrough(x: Sequence[Tensor], *, scale: Sequence[float] = (1.0,)) -> Expected:
    return _sum([scale[0] * x[0]])


def slerp(x: Sequence[Tensor], *, base: int, t: float, dot_threshold: float = 0.9995) -> Expected:
    first, second = x[base], x[1 - base]
    product = first.norm() * second.norm()
    cosine = float((first * second).sum() / product) if product > 0 else 0.0
    if abs(cosine) > min(dot_threshold, 1 - 1e-15):
        return _sum([(1 - t) * first, t * second])
    angle = math.acos(cosine)
    return _sum([math.sin((1 - t) * angle) / math.sin(angle) * first, math.sin(t * angle) / math.sin(angle) * second])


def nuslerp(
    x: Sequence[Tensor],
    *,
    base: int | None = None,
    weight: Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Expected:
    others = [i for i in range(len(x)) if i != base]
    total = sum(weight[i] for i in others)
    t = weight[others[1]] / total if total else 0.5
    origin = torch.zeros_like(x[0]) if base is None else x[base]
    a, b = ((x[i] - origin).reshape(-1) if nuslerp_flatten or not x[0].dim() else x[i] - origin for i in others)
    dim = 0 if nuslerp_flatten or nuslerp_row_wise else -1
    product = a.norm(dim=dim, keepdim=True) * b.norm(dim=dim, keepdim=True)
    cosine = torch.where(product > 0, (a * b).sum(dim, keepdim=True) / product.clamp(min=1e-300), 0.0).clamp(-1, 1)
    angle = torch.acos(cosine)
    line = cosine.abs() > 0.999999
    sine = torch.where(line, 1.0, torch.sin(angle))
    first = torch.where(line, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(line, t, torch.sin(t * angle) / sine)
    return _sum([origin, (first * a).view(x[0].shape), (second * b).view(x[0].shape)])


def multislerp(
    x: Sequence[Tensor], *, base: int | None = None, weight: Sequence[float], normalize_weights: bool = True
) -> Expected:
    others = [i for i in range(len(x)) if i != base]
    if len(others) == 1:
        return _sum([x[others[0]]])
    total = sum(weight[i] for i in others) if normalize_weights else 1.0
    weights = [weight[i] / total for i in others]
    origin = torch.zeros_like(x[0]) if base is None else x[base]
    v = [x[i] - origin for i in others]
    norms = [float(a.norm()) for a in v]
    unit = [a / n if n > 0 else a for a, n in zip(v, norms, strict=True)]
    mean = sum((w * u for w, u in zip(weights, unit, strict=True)), torch.zeros_like(v[0]))
    length = float(mean.norm())
    scale = sum(w * n for w, n in zip(weights, norms, strict=True)) / length if length > 1e-8 else 0.0
    return _sum([origin, *(scale * w * u for w, u in zip(weights, unit, strict=True))])


def karcher(x: Sequence[Tensor], *, max_iter: int = 10, tol: float = 1e-5) -> Expected:
    if len(x) == 1:
        return _sum([x[0]])
    norms = [float(a.norm()) for a in x]
    unit = [a / n for a, n in zip(x, norms, strict=True) if n > tol]
    scale = sum(norms) / len(norms)
    if not unit:
        return _sum([torch.zeros_like(x[0])])
    mean = sum(unit, torch.zeros_like(x[0]))
    if float(mean.norm()) <= tol:
        return _sum([scale * unit[0]])
    mean = mean / mean.norm()
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for u in unit:
            cosine = min(1.0, max(-1.0, float((u * mean).sum())))
            angle = math.acos(cosine)
            if math.sin(angle) > 1e-9:
                tangent += angle / math.sin(angle) * (u - cosine * mean) / len(x)
        length = float(tangent.norm())
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
    return Expected([scale * mean], sum((a.abs() for a in x), torch.zeros_like(x[0])))


def model_stock(x: Sequence[Tensor], *, base: int, filter_wise: bool = False) -> Expected:
    deltas = [a - x[base] for i, a in enumerate(x) if i != base]
    dims: list[int] | None = [-1] if filter_wise and x[0].dim() else None
    n = len(deltas)
    cosines = []
    for i in range(n):
        for j in range(i + 1, n):
            norms = [torch.linalg.vector_norm(deltas[k], dim=dims, keepdim=True) for k in (i, j)]
            product = (norms[0] * norms[1]).clamp(min=1e-6)
            cosines.append((deltas[i] * deltas[j]).sum(dim=dims, keepdim=True) / product)
    cosine = torch.stack(cosines).mean(0)
    denominator = 1 + (n - 1) * cosine
    t = torch.where(denominator.abs() < 1e-6, 0.0, n * cosine / denominator)
    # the products that a cosine adds have both signs: its error is relative to the norms, and that of t to 1
    return Expected([x[base] + sum(t / n * d for d in deltas)], x[base].abs() + sum(d.abs() for d in deltas))


def nearswap(x: Sequence[Tensor], *, base: int, t: float) -> Expected:
    a, b = x[base], x[1 - base]
    weight = (t / (a - b).abs().clamp(min=1e-6)).clamp(0, 1)
    return Expected([(1 - weight) * a + weight * b], a.abs() + b.abs())


def arcee_fusion(x: Sequence[Tensor], *, base: int) -> Expected:
    a, b = x[base], x[1 - base]
    p, q = torch.softmax(b, -1) + 1e-8, torch.softmax(a, -1) + 1e-8
    importance = (b - a).abs() * (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
    rising = importance.reshape(-1).sort().values
    low, middle, high = (rising[int(q * (len(rising) - 1))] for q in (0.25, 0.5, 0.75))
    bound = middle + 1.5 * (high - low)
    outputs = [a + (b - a) * (importance >= edge) for edge in (bound, bound * (1 + CLOSE), bound * (1 - CLOSE))]
    return Expected(outputs, a.abs() + (b - a).abs())


def ram(x: Sequence[Tensor], *, base: int, epsilon: float = 1e-5, r: float = 0.0, alpha: float = 0.0) -> Expected:
    deltas = [a - x[base] for i, a in enumerate(x) if i != base]
    changed = [d.abs() > epsilon for d in deltas]
    number = sum((c.double() for c in changed), torch.zeros_like(x[0]))
    terms = [x[base]]
    for delta, mask in zip(deltas, changed, strict=True):
        alone, shared = mask & (number == 1), mask & (number > 1)
        ratio = min(float(shared.sum() / alone.sum()), alpha) if alone.any() else 0.0
        terms.append(delta * alone * (1 + r * ratio) + delta * shared / number.clamp(min=1))
    return _sum(terms)


def ramplus_tl(
    x: Sequence[Tensor], *, base: int, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Expected:
    return ram(x, base=base, epsilon=epsilon, r=r, alpha=alpha)


def sce(x: Sequence[Tensor], *, base: int, select_topk: float = 1.0) -> Expected:
    deltas = [a - x[base] for i, a in enumerate(x) if i != base]
    masks = [torch.ones_like(x[0])]
    if select_topk < 1:
        variance = torch.stack(deltas).var(0, unbiased=False)
        masks = _top(variance, int(max(select_topk, 0) * int((variance != 0).sum())), ties=True)
    outputs, size = [], torch.zeros_like(x[0])
    for mask in masks:
        kept = [d * mask for d in deltas]
        squares = [float((d * d).mean()) for d in kept]
        total = sum(squares)
        weights = [s / total for s in squares] if total >= 1e-6 else [1 / len(kept)] * len(kept)
        for elected in _elections(kept):
            divisor = sum(
                (w * (k != 0).double() for w, k in zip(weights, elected, strict=True)), torch.zeros_like(x[0])
            )
            merged = sum((w * k for w, k in zip(weights, elected, strict=True)), torch.zeros_like(x[0]))
            outputs.append(x[base] + merged / divisor.clamp(min=1e-6))
        size = torch.maximum(size, x[base].abs() + sum((k.abs() for k in kept), torch.zeros_like(x[0])))
    return Expected(outputs, size)


def task_vectors(
    x: Sequence[Tensor],
    kept: Sequence[Sequence[Tensor]],
    *,
    base: int,
    weight: Sequence[float],
    elect: bool,
    normalize: bool,
    rescale: bool,
    factor: float = 1.0,
) -> Expected:
    """The common part of all task-vector methods.

    Args:
        x: inputs.
        kept: alternative masks of the kept elements of each task vector; the first one is exact.
        base: index of the base.
        weight: weight of each input.
        elect: whether signs are elected.
        normalize: whether to divide by the weights.
        rescale: whether to restore the L1 norm.
        factor: value of lambda.
    """
    others = [i for i in range(len(x)) if i != base]
    outputs, size = [], torch.zeros_like(x[0])
    for choice in range(max(len(masks) for masks in kept)):
        terms = []
        for i, masks in zip(others, kept, strict=True):
            delta = x[i] - x[base]
            sparse = delta * masks[min(choice, len(masks) - 1)]
            before, after = float(delta.abs().sum()), float(sparse.abs().sum())
            if rescale and before >= 1e-7 and after >= 1e-7:
                sparse = sparse * (before / after)
            terms.append(weight[i] * sparse)
        for chosen in _elections(terms) if elect else [terms]:
            merged = sum(chosen, torch.zeros_like(x[0]))
            if normalize and elect:
                divisor = sum(
                    (weight[i] * (c != 0).double() for i, c in zip(others, chosen, strict=True)), torch.zeros_like(x[0])
                )
                divisor = torch.where(divisor == 0, 1.0, divisor)
            else:
                total = sum(weight[i] for i in others)
                divisor = torch.full_like(x[0], total if normalize and abs(total) >= 1e-8 else 1.0)
            outputs.append(x[base] + factor * merged / divisor)
            sizes = sum((t.abs() for t in terms), torch.zeros_like(x[0]))
            size = torch.maximum(size, x[base].abs() + abs(factor) * sizes / divisor.abs())
    return Expected(outputs, size)


def top_k(delta: Tensor, density: float) -> list[Tensor]:
    """The alternative masks of the max(1, int(density n)) largest elements."""
    if density >= 1:
        return [torch.ones_like(delta)]
    if density <= 0:
        return [torch.zeros_like(delta)]
    return _top(delta.abs(), max(1, int(density * delta.numel())))


def drop_outliers(delta: Tensor, density: float, gamma: float) -> list[Tensor]:
    """The alternative masks of the int(density n) elements that follow the int(gamma n) largest, or fewer."""
    if density >= 1:
        return [torch.ones_like(delta)]
    if density <= 0:
        return [torch.zeros_like(delta)]
    size = delta.numel()
    kept = int(density * size)
    dropped = min(int(gamma * size), size - kept)
    above, below = _top(delta.abs(), dropped), _top(delta.abs(), dropped + kept)
    return [(b - a).clamp(min=0) for a in above for b in below]


def _top(values: Tensor, number: int, *, ties: bool = False) -> list[Tensor]:
    """The mask of the largest values, and alternatives in which all values near the smallest one are in or out.

    Args:
        values: nonnegative values.
        number: number of values to select.
        ties: whether equal values count as near even if no others are, because rounding can make them unequal.
    """
    flat = values.reshape(-1)
    order = torch.argsort(flat, descending=True, stable=True)
    mask = torch.zeros_like(flat)
    mask[order[:number]] = 1
    masks = [mask]
    if 0 < number < len(flat):
        edge = float(flat[order[number - 1]])
        near = (flat - edge).abs() <= CLOSE * edge
        if ties or (near & (flat != edge)).any():  # rounding can make them equal, and then the first ones are kept
            masks += [torch.where(near, 1.0, mask), torch.where(near, 0.0, mask)]
    return [m.view(values.shape) for m in masks]


def _elections(terms: Sequence[Tensor]) -> list[list[Tensor]]:
    """The terms with the elected sign, the others 0, and an alternative with reversed close elections."""
    total = sum(terms, torch.zeros_like(terms[0]))
    size = sum((t.abs() for t in terms), torch.zeros_like(terms[0]))
    sign = torch.where(total >= 0, 1.0, -1.0)
    close = (total.abs() <= CLOSE * size) & (size > 0)
    signs = [sign, torch.where(close, -sign, sign)] if close.any() else [sign]
    return [[torch.where(t * s > 0, t, 0.0) for t in terms] for s in signs]


def _sum(terms: Sequence[Tensor]) -> Expected:
    zero = torch.zeros_like(terms[0])
    return Expected([sum(terms, zero)], sum((t.abs() for t in terms), zero))


DIRECT: dict[str, Callable[..., Expected]] = {
    "linear": linear,
    "passthrough": passthrough,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "sce": sce,
}
"""References that are called with the inputs, ``base=`` where there is one, and the parameters."""
