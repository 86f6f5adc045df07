"""Arbitrary and damaged recipes: each gives a Recipe or a RecipeError."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.engine.recipe.entries.output_dtype import OutputDtype
from mergeloom.engine.recipe.load import load_recipe
from mergeloom.engine.recipe.types import (
    Recipe,
    slices_of,
)
from mergeloom.errors import RecipeError
from mergeloom.io.tensors.dtypes import F32
from tests.unit.recipe.parsing import METHODS, parse

WORDS = st.sampled_from(
    [
        *("merge_method", "models", "slices", "modules", "sources", "model", "layer_range", "parameters", "base_model"),
        *("weight", "density", "t", "normalize", "filter", "value", "dtype", "tokenizer", "tokenizer_source", "source"),
        *("name", "path", "revision", "linear", "slerp", "ties", "a", "b@c", "a+b", "bfloat16", "union", "auto", ""),
    ]
)
LEAVES = WORDS | st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=6)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=6))


@settings(deadline=None, max_examples=150)
@given(TREES, st.booleans())
def test_any_data_gives_a_recipe_or_a_recipe_error(data: Any, strict: bool) -> None:
    try:
        recipe = load_recipe(data if isinstance(data, dict) else [data], strict=strict, methods=METHODS)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A valid recipe with up to three values replaced, deleted or renamed."""
    documents = list(yaml.safe_load_all(GOOD))
    for _ in range(draw(st.integers(1, 3))):
        node = draw(st.sampled_from(documents))
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], (dict, list)) and draw(st.booleans()):
                node = node[key]
                continue
            action = draw(st.sampled_from(("replace", "delete", "rename")))
            if action == "delete":
                del node[key]
            elif action == "rename" and isinstance(node, dict):
                node[draw(WORDS)] = node.pop(key)
            else:
                node[key] = draw(TREES)
            break
    return yaml.safe_dump_all(documents)


GOOD = """
name: first
merge_method: ties
base_model: a
models:
- {model: b, parameters: {weight: 1, density: [0, 1]}}
- {model: {model: {path: c, revision: d}}, parameters: {weight: [{filter: x, value: 1}, {value: 2}]}}
parameters: {normalize: true}
tokenizer: {source: base}
---
merge_method: slerp
base_model: first
slices:
- sources: [{model: first, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  parameters: {t: 0.5}
- sources: [{model: b, layer_range: [1, 3]}, {model: c, layer_range: [0, 2]}]
  base_model: c
parameters: {t: {filter: mlp, value: [0, 1]}}
dtype: bfloat16
out_dtype: float32
"""


def test_the_valid_recipe_is_valid() -> None:
    recipe = parse(GOOD, strict=True)
    assert recipe.warnings == ()
    assert recipe.output.out_dtype == OutputDtype.of(F32)


@settings(deadline=None, max_examples=150)
@given(damaged(), st.booleans())
def test_a_damaged_recipe_gives_a_recipe_or_a_recipe_error(text: str, strict: bool) -> None:
    try:
        recipe = parse(text, strict)
    except RecipeError as error:
        assert error.line is not None or "is empty" in str(error)
        return
    for each in recipe.stages:
        assert slices_of(each)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(GOOD)), st.integers(0, 12), st.text(alphabet="ab:-[]{}&*<\n 1'\"|@#", max_size=8))
def test_damaged_text_gives_a_recipe_or_a_recipe_error(start: int, length: int, text: str) -> None:
    try:
        recipe = parse(GOOD[:start] + text + GOOD[start + length :])
    except RecipeError:
        return
    assert recipe.stages
