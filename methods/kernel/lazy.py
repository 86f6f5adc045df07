"""torch, numpy, and what imports torch itself: imported when first used, so that planning and `--help` do without."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class _Lazy:
    """A module that is imported at the first look at one of its attributes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next look finds it without coming here
        return value


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether numpy can work on the tensor's memory. What both can do, torch does; the results are the same."""
    return tensor.device.type == "cpu"


if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch

    from . import mask_ops as random_scripts
    from . import ops as scripts
else:
    numpy = _Lazy("numpy")
    torch = _Lazy("torch")
    scripts = _Lazy(f"{__package__}.scripts")
    random_scripts = _Lazy(f"{__package__}.random_scripts")
