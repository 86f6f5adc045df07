"""Other names for the tensors of a model: `rename` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..nodes import Keys


@dataclass(frozen=True, slots=True)
class Rename:
    """Other names for the tensors of a model. Of several pairs, the first whose prefix a name has applies.

    Args:
        pairs: prefixes, each with its replacement.
        place: key path of the pairs in the recipe.
    """

    pairs: tuple[tuple[str, str], ...]
    place: Keys = field(default=(), compare=False)
