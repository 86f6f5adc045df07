"""`rename` in the entries of a recipe: where it may stand, and what is rejected."""

from __future__ import annotations

import pytest

from mergeloom.engine.recipe.types import ModelReference
from tests.unit.recipe.parsing import parse, refused

PAIRS = (("language_model.model.", "model."), ("language_model.", ""))
YAML = "[[language_model.model., model.], [language_model., '']]"


@pytest.mark.parametrize(
    "text",
    [
        f"models: [{{model: a, rename: {YAML}, parameters: {{weight: 1}}}}]",
        f"models: [{{model: {{path: a, rename: {YAML}}}, parameters: {{weight: 1}}}}]",
        f"models: [{{model: {{model: {{path: a}}, rename: {YAML}}}, parameters: {{weight: 1}}}}]",
        f"slices: [{{sources: [{{model: a, layer_range: [0, 2], rename: {YAML}, parameters: {{weight: 1}}}}]}}]",
        f"modules: {{text: {{models: [{{model: a, rename: {YAML}, parameters: {{weight: 1}}}}]}}}}",
        f"base_model: {{path: a, rename: {YAML}}}\nmodels: [{{model: b}}]\nparameters: {{weight: 1}}",
        f"models: [{{model: b, parameters: {{weight: 1}}}}]\nnon_layer: {{head: {{path: a, rename: {YAML}}}}}",
    ],
)
def test_an_entry_that_names_a_model_can_rename_its_tensors(text: str) -> None:
    recipe = parse(f"merge_method: linear\n{text}\n")
    assert recipe.warnings == ()
    assert {model.text: rename.pairs for model, rename in recipe.renames.items()} == {"a": PAIRS}


def test_one_entry_is_enough_and_holds_for_all_entries_of_the_model() -> None:
    recipe = parse(f"""
merge_method: linear
slices:
  - sources: [{{model: a, layer_range: [0, 2], rename: {YAML}}}]
  - sources: [{{model: a, layer_range: [1, 3]}}]
  - sources: [{{model: a, layer_range: [1, 3], rename: {YAML}}}]
parameters: {{weight: 1}}
""")
    assert recipe.renames[ModelReference("a")].pairs == PAIRS
    assert {model.text for model, _ in recipe.output.references()} == {"a"}


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ("x", "models[0].rename: expected pairs of prefix and replacement, such as `[[language_model.model."),
        ("[]", "models[0].rename: expected pairs of prefix and replacement"),
        ("[module., '']", "such as `[[language_model.model., model.]]`: write `[[module., '']]`"),
        ("[[module.]]", "models[0].rename[0]: expected a prefix and its replacement, both texts ('' for none)"),
        ("[[module., ]]", "models[0].rename[0]: expected a prefix and its replacement, both texts ('' for none)"),
        ("[[module., 1]]", "models[0].rename[0]: expected a prefix and its replacement, both texts ('' for none)"),
        ("[[a., b.], [a.c., d.]]", "models[0].rename[1]: 'a.c.' is never replaced: every name with it begins with 'a."
         "', which comes first; list longer prefixes before shorter ones"),
        ("[['', b.], [a., c.]]", "models[0].rename[1]: 'a.' is never replaced: every name with it begins with ''"),
        ("[['', model]]", "models[0].rename[0]: the replacement of the empty prefix is put before all other names: end "
         "it with a dot, `model.`"),
        ("[[a., b]]", "models[0].rename[0]: 'a.' becomes 'b', and only one of them ends with a dot"),
        ("[[a, b.]]", "models[0].rename[0]: 'a' becomes 'b.', and only one of them ends with a dot"),
    ],
)  # fmt: skip
def test_pairs_that_are_rejected(rename: str, message: str) -> None:
    error = refused(f"merge_method: linear\nmodels: [{{model: a, rename: {rename}, parameters: {{weight: 1}}}}]\n")
    assert message in str(error)


def test_two_renamings_of_one_model_are_rejected() -> None:
    error = refused("""
merge_method: linear
base_model: {path: a, rename: [[x., '']]}
models:
  - model: a
    rename: [[y., '']]
    parameters: {weight: 1}
""")
    assert "models[0].rename: a has another `rename` elsewhere: one entry is enough" in str(error)


def test_a_rename_elsewhere_is_reported_with_its_place() -> None:
    recipe = parse(f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{weight: 1}}\nrename: {YAML}\n")
    (warning,) = recipe.warnings
    assert warning.place == ("rename",)
    assert warning.advice.startswith("write it next to the name of a model: `- model: ...`")
    assert recipe.renames == {}


def test_a_stage_is_not_renamed() -> None:
    error = refused("""
name: first
merge_method: linear
models: [{model: a, parameters: {weight: 1}}]
---
merge_method: linear
models: [{model: first, rename: [[x., '']], parameters: {weight: 1}}]
""")
    assert "first is a stage, whose tensors have the names of its own models: rename those" in str(error)
