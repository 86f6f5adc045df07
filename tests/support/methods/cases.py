"""Ways to call every registered method, and inputs for them: for the conformance suite and the golden digests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor

from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.kernel import Kernel
from mergeloom.methods.kernel.spec import InputSpec


@dataclass(frozen=True)
class Case:
    """One way to call a method.

    Args:
        method: its name.
        models: how many inputs, the base included.
        base: which of them is the base.
        parameters: as in a recipe.
    """

    method: str
    models: int
    base: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.parameters.items())])

    def kernel(self, inputs: Sequence[Tensor]) -> Kernel:
        bound = InputSpec(len(inputs), self.base, tuple(inputs[0].shape))
        return merge_methods()[self.method].kernel(bound, self.parameters)


W3 = (0.7, 1.0, 0.4)
W4 = (0.0, 0.5, 0.3, 0.4)
D4 = (0.0, 0.3, 0.55, 0.9)
TASK = {"weight": W4, "density": D4}
CASES = [
    Case("linear", 3, None, {"weight": W3}),
    Case("linear", 3, None, {"weight": (0.7, -1.0, 0.4), "normalize": False}),
    Case("passthrough", 1, None, {"scale": (0.3,)}),
    Case("passthrough", 1),
    Case("slerp", 2, 0, {"t": 0.3}),
    Case("slerp", 2, 1, {"t": 1.2, "dot_threshold": 1.0}),
    Case("nuslerp", 2, None, {"weight": (0.5, 1.5)}),
    Case("nuslerp", 3, 0, {"weight": W3}),
    Case("nuslerp", 3, 2, {"weight": W3, "nuslerp_flatten": False}),
    Case("nuslerp", 3, 0, {"weight": W3, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    Case("nuslerp", 2, None, {"weight": (1.0, -1.0)}),
    Case("multislerp", 3, None, {"weight": W3}),
    Case("multislerp", 4, 0, {"weight": W4, "normalize_weights": False}),
    Case("karcher", 3),
    Case("karcher", 3, None, {"max_iter": 1}),
    Case("model_stock", 4, 0),
    Case("model_stock", 4, 1, {"filter_wise": True}),
    Case("task_arithmetic", 4, 0, {"weight": W4, "lambda": 0.7}),
    Case("task_arithmetic", 4, 0, {"weight": W4, "normalize": True}),
    Case("ties", 4, 0, TASK),
    Case("ties", 4, 0, TASK | {"normalize": False, "rescale": True, "lambda": 1.3}),
    Case("ties", 4, 0, {"weight": (0.0, 1.0, -1.0, 1.0), "density": (0.0, 0.001, 1.0, 0.0)}),
    Case("dare_linear", 4, 0, TASK),
    Case("dare_linear", 4, 0, TASK | {"unbiased": True, "normalize": True}),
    Case("dare_ties", 4, 0, TASK),
    Case("dare_ties", 4, 3, {"weight": (1.0, 1.0, 1.0, 0.0), "density": (0.0, 1.0, 0.5, 1.0), "rescale": False}),
    Case("della", 4, 0, TASK | {"epsilon": (0.0, 0.1, 0.2, 0.05)}),
    Case("della_linear", 4, 0, TASK | {"epsilon": (0.0, 0.1, 0.2, 0.05), "unbiased": True}),
    Case("breadcrumbs", 4, 0, TASK),
    Case("breadcrumbs", 4, 0, TASK | {"gamma": (0.0, 0.9, 0.0, 0.05)}),
    Case("breadcrumbs_ties", 4, 0, TASK | {"gamma": (0.0, 0.2, 0.1, 0.01)}),
    Case("sce", 4, 0),
    Case("sce", 4, 0, {"select_topk": 0.4}),
    Case("nearswap", 2, 0, {"t": 0.0005}),
    Case("arcee_fusion", 2, 0),
    Case("ram", 4, 0),
    Case("ram", 4, 0, {"epsilon": 0.0005}),
    Case("ramplus_tl", 4, 0, {"epsilon": 0.0005, "r": 0.7, "alpha": 0.9}),
]


def make(kind: str, models: int, shape: tuple[int, ...], base: int | None = None) -> list[Tensor]:
    """Fine-tunes of one model, not to be changed.

    Args:
        kind: "lattice" for bfloat16, whose differences are full of ties; otherwise a dtype, or "mixed".
        models: number of inputs, the base included.
        shape: shape of each.
        base: index of the base, if there is one.
    """
    return list(_made(kind, models, shape, base))


@lru_cache(maxsize=16)  # drawing them takes longer than most merges
def _made(kind: str, models: int, shape: tuple[int, ...], base: int | None) -> tuple[Tensor, ...]:
    generator = numpy.random.default_rng(sum(shape) + models)  # torch's normal numbers depend on the instruction set
    start = torch.tensor(generator.standard_normal(shape, dtype=numpy.float32)) * 0.02
    made = []
    for i in range(models):
        step = torch.tensor(generator.standard_normal(shape, dtype=numpy.float32))
        step = step * (0.0007 if base is not None else 0.01)
        x = start if i == base else start + step
        if kind == "lattice":
            x = x.to(torch.bfloat16)
        elif kind == "mixed":
            x = x.to((torch.float32, torch.float16, torch.bfloat16)[i % 3])
        elif kind == "float64":
            x = x.double() + step.double() * 1e-7
        made.append(x)
    return tuple(made)
