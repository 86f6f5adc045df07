"""Imports the built-in merge methods, which registers them."""

from __future__ import annotations

from . import arcee_fusion, linear, nearswap, passthrough, ram, ramplus_tl, sce, spherical, task_vectors  # noqa: F401
