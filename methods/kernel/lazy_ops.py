"""Lazy imports of the modules `ops` and `mask_ops`, which import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import LazyModule

if TYPE_CHECKING:
    from . import mask_ops, ops
else:
    mask_ops = LazyModule(f"{__package__}.mask_ops")
    ops = LazyModule(f"{__package__}.ops")

__all__ = ["mask_ops", "ops"]
