"""The plan as a fragment of HTML for the output of a notebook's cell: no script, no request, bounded in size."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING

from ...io.units import plural
from .page import page_parts

if TYPE_CHECKING:
    from ...engine.run.plan import Plan

MAX_BYTES = 100_000
"""Approximate maximum size of the fragment in bytes."""
_CLASS = "mergeloom"


def make_fragment(plan: Plan) -> str:
    """Return the plan as HTML whose styles apply to nothing else on the notebook's page.

    Parts of the page that would make the fragment too large are left out, and it says how many.
    """
    parts = [f"<style>{_scoped(_page_style())}</style>"]
    size, omitted = len(parts[0]), 0
    for part in filter(None, page_parts(plan)):
        nbytes = len(part.encode())
        if size + nbytes > MAX_BYTES:
            omitted += 1
            continue
        parts.append(part)
        size += nbytes
    if omitted:
        parts.append(f"<footer>{plural(omitted, 'part')} too large for a notebook: see mergeloom plan --html</footer>")
    return f'<div class="{_CLASS}">{"".join(parts)}</div>'


def _page_style() -> str:
    """Return the style sheet of the page."""
    page = (files(__package__) / "page.html").read_text(encoding="utf-8")
    return page.partition("<style>")[2].partition("</style>")[0]


def _scoped(style: str) -> str:
    """Return a style sheet whose rules apply only inside of the fragment; those for the page apply to the fragment."""

    def scope(match: re.Match[str]) -> str:
        selectors = match[1].strip()
        if selectors.startswith("@"):
            return f"{selectors} {{"
        scoped = (
            f".{_CLASS}" if selector.strip() in (":root", "body", "main") else f".{_CLASS} {selector.strip()}"
            for selector in selectors.split(",")
        )
        return f"{', '.join(scoped)} {{"

    return re.sub(r"([^{}]+)\{", scope, style)
