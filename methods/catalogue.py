"""Importing this module registers the built-in merge methods."""

from __future__ import annotations

from . import elementwise, geometric, task_arithmetic

__all__ = ["elementwise", "geometric", "task_arithmetic"]
