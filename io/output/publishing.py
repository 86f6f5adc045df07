"""The journal record that starts publishing: the names of all files that are about to be renamed into OUT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Publishing:
    """The files below get their final names from here on.

    Args:
        names: names of the files, relative to OUT.
    """

    names: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the record as the journal stores it."""
        return {"publish": list(self.names)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Publishing | None:
        """Parse a record. Return None if it is of another type or malformed. Names that are not text are dropped."""
        names = record.get("publish")
        if not isinstance(names, list):
            return None
        return cls(tuple(name for name in names if isinstance(name, str)))
