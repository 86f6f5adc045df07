"""Reads `rename`: prefixes of a model's tensor names, and what replaces them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ....errors import RecipeError
from ..nodes import Keys, Node
from ..types import Stage
from .model_reference import ModelReference
from .rename import Rename

_FORM = "pairs of prefix and replacement, such as `[[language_model.model., model.]]`"


class _MakeError(Protocol):
    def __call__(self, message: str, path: Keys, *causes: Keys) -> RecipeError: ...


class Renames:
    """The renamings of a recipe. One that an entry states holds wherever the recipe uses the model.

    Args:
        error: function that creates the error for an entry, as `NodeReader.error`.

    Attributes:
        found: the renamings by model.
    """

    def __init__(self, error: _MakeError) -> None:
        self._error = error
        self.found: dict[ModelReference, Rename] = {}

    def read(self, model: ModelReference, keys: Mapping[str, Node], path: Keys) -> None:
        """Read `rename` of an entry that names a model, if it has one.

        Raises:
            RecipeError: if it isn't a list of pairs, a pair has no effect or makes invalid names, or another entry of
                the model has other pairs.
        """
        node = keys.get("rename")
        if node is None or node.value is None:
            return
        place = (*path, "rename")
        rename = Rename(self._pairs(node, place), place)
        model = model.base  # an adapter changes values, not names
        known = self.found.setdefault(model, rename)
        if known != rename:
            message = f"{model.text} has another `rename` elsewhere: one entry is enough, since it holds for all others"
            raise self._error(message, place, known.place)

    def check_stages(self, stages: Sequence[Stage]) -> None:
        """Check that no stage is renamed. Raises RecipeError."""
        for model, rename in self.found.items():
            if model.revision is None and any(stage.name == model.path for stage in stages):
                message = f"{model.text} is a stage, whose tensors have the names of its own models: rename those"
                raise self._error(message, rename.place)

    def _pairs(self, node: Node, place: Keys) -> tuple[tuple[str, str], ...]:
        entries = node.value if isinstance(node.value, tuple) else ()
        texts = [entry.value for entry in entries]
        if len(texts) == 2 and all(isinstance(text, str) for text in texts):
            raise self._error(f"expected {_FORM}: write `[[{texts[0]}, {texts[1] or chr(39) * 2}]]`", place)
        pairs: list[tuple[str, str]] = []
        for index, entry in enumerate(entries):
            pair = [child.value for child in entry.value] if isinstance(entry.value, tuple) else []
            old, new = pair if len(pair) == 2 else (None, None)
            if not isinstance(old, str) or not isinstance(new, str):
                raise self._error("expected a prefix and its replacement, both texts ('' for none)", (*place, index))
            if problem := _problem(old, new, pairs):
                raise self._error(problem, (*place, index))
            pairs.append((old, new))
        if not pairs:
            raise self._error(f"expected {_FORM}", place)
        return tuple(pairs)


def _problem(old: str, new: str, before: Sequence[tuple[str, str]]) -> str:
    """What is wrong with a pair after the others before it; empty if nothing is."""
    covering = next((other for other, _ in before if old.startswith(other)), None)
    if covering is not None:
        return (
            f"{old!r} is never replaced: every name with it begins with {covering!r}, which comes first; list longer "
            "prefixes before shorter ones"
        )
    if not old and not new.endswith("."):
        return f"the replacement of the empty prefix is put before all other names: end it with a dot, `{new}.`"
    if old and new and old.endswith(".") != new.endswith("."):
        return f"{old!r} becomes {new!r}, and only one of them ends with a dot: names would lose a dot, or get two"
    return ""
