"""Methods based on angles between tensors, or between rows or columns of them."""

from __future__ import annotations

from . import karcher, model_stock, multislerp, nuslerp, slerp  # noqa: F401
