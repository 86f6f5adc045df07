"""A merge of models with adapters writes the bytes of a merge of models that adapters were applied to beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

import mergeloom
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.spec import Base
from tests.support import models
from tests.support.adapters.files import write_lora
from tests.support.outputs import read_model, same_tensors

PARAMETERS = {"weight": 0.5, "density": 0.6, "t": 0.3}
METHODS = sorted(merge_methods())


class Pair(NamedTuple):
    """A model with adapters, and the same values in float32."""

    adapted: str
    plain: str


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """The base, and the base with one, another and both of two adapters."""
    root = tmp_path_factory.mktemp("adapted")
    llama = models.tiny_llama(layers=2)
    base = models.write_checkpoint(root / "base", llama, fill=0)
    a = write_lora(root / "a", llama.tensors, seed=1)
    b = write_lora(root / "b", llama.tensors, targets=("q_proj", "down_proj"), rank=3, seed=2, use_rslora=True)
    made = [Pair(str(base), str(base))]
    for number, adapters in enumerate(((a,), (b,), (a, b))):
        reference = "+".join(map(str, (base, *adapters)))
        recipe = {"merge_method": "passthrough", "out_dtype": "float32", "models": [{"model": reference}]}
        mergeloom.merge(recipe, root / f"merged{number}")
        made.append(Pair(reference, str(root / f"merged{number}")))
    return made


def recipe(method: str, base: str, others: list[str]) -> dict[str, Any]:
    """A recipe with what the method requires."""
    found = merge_methods()[method]
    known = {parameter.name for parameter in found.parameters}
    chosen = others[: found.maximum] if found.maximum is not None else others
    made: dict[str, Any] = {"merge_method": method, "out_dtype": "float32", "models": [{"model": m} for m in chosen]}
    made["parameters"] = {name: value for name, value in PARAMETERS.items() if name in known}
    if found.base is not Base.NONE:
        made["base_model"] = base
    return made


@pytest.mark.parametrize("base", [0, 1], ids=["plain base", "base with an adapter"])
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_are_those_of_models_merged_beforehand(
    tmp_path: Path, pairs: list[Pair], method: str, base: int
) -> None:
    others = [pair for number, pair in enumerate(pairs) if number not in (0, base)]
    mergeloom.merge(recipe(method, pairs[base].adapted, [pair.adapted for pair in others]), tmp_path / "adapted")
    mergeloom.merge(recipe(method, pairs[base].plain, [pair.plain for pair in others]), tmp_path / "plain")
    assert same_tensors(read_model(tmp_path / "adapted"), read_model(tmp_path / "plain"))
