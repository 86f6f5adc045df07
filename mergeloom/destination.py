"""Whether OUT can take a merge: what stands there now, and how much room its disk has. Writes nothing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .display import Section
from .errors import DiskSpaceError, EnvironmentFailure, MergeloomError
from .io.output import refuse_foreign
from .wording import data_size


@dataclass(frozen=True, slots=True)
class Destination:
    """OUT, looked at.

    Args:
        path: of it.
        needed: bytes of the shards; the other files are small.
        free: bytes that its disk has free for this user.
        problem: what keeps a merge from being written there; None where nothing does.
    """

    path: Path
    needed: int
    free: int
    problem: MergeloomError | None

    def to_dict(self) -> dict[str, Any]:
        """As ``plan --json`` prints it. Sizes are in bytes."""
        problem = None if self.problem is None else str(self.problem)
        return {"path": str(self.path), "needed": self.needed, "free": self.free, "problem": problem}

    def section(self) -> Section:
        """As the dry run shows it."""
        fields = [
            ("path", str(self.path)),
            ("disk", f"{data_size(self.needed)} needed, {data_size(self.free)} free"),
            ("usable", "yes" if self.problem is None else "no"),
        ]
        return Section("Destination", fields, warns=self.problem is not None)


def look_at(out: Path, needed: int) -> Destination:
    """Whether `needed` bytes can be written to a new directory `out`."""
    free = shutil.disk_usage(_nearest(out)).free
    return Destination(out, needed, free, _problem(out, needed, free))


def _nearest(path: Path) -> Path:
    """The directory itself, or the one in which it would be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _problem(out: Path, needed: int, free: int) -> MergeloomError | None:
    try:
        refuse_foreign(out)
    except MergeloomError as error:
        return error
    parent = _nearest(out)
    if not parent.is_dir():
        return EnvironmentFailure(f"{out}: can't be made, since {parent} is a file; choose another OUT")
    if not os.access(parent, os.W_OK | os.X_OK):
        return EnvironmentFailure(f"{parent}: can't be written to; choose another OUT, or ask its owner")
    if free < needed:
        return DiskSpaceError(
            f"{out}: the output takes {data_size(needed)} and {data_size(free)} are free; make room, or choose "
            "another OUT"
        )
    return None
