"""`diff` of a vision-language model and a text model compares the text part, whatever its prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mergeloom
from tests.support.models.vision import FAMILIES, write_model, write_text
from tests.support.outputs import read_model


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_text_part_is_compared_with_the_text_model(kind: str, tmp_path: Path) -> None:
    family = FAMILIES[kind]
    model, text = write_model(family, tmp_path / "model", 1), write_text(family, tmp_path / "text", 2)
    there, ours = mergeloom.diff(model, text), mergeloom.diff(text, model)
    values, theirs = read_model(text), read_model(model)
    assert {tensor.name for tensor in ours.tensors} == values.keys()
    assert ours.only_in_a == there.only_in_b == ()
    assert len(ours.only_in_b) == len(there.only_in_a) == len(theirs) - len(values)
    for tensor, other in zip(
        sorted(ours.tensors, key=lambda each: each.name.split(".")[::-1]),
        sorted(there.tensors, key=lambda each: each.name.split(".")[::-1]),
        strict=True,
    ):
        a, b = values[tensor.name].double().numpy(), theirs[other.name].double().numpy()
        assert tensor.name.endswith(other.name.rpartition("layers.")[2].rpartition("model.")[2])
        assert np.isclose(tensor.similarity.products, float(np.sum(a * b)), rtol=1e-9)
        assert np.isclose(other.similarity.products, tensor.similarity.products, rtol=1e-9)
