"""Finds the modules of an adapter whose weights are stored as [in, out] instead of [out, in]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....methods.kernel.access import Shape
from .changes import A, B
from .loaded import Adapter

_CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))
_CONV1D = frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))
"""Modules of these models that transformers makes of `Conv1D`, whose weight is [in, out]."""


def transposed_modules(
    adapter: Adapter, config: Mapping[str, Any] | None, shape_of: Callable[[str], Shape]
) -> frozenset[str]:
    """Return the modules with factors whose weights are stored as [in, out].

    In the models of GPT-2's kind, names decide: PEFT's `fan_in_fan_out` is that of the last module there. In others,
    PEFT ignores it for linear layers (peft 0.21.2, ``tuners/lora/layer.py``, `dispatch_default`), so it only means
    something if a matrix doesn't fit otherwise, or if a square one has a name that GPT-2's kind uses.

    Args:
        adapter: the adapter.
        config: config.json of the base, or None.
        shape_of: function that returns the shape of a module's weight.
    """
    modules = {module: stored for module, stored in adapter.changes.modules.items() if A in stored and B in stored}
    of_conv1d = frozenset(module for module in modules if module.rpartition(".")[2] in _CONV1D)
    if (config or {}).get("model_type") in _CONV1D_MODELS:
        return of_conv1d
    if adapter.config.fan_in_fan_out:
        for module, stored in modules.items():
            product = (*stored[B].ref.shape[:1], *stored[A].ref.shape[1:])
            if product != product[::-1] == shape_of(module):
                return frozenset(modules)
        return of_conv1d
    return frozenset()
