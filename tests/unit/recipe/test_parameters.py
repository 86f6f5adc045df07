"""engine/parameters.py: what a parameter is worth for one tensor. Expected values come from running mergekit 0.1.5."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.engine.recipe.load import parse_recipe
from mergeloom.engine.recipe.parameters import (
    ParameterError,
    Resolver,
    SliceParameters,
    coerce,
    gradient_value,
    layer_position,
)
from mergeloom.engine.recipe.types import Conditional, Gradient, Setting, base_index, modules_of
from mergeloom.errors import RecipeError
from mergeloom.methods.kernel.method import Method
from mergeloom.methods.kernel.signature import REQUIRED, Parameter
from mergeloom.methods.kernel.spec import Absent, Base

WEIGHT = Parameter("weight", float, REQUIRED, True, "the weight")
DENSITY = Parameter("density", float, 1.0, True, "the share kept")
T = Parameter("t", float, 0.5, False, "where between")
FLAG = Parameter("normalize", bool, True, False, "whether")
COUNT = Parameter("count", int, 3, False, "how many")


def method(base: Base = Base.NONE, *parameters: Parameter) -> Method:
    return Method(
        name="mix",
        summary="",
        description="",
        paper=None,
        base=base,
        minimum=1,
        maximum=None,
        absent=Absent.PRESENT,
        parameters=parameters or (WEIGHT, DENSITY, T),
        function=lambda inputs, **_: pytest.fail("must not be traced"),
    )


def over_layers(parameter: Parameter, setting: Setting, count: int) -> list[Any]:
    resolver = Resolver(parameter, [{parameter.name: setting}])
    return [resolver("model.layers.0.mlp", layer_position(index, count)) for index in range(count)]


class TestCoerce:
    @pytest.mark.parametrize(
        ("value", "kind", "expected"),
        [
            (1, float, 1.0),
            ("0.5", float, 0.5),
            ("1e-5", float, 1e-5),
            (" 0.5 ", float, 0.5),
            ("1_000", float, 1000.0),
            (5.0, int, 5),
            ("5", int, 5),
            ("5.0", int, 5),
            (10**18 + 1, int, 10**18 + 1),
            (1, bool, True),
            (0.0, bool, False),
            ("yes", bool, True),
            ("off", bool, False),
            ("T", bool, True),
            ("1", bool, True),
        ],
    )
    def test_taken(self, value: Any, kind: type, expected: Any) -> None:
        found = coerce(value, kind)
        assert found == expected
        assert type(found) is kind

    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            ("abc", float),
            ("true", float),
            ("", float),
            (math.nan, float),
            ("inf", float),
            (10**400, float),
            (5.5, int),
            ("abc", int),
            ("9" * 5000, int),
            (math.inf, int),
            (True, float),
            (False, int),
            (0.5, bool),
            (2, bool),
            ("abc", bool),
        ],
    )
    def test_refused(self, value: Any, kind: type) -> None:
        with pytest.raises(ParameterError, match="expected "):
            coerce(value, kind)


class TestGradients:
    """Layers of models of 5 layers, merged by mergekit with these lists as weights."""

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ((0, 0.5, 0.3, 0.7, 1), (0.0, 0.5, 0.3, 0.7, 1.0)),
            ((0, 1), (0.0, 0.25, 0.5, 0.75, 1.0)),
            ((0.1, 0.9, 0.4, 0.2), (0.1, 0.7, 0.65, 0.35, 0.2)),
            (("0", "1", "2"), (0.0, 0.5, 1.0, 1.5, 2.0)),
            ((0, "1"), (0.0, 0.25, 0.5, 0.75, 1.0)),
            ((0.25,), (0.25, 0.25, 0.25, 0.25, 0.25)),
        ],
    )
    def test_numbers(self, values: tuple[Any, ...], expected: tuple[float, ...]) -> None:
        assert over_layers(WEIGHT, Gradient(values), 5) == pytest.approx(expected, abs=1e-15)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ((True, False), (True, True, True, True, False)),
            ((1.0, 0.0), (True, True, True, True, False)),
            (("true", "false"), (True, True, True, True, False)),
            ((True, False, True), (True, True, False, False, True)),
        ],
    )
    def test_booleans_step(self, values: tuple[Any, ...], expected: tuple[bool, ...]) -> None:
        assert over_layers(FLAG, Gradient(values), 5) == list(expected)

    def test_whole_numbers(self) -> None:
        assert over_layers(COUNT, Gradient((1, 5)), 5) == [1, 2, 3, 4, 5]
        assert over_layers(COUNT, Gradient((1, 4)), 4) == [1, 2, 3, 4]  # at t = 1/3 the sum is just below 2
        says = r"count must be a whole number, but its gradient \[1, 2\] is 1.25 in one of the layers"
        with pytest.raises(ParameterError, match=says):
            over_layers(COUNT, Gradient((1, 2)), 5)

    def test_one_boolean_for_each_layer(self) -> None:
        """floor(t (n-1)) as it is meant: mergekit's own, in floats, misses 7 of 50."""
        values = tuple(index % 2 == 0 for index in range(50))
        assert over_layers(FLAG, Gradient(values), 50) == list(values)

    def test_positions(self) -> None:
        assert [layer_position(i, 3) for i in range(3)] == [0.0, 0.5, 1.0]
        assert layer_position(0, 1) == 1.0
        for index, count in ((-1, 3), (3, 3), (0, 0)):
            with pytest.raises(ValueError, match="layer"):
                layer_position(index, count)


NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


@given(NUMBERS, st.floats(0, 1))
def test_a_gradient_stays_between_its_neighbours(values: list[float], t: float) -> None:
    left = min(len(values) - 1, math.floor(t * (len(values) - 1)))
    near = values[left : left + 2]
    assert min(near) <= gradient_value(values, t) <= max(near)


@given(NUMBERS)
def test_a_gradient_is_exact_at_its_ends(values: list[float]) -> None:
    assert gradient_value(values, 0.0) == values[0]
    assert gradient_value(values, 1.0) == values[-1]


@given(NUMBERS, st.integers(1, 200))
def test_a_gradient_with_an_entry_a_layer_is_those_entries(values: list[float], times: int) -> None:
    layers = (len(values) - 1) * times + 1
    for index, value in enumerate(values):
        t = layer_position(index * times, layers) if layers > 1 else 0.0
        assert gradient_value(values, t) == pytest.approx(value, rel=1e-9, abs=1e-6)


@given(st.lists(st.booleans(), min_size=2, max_size=300))
def test_steps_with_an_entry_a_layer_are_those_entries(values: list[bool]) -> None:
    assert [gradient_value(values, layer_position(i, len(values))) for i in range(len(values))] == values


class TestScopes:
    def test_first_scope_that_has_it(self) -> None:
        assert Resolver(WEIGHT, [{}, {"weight": 2.0}, {"weight": 3.0}])("x", 0.0) == 2.0
        assert Resolver(DENSITY, [{}, {}])("x", 0.0) == 1.0

    @pytest.mark.parametrize(
        ("part", "name", "expected"),
        [
            ("q_proj", "model.layers.1.self_attn.q_proj.weight", True),
            ("layers.1.", "model.layers.10.mlp", False),
            ("Q_PROJ", "model.layers.1.self_attn.q_proj.weight", False),
            ("*", "anything", True),
            (None, "anything", True),
            ("", "anything", True),
            ("**", "anything", False),
            ("any.*", "anything", False),
        ],
    )
    def test_filters(self, part: str | None, name: str, expected: bool) -> None:
        scopes: list[dict[str, Setting]] = [{"weight": (Conditional(part, 1.0),)}, {"weight": 2.0}]
        assert Resolver(WEIGHT, scopes)(name, 0.0) == (1.0 if expected else 2.0)

    def test_first_condition_that_fits(self) -> None:
        conditions = (Conditional("a", 1.0), Conditional("b", Gradient((0.0, 1.0))), Conditional(None, 3.0))
        scopes: list[dict[str, Setting]] = [{"weight": conditions}, {"weight": 4.0}]
        assert Resolver(WEIGHT, scopes)("ab", 0.5) == 1.0
        assert Resolver(WEIGHT, scopes)("b", 0.5) == 0.5
        assert Resolver(WEIGHT, scopes)("c", 0.5) == 3.0

    def test_the_search_goes_on_where_none_fits(self) -> None:
        scopes: list[dict[str, Setting]] = [
            {"weight": (Conditional("q_proj", 1.0),)},
            {"weight": (Conditional("embed", 2.0), Conditional("zzz", 3.0), Conditional(None, 9.0))},
        ]
        assert [Resolver(WEIGHT, scopes)(n, 0.0) for n in ("l.q_proj", "embed_tokens", "norm")] == [1.0, 2.0, 9.0]

    def test_an_empty_gradient_is_none(self) -> None:
        assert Resolver(WEIGHT, [{"weight": Gradient(())}, {"weight": 9.0}])("x", 0.0) == 9.0

    def test_missing(self) -> None:
        with pytest.raises(ParameterError, match=r"`weight` has no value$"):
            Resolver(WEIGHT, [{}])("x", 0.0)
        with pytest.raises(ParameterError, match="no filter matches"):
            Resolver(WEIGHT, [{"weight": (Conditional("y", 1.0),)}])("x", 0.0)

    def test_constant(self) -> None:
        assert Resolver(WEIGHT, [{"weight": 1.0}]).constant
        assert Resolver(WEIGHT, [{"weight": Gradient((2.0, 2.0))}]).constant
        assert Resolver(DENSITY, [{}]).constant
        assert not Resolver(WEIGHT, [{}]).constant
        assert not Resolver(WEIGHT, [{"weight": Gradient((2.0, 1.0))}]).constant
        assert not Resolver(DENSITY, [{"density": (Conditional("x", 1.0),)}]).constant


RECIPE = """
merge_method: mix
base_model: m0
slices:
- sources:
  - {model: m1, layer_range: [2, 4], parameters: {weight: 1}}
  - {model: m0, layer_range: [0, 2]}
  - model: m2
    layer_range: [0, 2]
    parameters:
      weight: {filter: layers.1., value: 11}
  parameters: {weight: 3, t: [{filter: layers.2., value: 0.125}]}
parameters: {weight: 5, t: [0, 1]}
"""


def of(text: str, kind: Method) -> SliceParameters:
    recipe = parse_recipe(text, methods={kind.name: kind})
    (module,) = modules_of(recipe.output)
    assert module.slices is not None
    part = module.slices[0]
    return SliceParameters(recipe, recipe.output, module, part, kind, base_index(recipe.output, part, kind))


class TestSlices:
    def test_per_input_by_source_name_and_shared_by_output_name(self) -> None:
        parameters = of(RECIPE, method())
        inputs = [(0, "layers.3.x"), (1, "layers.1.x"), (2, "layers.1.x")]
        assert parameters.values("layers.3.x", inputs, 1.0) == {
            "weight": (1.0, 3.0, 11.0),
            "density": (1.0, 1.0, 1.0),
            "t": 1.0,
        }
        inputs = [(0, "layers.2.x"), (1, "layers.0.x"), (2, "layers.0.x")]
        assert parameters.values("layers.2.x", inputs, 0.0) == {
            "weight": (1.0, 3.0, 3.0),
            "density": (1.0, 1.0, 1.0),
            "t": 0.125,
        }

    def test_some_inputs_only(self) -> None:
        found = of(RECIPE, method()).values("b", [(0, "b"), (2, "b")], 0.0)
        assert found["weight"] == (1.0, 3.0)

    def test_the_base_has_no_value_of_its_own(self) -> None:
        text = "merge_method: mix\nbase_model: z\nmodels: [{model: a, parameters: {weight: 2}}, {model: z}]"
        found = of(text, method(Base.REQUIRED)).values("x", [(0, "x"), (1, "x")], 0.0)
        assert found == {"weight": (2.0, 0.0), "density": (1.0, 1.0), "t": 0.5}
        with pytest.raises(RecipeError, match="mix, model z, tensor x: `weight` has no value"):
            of(text, method(Base.NONE)).values("x", [(0, "x"), (1, "x")], 0.0)

    def test_missing_is_said_with_model_tensor_and_line(self) -> None:
        text = "merge_method: mix\nmodels:\n- model: a\n- model: b\n  parameters: {weight: {filter: y, value: 1}}\n"
        parameters = of(text, method())
        with pytest.raises(
            RecipeError, match=r"recipe:3: models\[0\]: mix, model a, tensor x.y: `weight` has no value;"
        ):
            parameters.values("x.y", [(0, "x.y"), (1, "x.y")], 0.0)
        assert parameters.values("x.y", [(1, "x.y")], 0.0)["weight"] == (1.0,)
        with pytest.raises(
            RecipeError, match=r"recipe:4: models\[1\]: mix, model b, tensor x: .* no filter matches its name"
        ):
            parameters.values("x", [(1, "x")], 0.0)

    def test_missing_shared_one(self) -> None:
        required = Parameter("t", float, REQUIRED, False, "")
        parameters = of("merge_method: mix\nmodels: [{model: a}]", method(Base.NONE, required))
        with pytest.raises(RecipeError, match="recipe:1: mix, tensor x: `t` has no value; set it in the recipe's"):
            parameters.values("x", [(0, "x")], 0.0)

    def test_constants_are_looked_up_once(self) -> None:
        parameters = of("merge_method: mix\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}", method())
        both = [(0, "x"), (1, "x")]
        assert parameters.values("x", both, 0.0) is parameters.values("y", both, 1.0)
        assert parameters.values("y", [(1, "y")], 1.0)["weight"] == (1.0,)
