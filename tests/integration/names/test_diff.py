"""`diff` of a vision-language model and a text model compares the text part, whatever its prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

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


def test_views_of_pickled_tensors_keep_belonging_to_their_tensors(tmp_path: Path) -> None:
    """A transposed tensor is stored as a range in another order, which is not compared element by element."""
    family = FAMILIES["llava"]
    model, text = write_model(family, tmp_path / "model", 1), write_text(family, tmp_path / "text", 2)
    values = read_model(text)
    name = "model.layers.1.self_attn.q_proj.weight"
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((text / "config.json").read_bytes())
    torch.save(values | {name: values[name].t().contiguous().t()}, pickled / "pytorch_model.bin")
    found, plain = mergeloom.diff(model, pickled), mergeloom.diff(model, text)
    (left,) = found.not_compared
    assert left.name == f"language_model.{name}"
    similar = {tensor.name: tensor.similarity for tensor in plain.tensors}
    del similar[left.name]
    assert {tensor.name: tensor.similarity for tensor in found.tensors} == similar
