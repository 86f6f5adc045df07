"""Renumbers token ids in config.json and generation_config.json for the output's vocabulary."""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property
from operator import itemgetter
from typing import Any

from ..model.vocabularies.row_maps import ModelRows
from ..model.warnings import ModelWarning, ModelWarningKind

TOKEN_KEY = re.compile(r"\w+_token_ids?")
"""Keys whose values are ids of tokens."""


class Renumbering:
    """The rows of a model's tokens in the output.

    Args:
        rows: where the rows of the model's embeddings in the output come from; None if they are the same.
    """

    def __init__(self, rows: ModelRows | None = None) -> None:
        self._same = None if rows is None else rows.same

    def __call__(self, row: int) -> int | None:
        """Return the row of the output that has a row of the model; None if there is none."""
        if self._same is None:
            return row
        place = bisect_right(self._runs, row, key=itemgetter(0)) - 1
        if place < 0:
            return None
        source, first, length = self._runs[place]
        return first + row - source if row < source + length else None

    @property
    def changes(self) -> bool:
        """Whether any row has another number."""
        return any(source != first for source, first, _ in self._runs)

    @cached_property
    def _runs(self) -> list[tuple[int, int, int]]:
        """For each run of the model's rows, in their order, its first row, the output's first row, and its length."""
        runs = () if self._same is None else self._same.runs()
        return sorted((source, first, length) for first, source, length in runs if source >= 0)

    def apply(self, content: Mapping[str, Any], sections: tuple[str, ...] = ("text_config",)) -> dict[str, Any]:
        """Return the content of a file with the output's ids; those of tokens that the output lacks stay.

        Args:
            content: content of config.json or generation_config.json.
            sections: keys of the sections that name tokens, too.
        """
        renumbered = copy.deepcopy(dict(content))
        inner = [section for key in sections if isinstance(section := renumbered.get(key), dict)]
        for section in (renumbered, *inner):
            for key, value in section.items():
                if TOKEN_KEY.fullmatch(key):
                    section[key] = [self._id(each) for each in value] if isinstance(value, list) else self._id(value)
        return renumbered

    def _id(self, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return value
        found = self(value)
        return value if found is None else found

    def lost(self, content: Mapping[str, Any], file: str, model: str) -> Iterator[ModelWarning]:
        """Yield a warning if a file names tokens that the output lacks."""
        ids = {
            f"{key} {each}"
            for key, value in content.items()
            if TOKEN_KEY.fullmatch(key)
            for each in (value if isinstance(value, list) else [value])
            if isinstance(each, int) and not isinstance(each, bool) and each >= 0 and self(each) is None
        }
        if ids:
            yield ModelWarning(
                ModelWarningKind.TOKENS,
                f"{file} of {model} names tokens that the output's vocabulary lacks: {', '.join(sorted(ids))}",
                f"correct {file} of the output, or choose a vocabulary that has them with `tokenizer_source`",
                tuple(sorted(ids)),
            )


def changed_ids(content: Mapping[str, Any], ids: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file with other values of some keys."""
    return (json.dumps({**content, **ids}, indent=2, ensure_ascii=False) + "\n").encode()
