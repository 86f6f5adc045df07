"""The plan's section about filters and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mergeloom
from mergeloom.report.parameters import parameters_section

OUTSIDE = "model.embed_tokens.weight, model.norm.weight"


def fields_of(recipe: dict[str, Any]) -> dict[str, str]:
    """The fields of the section for a recipe."""
    section = parameters_section(mergeloom.plan(recipe))
    assert section is not None
    return dict(section.fields)


def test_filters_gradients_and_the_rest(llamas: dict[str, Path]) -> None:
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mpl", "value": 0.5},
        {"value": [0.2, 0.4]},
    ]
    recipe = {
        "merge_method": "slerp",
        "base_model": str(llamas["a"]),
        "models": [{"model": str(llamas["b"])}],
        "parameters": {"t": t},
    }
    assert fields_of(recipe) == {
        "t": "'self_attn' (16 tensors): 0 in the first layer of a slice, 0.3 in the middle, 1 in the last; "
        "'mpl' (0 tensors): 0.5; "
        "the rest (22 tensors): 0.2 in the first layer of a slice, 0.3 in the middle, 0.4 in the last",
        "t outside layers": f"0.2, the gradient's first value: {OUTSIDE}",
    }


def test_models_with_their_own_values_and_a_default(llamas: dict[str, Path]) -> None:
    recipe = {
        "merge_method": "ties",
        "base_model": str(llamas["base"]),
        "models": [
            {"model": str(llamas["a"]), "parameters": {"density": {"filter": "mlp", "value": 0.3}}},
            {"model": str(llamas["b"]), "parameters": {"density": [0, 1]}},
        ],
        "parameters": {"weight": {"filter": "*", "value": 1}},
    }
    a, b = (f"density of {llamas[name]}" for name in "ab")
    assert fields_of(recipe) == {
        a: "'mlp' (12 tensors): 0.3; the rest (26 tensors): 1 (default)",
        b: "all (38 tensors): 0 in the first layer of a slice, 0.5 in the middle, 1 in the last",
        f"{b} outside layers": f"0, the gradient's first value: {OUTSIDE}",
    }


def test_slices_are_added_up_and_equal_models_combined(llamas: dict[str, Path]) -> None:
    slices = [
        {"sources": [{"model": str(llamas[name]), "layer_range": part} for name in "ab"]} for part in ([0, 2], [2, 4])
    ]
    weight = [{"filter": "mlp", "value": 0.3}, {"value": 1}]
    recipe = {"merge_method": "linear", "slices": slices, "parameters": {"weight": weight}}
    assert fields_of(recipe) == {"weight": "'mlp' (12 tensors): 0.3; the rest (26 tensors): 1"}


def test_constants_have_no_section(llamas: dict[str, Path]) -> None:
    models = [{"model": str(llamas[name]), "parameters": {"weight": 1}} for name in "ab"]
    assert parameters_section(mergeloom.plan({"merge_method": "linear", "models": models})) is None
