"""Parses recipes with a small set of merge methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.recipe.load import parse_recipe
from mergeloom.engine.recipe.types import (
    ModelReference,
    Recipe,
)
from mergeloom.errors import RecipeError
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.method import Method
from mergeloom.methods.kernel.signature import REQUIRED, Parameter
from mergeloom.methods.kernel.spec import Absent, Base


def method(name: str, base: Base, minimum: int, maximum: int | None, *parameters: Parameter) -> Method:
    return Method(
        name=name,
        summary="",
        description="",
        paper=None,
        base=base,
        minimum=minimum,
        maximum=maximum,
        absent=Absent.PRESENT,
        parameters=parameters,
        function=lambda inputs, **_: pytest.fail("must not be traced"),
    )


WEIGHT = Parameter("weight", float, REQUIRED, True, "")
NORMALIZE = Parameter("normalize", bool, True, False, "")
METHODS = {
    m.name: m
    for m in (
        method("passthrough", Base.NONE, 1, 1, Parameter("scale", float, 1.0, True, "")),
        method("linear", Base.NONE, 1, None, WEIGHT, NORMALIZE),
        method("slerp", Base.REQUIRED, 1, 1, Parameter("t", float, REQUIRED, False, "")),
        method("nuslerp", Base.OPTIONAL, 2, 2, WEIGHT),
        method("ties", Base.REQUIRED, 1, None, WEIGHT, Parameter("density", float, 1.0, True, ""), NORMALIZE),
        method("karcher", Base.NONE, 1, None, Parameter("max_iter", int, 10, False, "")),
    )
}
LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
MODELS = "models: [{model: a}, {model: b}]\n"


def parse(text: str, strict: bool = False) -> Recipe:
    return parse_recipe(text, source=Path("r.yml"), strict=strict, methods=METHODS)


def refused(text: str, strict: bool = False) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, strict)
    return str(caught.value)


def ref(text: str) -> ModelReference:
    return ModelReference.parse(text)


def parse_built_in(text: str) -> Recipe:
    """Parse a recipe with the built-in methods."""
    return parse_recipe(text, source=Path("r.yml"), methods=merge_methods())


def parse_error(text: str) -> RecipeError:
    """The error of parsing a recipe with the built-in methods."""
    with pytest.raises(RecipeError) as caught:
        parse_built_in(text)
    return caught.value
