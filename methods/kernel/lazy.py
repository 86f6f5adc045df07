"""Lazy imports of torch and numpy, which planning and `--help` do not need."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class LazyModule:
    """A module that is imported on first access to an attribute."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # cached: __getattr__ is not called again
        return value


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in CPU memory, where numpy can access it. numpy and torch give the same results."""
    return tensor.device.type == "cpu"


if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
else:
    numpy = LazyModule("numpy")
    torch = LazyModule("torch")
