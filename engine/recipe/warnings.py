"""The warnings about a recipe, as data: what is wrong, where, and which key was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from ...errors import Location, RecipeError
from .nodes import Keys


class WarningKind(Enum):
    """The kinds of warnings about a recipe."""

    UNKNOWN_KEY = "unknown key"
    UNKNOWN_PARAMETER = "unknown parameter"
    NO_EFFECT = "no effect"
    DUPLICATE_KEY = "duplicate key"
    DUPLICATE_MODEL = "duplicate model"
    UNREACHABLE = "unreachable condition"
    UNUSED_STAGE = "unused stage"


_IGNORED = frozenset((WarningKind.UNKNOWN_KEY, WarningKind.UNKNOWN_PARAMETER))
"""The kinds of entries that are skipped, which the warning's text says."""


@dataclass(frozen=True, slots=True)
class RecipeWarning:
    """A problem in a recipe that does not prevent the merge.

    Args:
        kind: kind of the problem.
        problem: description of the problem, without its location.
        advice: what to do about it, or empty.
        suggestion: the known name that was probably meant, or None.
        source: the recipe's file, or None.
        line: line of the entry, or None.
        place: keys that lead to the entry.
        override: override that has set the entry, such as ``--set dtype=float32``, or None.
    """

    kind: WarningKind
    problem: str
    advice: str = ""
    suggestion: str | None = None
    source: Path | None = None
    line: int | None = None
    place: Keys = ()
    override: str | None = None

    @classmethod
    def at(
        cls, location: Location, kind: WarningKind, problem: str, *, advice: str = "", suggestion: str | None = None
    ) -> RecipeWarning:
        """Create the warning about the entry at a location; the other arguments are those of the class."""
        source, line, place = location.source, location.line, location.path
        return cls(kind, problem, advice, suggestion, source, line, place, location.override)

    def __str__(self) -> str:
        """File, line, keys, problem and advice in one line."""
        ignored = ", ignored" if self.kind in _IGNORED else ""
        return str(self._located(f"{self.problem}{ignored}{self._advice}"))

    @property
    def located_problem(self) -> str:
        """File, line, keys and problem, without the advice."""
        return str(self._located(self.problem))

    def as_error(self) -> RecipeError:
        """The error to raise instead of the warning in strict mode."""
        return self._located(self.problem, self._advice)

    @property
    def _advice(self) -> str:
        return f"; {self.advice}" if self.advice else ""

    def _located(self, text: str, advice: str = "") -> RecipeError:
        return RecipeError.at(Location(self.source, self.line, self.place, self.override), text, advice=advice)


def shortened(warnings: Iterable[RecipeWarning]) -> list[RecipeWarning]:
    """The warnings, of which only the first has the advice that several with the same problem have in common."""
    found: list[RecipeWarning] = []
    given: set[tuple[WarningKind, str, str]] = set()
    for warning in warnings:
        key = (warning.kind, warning.problem, warning.advice)
        found.append(replace(warning, advice="") if key in given else warning)
        given.add(key)
    return found
