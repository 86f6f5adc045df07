"""Imports the built-in merge methods, which registers them."""

from __future__ import annotations

from . import elementwise, fusion, geometric, ram, sce, task_arithmetic

__all__ = ["elementwise", "fusion", "geometric", "ram", "sce", "task_arithmetic"]
