"""Methods that combine task vectors, the differences of the models from a base."""

from __future__ import annotations

from . import breadcrumbs, breadcrumbs_ties, dare_linear, dare_ties, della, della_linear, task_arithmetic, ties  # noqa: F401
