"""mergeloom: merge model checkpoints as a task graph, within a memory budget."""

from __future__ import annotations

__version__ = "0.1.0"
