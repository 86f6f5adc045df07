"""torch and numpy, imported when they are first used: planning and `--help` do without them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class LazyModule:
    """A module that is imported at the first access to one of its attributes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next access finds it without this call
        return value


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether numpy can work on the tensor's memory. numpy and torch give the same results."""
    return tensor.device.type == "cpu"


if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
else:
    numpy = LazyModule("numpy")
    torch = LazyModule("torch")
