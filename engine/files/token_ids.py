"""Renumbers token ids in config.json and generation_config.json for the output's vocabulary."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..model.vocabularies.row_maps import ModelRows
from ..model.warnings import ModelWarning, ModelWarningKind

TOKEN_KEY = re.compile(r"\w+_token_ids?")
"""Keys whose values are ids of tokens."""


@dataclass(frozen=True, slots=True)
class Renumbering:
    """The rows of a model's tokens in the output.

    Args:
        rows: where the rows of the model's embeddings in the output come from; None if they are the same.
    """

    rows: ModelRows | None = None

    def __call__(self, row: int) -> int | None:
        """Return the row of the output that has a row of the model; None if there is none."""
        if self.rows is None:
            return row
        for first, source, length in self.rows.same.runs():
            if 0 <= source <= row < source + length:
                return first + row - source
        return None

    @property
    def changes(self) -> bool:
        """Whether any row has another number."""
        runs = () if self.rows is None else self.rows.same.runs()
        return any(source >= 0 and source != first for first, source, _ in runs)

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
