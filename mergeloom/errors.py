"""Everything that mergeloom raises on purpose.

MergeloomError
├── RecipeError        the recipe is wrong                                   exit code 2
├── UsageError         the command line, or a call of the API, is wrong      exit code 2
├── BudgetError        the merge does not fit the memory budget              exit code 3
├── DiskSpaceError     the merge does not fit the disk                       exit code 3
├── CheckpointError    an input is missing, damaged, forbidden, inconsistent exit code 4
├── EnvironmentFailure the device, the disk or another process got in the way exit code 5
└── Interrupted        the user stopped the merge; it can go on              exit code 130

Any other exception is a bug of ours, and ends the process with exit code 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

_SHOWN = 9
"""How many mistakes a RecipeError shows after the first."""


class MergeloomError(Exception):
    """The root. Its text says what was found, where, and what to do about it."""

    exit_code: ClassVar[int] = 1


class RecipeError(MergeloomError):
    """A mistake in the recipe, with the place where it stands.

    Args:
        message: what was found and what to do.
        source: the recipe's file, or None for a recipe given as a dict.
        line: the 1-based line, where known.
        path: the keys that lead to the place, such as ``("slices", 0, "sources", 1, "layer_range")``.
        more: other mistakes in the same recipe.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        source: Path | None = None,
        line: int | None = None,
        path: tuple[str | int, ...] = (),
        more: Sequence[RecipeError] = (),
    ) -> None:
        self.message = message
        self.source = source
        self.line = line
        self.path = path
        self.more = tuple(more)
        place = str(source) if source is not None else "recipe"
        if line is not None:
            place += f":{line}"
        keys = format_key_path(path)
        texts = [f"{place}: {keys}: {message}" if keys else f"{place}: {message}", *map(str, self.more[:_SHOWN])]
        if len(self.more) > _SHOWN:
            texts.append(f"... and {len(self.more) - _SHOWN} more mistakes")
        super().__init__("\n".join(texts))

    @classmethod
    def together(cls, mistakes: Sequence[RecipeError]) -> RecipeError:
        """One error for all of a recipe's mistakes, in the order of their lines; the first gives it line and path."""
        first, *others = sorted(mistakes, key=lambda mistake: mistake.line or 0)
        if not others:
            return first
        return cls(first.message, source=first.source, line=first.line, path=first.path, more=others)


class UsageError(MergeloomError):
    """A mistake on the command line or in a call of the API."""

    exit_code = 2


class BudgetError(MergeloomError):
    """The merge does not fit the RAM or VRAM budget; the text names the smallest budget that works."""

    exit_code = 3


class DiskSpaceError(MergeloomError):
    """The output does not fit the disk; the text says what is needed and what is free."""

    exit_code = 3


class CheckpointError(MergeloomError):
    """An input is missing, damaged, forbidden or inconsistent with another."""

    exit_code = 4


class EnvironmentFailure(MergeloomError):
    """The device, the disk or another process got in the way; trying again can help."""

    exit_code = 5


class Interrupted(MergeloomError):
    """The user stopped the merge; the same command goes on with it."""

    exit_code = 130


def format_key_path(path: tuple[str | int, ...]) -> str:
    """``("slices", 0, "sources")`` as ``slices[0].sources``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else key)
    return text
