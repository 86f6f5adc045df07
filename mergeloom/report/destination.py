"""What `plan` says about OUT."""

from __future__ import annotations

from ..engine.run.destination import Destination
from ..io.output.lock import Content
from ..io.units import data_size
from .sections import Section

_USABLE = {
    Content.NEW: "yes",
    Content.UNFINISHED: "yes: it holds an unfinished merge, which `merge` resumes",
    Content.FINISHED: "yes: it holds this merge, finished",
}


def destination_section(found: Destination) -> Section:
    """As the dry run shows it."""
    fields = [
        ("path", str(found.path)),
        ("disk", f"{data_size(found.needed)} needed, {data_size(found.free)} free"),
        ("usable", _USABLE[found.content] if found.problem is None else "no"),
    ]
    return Section("Destination", fields, warns=found.problem is not None)
