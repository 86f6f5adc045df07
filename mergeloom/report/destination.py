"""The output directory in the dry run."""

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


def destination_section(destination: Destination) -> Section:
    """Describe OUT: its path, its disk space, and whether it can be used."""
    fields = [
        ("path", str(destination.path)),
        ("disk", f"{data_size(destination.needed)} needed, {data_size(destination.free)} free"),
        ("usable", _USABLE[destination.content] if destination.problem is None else "no"),
    ]
    return Section("Destination", fields, warns=destination.problem is not None)
