"""The exceptions that mergeloom raises.

MergeloomError
├── RecipeError        the recipe is invalid                                 exit code 2
├── UsageError         the command line or an API argument is invalid        exit code 2
├── BudgetError        the merge exceeds the memory budget                   exit code 3
├── DiskSpaceError     the output exceeds the free disk space                exit code 3
├── CheckpointError    an input is missing, damaged or inconsistent          exit code 4
│   └── ModelNotFound  a name is neither a path nor a model of the Hub
├── EnvironmentFailure the device, the disk or another process failed        exit code 5
│   └── HubUnreachable the Hub can't be asked for a model
└── Interrupted        the user stopped the merge; it can be resumed         exit code 130 (143 after SIGTERM)

Any other exception is an internal error, with exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

_SHOWN = 9
"""The number of mistakes that a RecipeError shows after the first."""


class MergeloomError(Exception):
    """The base class. The message says what is wrong, where, and what to do about it.

    Attributes:
        warnings: warnings that were found before the error and may explain it; commands print them first.
        has_location: whether the message begins with a location in the recipe, or does not need one.
    """

    exit_code: ClassVar[int] = 1
    warnings: tuple[str, ...] = ()
    has_location: bool = False

    def add_warnings(self, warnings: Iterable[object]) -> None:
        """Add the text of each warning in front of `warnings`, without repeating one."""
        self.warnings = tuple(dict.fromkeys((*map(str, warnings), *self.warnings)))

    def add_location(self, location: Location) -> None:
        """Begin the message with a location in the recipe, unless it has one."""
        if not self.has_location:
            self.args = (f"{location}: {self}",)
            self.has_location = True


@dataclass(frozen=True, slots=True)
class Location:
    """The location of an entry of a recipe.

    Args:
        source: file of the recipe; None for a recipe given as a dict.
        line: 1-based line number; None if unknown, or if an override has set the entry.
        path: key path of the entry, such as ``("slices", 0, "sources", 1, "layer_range")``.
        override: overrides that have set the entry or a part, such as ``--set dtype=float32``; None if none has.
    """

    source: Path | None = None
    line: int | None = None
    path: tuple[str | int, ...] = ()
    override: str | None = None

    def __str__(self) -> str:
        """File, line, override and keys: ``r.yml:3: models[0].model``, ``r.yml with --set dtype=float32: dtype``."""
        text = str(self.source) if self.source is not None else "recipe"
        if self.line is not None:
            text += f":{self.line}"
        if self.override is not None:
            text += f" with {self.override}"
        keys = format_key_path(self.path)
        return f"{text}: {keys}" if keys else text


class RecipeError(MergeloomError):
    """A mistake in the recipe, with its location.

    Args:
        message: what is wrong and what to do.
        source: file of the recipe; None for a recipe given as a dict.
        line: 1-based line number; None if unknown, or if an override has set the value.
        path: key path of the mistake, such as ``("slices", 0, "sources", 1, "layer_range")``.
        override: overrides that have set the value or a part, such as ``--set dtype=float32``; None if none has.
        more: other mistakes in the same recipe.
        advice: what to do, after the message; it is shown once for all mistakes that have it in common.
        unsupported: whether the recipe asks for something that mergeloom doesn't support yet.
    """

    exit_code = 2
    has_location = True

    def __init__(
        self,
        message: str,
        *,
        source: Path | None = None,
        line: int | None = None,
        path: tuple[str | int, ...] = (),
        override: str | None = None,
        more: Sequence[RecipeError] = (),
        advice: str = "",
        unsupported: bool = False,
    ) -> None:
        self.message = message + advice
        self.source = source
        self.line = line
        self.path = path
        self.override = override
        self.more = tuple(more)
        self.advice = advice
        self.unsupported = unsupported
        self._short = f"{self.location}: {message}"
        texts, given = [self._short + advice], {advice}
        for mistake in self.more[:_SHOWN]:
            repeated = mistake.advice and mistake.advice in given
            texts.append(mistake._short if repeated else str(mistake))
            given.add(mistake.advice)
        if len(self.more) > _SHOWN:
            texts.append(f"... and {len(self.more) - _SHOWN} more mistakes")
        super().__init__("\n".join(texts))

    @property
    def location(self) -> Location:
        """The location of the mistake."""
        return Location(self.source, self.line, self.path, self.override)

    @classmethod
    def at(
        cls,
        location: Location,
        message: str,
        *,
        more: Sequence[RecipeError] = (),
        advice: str = "",
        unsupported: bool = False,
    ) -> RecipeError:
        """Create the error for a mistake at a location; the other arguments are those of the class."""
        return cls(
            message,
            source=location.source,
            line=location.line,
            path=location.path,
            override=location.override,
            more=more,
            advice=advice,
            unsupported=unsupported,
        )

    @classmethod
    def together(cls, mistakes: Sequence[RecipeError]) -> RecipeError:
        """Combine all mistakes in a recipe into one error with the line and path of the first.

        They are in line order, but what is not supported comes last: no change of the recipe makes it work.
        """
        first, *others = sorted(mistakes, key=lambda mistake: (mistake.unsupported, mistake.line or 0))
        if not others:
            return first
        return cls.at(first.location, first.message.removesuffix(first.advice), more=others, advice=first.advice)


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


class ModelNotFound(CheckpointError):
    """A name of a model is neither an existing path nor a model and revision of the Hub that this account can see."""


class EnvironmentFailure(MergeloomError):
    """The device, the disk or another process failed; trying again can help."""

    exit_code = 5


class HubUnreachable(EnvironmentFailure):
    """A name of a model isn't an existing path, and the Hub doesn't answer whether it has the model."""


class Interrupted(MergeloomError):
    """The user stopped the merge; the same command resumes it."""

    exit_code = 130


def format_key_path(path: tuple[str | int, ...]) -> str:
    """Format a key path: ``("slices", 0, "sources")`` as ``slices[0].sources``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else key)
    return text
