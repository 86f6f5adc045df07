"""The models that published recipes name: written once, and linked into a directory under the recipe's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from tests.support.adapters.files import PREFIX, product, read_adapter, write_lora
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
        for number, name in enumerate(case.adapters()):
            base, _, adapter = name.partition("+")
            shapes = {each: tuple(tensor.shape) for each, tensor in stored(found[base]).items()}
            found[name] = write_lora(directory / adapter, shapes, seed=number, dtype=torch.bfloat16)
        return found


def values(paths: Mapping[str, Path], name: str) -> Mapping[str, Tensor]:
    """The tensors of a model that a recipe names; with an adapter, those that it changes are rounded to float32."""
    base, plus, _ = name.partition("+")
    found = dict(stored(paths[base]))
    changed = [each.removeprefix(PREFIX) for each in read_adapter(paths[name])] if plus else []
    for module in {each.removesuffix(".lora_A.weight") for each in changed if each.endswith(".lora_A.weight")}:
        weight = found[f"{module}.weight"]
        found[f"{module}.weight"] = (weight.double() + product(paths[name], module)).float()
    return found


@cache
def stored(directory: Path) -> dict[str, Tensor]:
    """The tensors of a model, read once."""
    return read_model(directory)
