"""The options of an extraction, and their checks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ....errors import UsageError


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """The options that determine the bytes of an adapter.

    Args:
        rank: rank of each pair of factors; less for matrices with a shorter side.
        embed: whether embeddings and heads get factors, too, rather than being saved in full.
        low_rank_only: whether everything without factors is left out.
        include: regular expressions; only tensors whose name one of them finds are extracted. All if empty.
        exclude: regular expressions; tensors whose name one of them finds are left out.
        seed: seed of the randomized decomposition.

    Raises:
        UsageError: an option is invalid.
    """

    rank: int
    embed: bool = False
    low_rank_only: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    _patterns: tuple[list[re.Pattern[str]], list[re.Pattern[str]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"invalid rank {self.rank}: use 1 or more")
        if self.seed < 0:
            raise UsageError(f"invalid seed {self.seed}: use 0 or more")
        patterns = _compiled("include", self.include), _compiled("exclude", self.exclude)
        object.__setattr__(self, "_patterns", patterns)

    def selects(self, name: str) -> bool:
        """Whether the tensor with this name is to be extracted."""
        include, exclude = self._patterns
        return (not include or any(each.search(name) for each in include)) and not any(
            each.search(name) for each in exclude
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, for the journal and the report."""
        return {
            "rank": self.rank,
            "embed": self.embed,
            "low_rank_only": self.low_rank_only,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "seed": self.seed,
        }


def _compiled(option: str, patterns: Iterable[str]) -> list[re.Pattern[str]]:
    found = []
    for pattern in patterns:
        try:
            found.append(re.compile(pattern))
        except re.error as error:
            raise UsageError(f"--{option} {pattern!r} is not a valid regular expression: {error}") from error
    return found
