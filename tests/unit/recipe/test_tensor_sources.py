"""`tensors_from` in a recipe: its two forms, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from mergeloom.engine.recipe.load import load_recipe
from mergeloom.engine.recipe.types import ModelReference, stage_inputs
from mergeloom.errors import RecipeError
from mergeloom.methods import merge_methods


def load(entries: Any) -> Any:
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}], "tensors_from": entries}
    return load_recipe(recipe, methods=merge_methods()).output


def test_a_list_and_a_single_entry() -> None:
    one = {"filter": "conv", "model": "b@main"}
    assert load(one).tensors_from == load([one]).tensors_from
    (source,) = load(one).tensors_from
    assert (source.filter, source.model) == ("conv", ModelReference("b", "main"))


def test_the_model_is_referenced_and_not_counted_among_the_merged_ones() -> None:
    stage = load([{"filter": "x", "model": "b"}, {"filter": "y", "model": "c"}])
    assert [reference.path for reference, _ in stage.references()] == ["b", "c", "a"]
    assert stage_inputs(stage) == (ModelReference("a"),)
    assert stage.title == "passthrough of 1 model"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "expected a list of entries"),
        ("b", "expected a list of entries"),
        ([{"model": "b"}], r"tensors_from\[0\]: `filter` is missing"),
        ([{"filter": "x"}], r"tensors_from\[0\]: `model` is missing: write a directory or a Hub id"),
        ([{"filter": "*", "model": "b"}], "needs a part of tensor names"),
        ([{"filter": 3, "model": "b"}], "expected a substring of tensor names, got 3"),
        ([{"filter": "x", "model": "b+"}], "has no adapter after the"),
    ],
)
def test_mistakes(entries: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(entries)
