"""Imports the built-in merge methods, which registers them."""

from __future__ import annotations

from . import arcee_fusion, linear, nearswap, passthrough, ram, ramplus_tl, sce  # noqa: F401
from .spherical import karcher, model_stock, multislerp, nuslerp, slerp  # noqa: F401
from .task_vectors import breadcrumbs, breadcrumbs_ties, dare_linear, dare_ties  # noqa: F401
from .task_vectors import della, della_linear, task_arithmetic, ties  # noqa: F401
