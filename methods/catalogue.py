"""Importing this module registers the built-in merge methods."""

from __future__ import annotations

from . import elementwise, geometric

__all__ = ["elementwise", "geometric"]
