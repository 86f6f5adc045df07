"""Imports the built-in merge methods, which registers them."""

from __future__ import annotations

from . import arcee_fusion, linear, nearswap, passthrough, ram, ramplus_tl, sce
from .spherical import karcher, model_stock, multislerp, nuslerp, slerp
from .task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    task_arithmetic,
    ties,
)

__all__ = [
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]
