"""What a method computes for given parameters, by the references in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tests.support.methods import reference

WITHOUT_BASE = frozenset(("linear", "passthrough", "karcher"))
"""Methods for which a base model is one of the models."""

Masks = Callable[[], Sequence[Sequence[Tensor]]]


def expected(
    method: str, x: Sequence[Tensor], *, base: int | None, parameters: Mapping[str, Any], drawn: Masks
) -> reference.Expected:
    """The valid outputs of a method.

    Args:
        method: name of the method.
        x: inputs in float64.
        base: index of the base, or None.
        parameters: values by name, a sequence for each per-input parameter; defaults for the others.
        drawn: function that returns the mask of each task vector, for methods that sample.
    """
    values = {("factor" if name == "lambda" else name): value for name, value in parameters.items()}
    if method in reference.DIRECT:
        if method not in WITHOUT_BASE:
            values["base"] = base
        return reference.DIRECT[method](x, **values)
    assert base is not None
    density = values.pop("density", (1.0,) * len(x))
    gamma = values.pop("gamma", (0.01,) * len(x))
    values.pop("epsilon", None)
    unbiased = values.pop("unbiased", False)
    deltas = {i: x[i] - x[base] for i in range(len(x)) if i != base}
    kept: Sequence[Sequence[Tensor]]
    if method in ("ties", "task_arithmetic"):
        kept = [reference.top_k(delta, density[i]) for i, delta in deltas.items()]
    elif method.startswith("breadcrumbs"):
        kept = [reference.drop_outliers(delta, density[i], gamma[i]) for i, delta in deltas.items()]
    else:
        kept = drawn()
    random = method.startswith(("dare", "della"))
    values.setdefault("normalize", method in ("ties", "della"))
    values["rescale"] = values.get("rescale", random) and not unbiased
    elect = method in ("ties", "dare_ties", "della", "breadcrumbs_ties")
    return reference.task_vectors(x, kept, base=base, elect=elect, **values)
