"""The models that published recipes name: written once, and linked into a directory under the recipe's names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path

from torch import Tensor

from tests.support.outputs import read_model
from tests.support.published.other_families import FAMILIES
from tests.support.published.table import Case
from tests.support.published.variants import stored_dtype, write_model

FILE = "/model.safetensors"


class Library:
    """Fine-tunes of all families, written when they are first needed.

    Args:
        directory: directory for the models.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def model(self, family: str, tune: int) -> Path:
        """The directory of a fine-tune; tune 0 is the base model."""
        path = self._directory / family / str(tune)
        if not path.exists():
            write_model(FAMILIES[family], path, tune)
        return path

    def link(self, case: Case, directory: Path) -> dict[str, Path]:
        """Link the models of a recipe into a directory. Returns the directory of each by its name in the recipe."""
        found: dict[str, Path] = {}
        tunes: dict[str, Iterator[int]] = {}
        for name in case.models():
            if name in case.same:
                continue
            family = case.others.get(name, case.family)
            equal = (n for n in count() if case.sets_dtype or stored_dtype(n) == stored_dtype(0))
            found[name] = self.model(family, next(tunes.setdefault(family, equal)))
        found |= {alias: found[name] for alias, name in case.same.items()}
        for name, path in found.items():
            (directory / name.removesuffix(FILE)).symlink_to(path)
        return found


@cache
def stored(directory: Path) -> dict[str, Tensor]:
    """The tensors of a model, read once."""
    return read_model(directory)
