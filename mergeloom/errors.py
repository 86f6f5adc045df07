"""The exceptions that mergeloom raises.

MergeloomError
├── RecipeError        the recipe is invalid                                 exit code 2
├── UsageError         the command line or an API argument is invalid        exit code 2
├── BudgetError        the merge exceeds the memory budget                   exit code 3
├── DiskSpaceError     the output exceeds the free disk space                exit code 3
├── CheckpointError    an input is missing, damaged or inconsistent          exit code 4
├── EnvironmentFailure the device, the disk or another process failed        exit code 5
└── Interrupted        the user stopped the merge; it can be resumed         exit code 130 (143 after SIGTERM)

Any other exception is an internal error, with exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

_SHOWN = 9
"""The number of mistakes that a RecipeError shows after the first."""


class MergeloomError(Exception):
    """The base class. The message says what is wrong, where, and what to do about it.

    Attributes:
        warnings: warnings that were found before the error and may explain it; commands print them first.
    """

    exit_code: ClassVar[int] = 1
    warnings: tuple[str, ...] = ()

    def add_warnings(self, warnings: Iterable[object]) -> None:
        """Add the text of each warning in front of `warnings`, without repeating one."""
        self.warnings = tuple(dict.fromkeys((*map(str, warnings), *self.warnings)))


class RecipeError(MergeloomError):
    """A mistake in the recipe, with its location.

    Args:
        message: what is wrong and what to do.
        source: file of the recipe; None for a recipe given as a dict.
        line: 1-based line number; None if unknown.
        path: key path of the mistake, such as ``("slices", 0, "sources", 1, "layer_range")``.
        more: other mistakes in the same recipe.
        unsupported: whether the recipe asks for something that mergeloom doesn't support yet.
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
        unsupported: bool = False,
    ) -> None:
        self.message = message
        self.source = source
        self.line = line
        self.path = path
        self.more = tuple(more)
        self.unsupported = unsupported
        location = str(source) if source is not None else "recipe"
        if line is not None:
            location += f":{line}"
        keys = format_key_path(path)
        texts = [f"{location}: {keys}: {message}" if keys else f"{location}: {message}", *map(str, self.more[:_SHOWN])]
        if len(self.more) > _SHOWN:
            texts.append(f"... and {len(self.more) - _SHOWN} more mistakes")
        super().__init__("\n".join(texts))

    @classmethod
    def together(cls, mistakes: Sequence[RecipeError]) -> RecipeError:
        """Combine all mistakes in a recipe into one error with the line and path of the first.

        They are in line order, but what is not supported comes last: no change of the recipe makes it work.
        """
        first, *others = sorted(mistakes, key=lambda mistake: (mistake.unsupported, mistake.line or 0))
        if not others:
            return first
        return cls(first.message, source=first.source, line=first.line, path=first.path, more=others)


class UsageError(MergeloomError):
    """An invalid command line or API argument."""

    exit_code = 2


class BudgetError(MergeloomError):
    """The merge exceeds the RAM or VRAM budget; the message names the smallest budget that works."""

    exit_code = 3


class DiskSpaceError(MergeloomError):
    """The output exceeds the free disk space; the message says how much is needed and how much is free."""

    exit_code = 3


class CheckpointError(MergeloomError):
    """An input is missing, damaged, inaccessible or inconsistent with another."""

    exit_code = 4


class EnvironmentFailure(MergeloomError):
    """The device, the disk or another process failed; trying again can help."""

    exit_code = 5


class Interrupted(MergeloomError):
    """The user stopped the merge; the same command resumes it."""

    exit_code = 130


def format_key_path(path: tuple[str | int, ...]) -> str:
    """Format a key path: ``("slices", 0, "sources")`` as ``slices[0].sources``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else key)
    return text
