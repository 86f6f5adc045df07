"""Parameters whose ranges depend on each other, and the ranges of user methods."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import RecipeError
from mergeloom.methods import (
    Array,
    Base,
    Fraction,
    Inputs,
    MethodError,
    PerInput,
    Range,
    add,
    merge_method,
    merge_methods,
)
from mergeloom.methods import registry as plugins
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.kernels import merge
from tests.unit.recipe.parsing import parse_built_in, parse_error

OPTIONS = Options(max_ram=4 << 30, device="cpu", threads=1)


def refused_plan(llamas: dict[str, Path], directory: Path, text: str) -> RecipeError:
    """The error of planning a recipe for the Llamas; `$a` is replaced by the path of model a."""
    file = directory / "r.yml"
    for name, path in llamas.items():
        text = text.replace(f"${name}", str(path))
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        plan(file, OPTIONS)
    return caught.value


class TestValuesThatDependOnEachOther:
    @pytest.mark.parametrize(
        ("settings", "line"),
        [
            ("{weight: 1, density: 0.5}\nparameters:\n  epsilon: 0.49\n", None),
            ("{weight: 1, density: 0.5}\nparameters:\n  epsilon: {filter: mlp, value: 0.4999999}\n", None),
            ("{weight: 1, density: 1}\nparameters:\n  epsilon: 0.4\n", None),
            ("{weight: 1, density: 0}\nparameters:\n  epsilon: 0.4\n", None),
            ("{weight: 1, density: 0.3}\nparameters:\n  epsilon: 0.4\n", 7),
            ("{weight: 1, density: 0.3}\nparameters:\n  epsilon: 0.3\n", 7),
            ("{weight: 1, density: 0.9}\nparameters:\n  epsilon: {filter: mlp, value: 0.4}\n", 5),
            ("{weight: 1, density: 0.9, epsilon: 0.2}\n", 5),
            ("{weight: 1, density: 0.9}\n", 5),
        ],
    )
    def test_density_and_epsilon(
        self, llamas: dict[str, Path], tmp_path: Path, settings: str, line: int | None
    ) -> None:
        """An epsilon that isn't set is 0.15: it is the density that is reported, then."""
        text = f"merge_method: della\nbase_model: $base\nmodels:\n  - model: $a\n    parameters: {settings}"
        if line is None:
            for name, path in llamas.items():
                text = text.replace(f"${name}", str(path))
            (tmp_path / "r.yml").write_text(text)
            plan(tmp_path / "r.yml", OPTIONS)
            return
        error = refused_plan(llamas, tmp_path, text)
        assert error.line == line
        assert error.message.startswith(f"della, model {llamas['a']}, tensor ")
        assert "density - epsilon and density + epsilon must lie strictly between 0 and 1, got " in error.message
        assert "at this density epsilon must be below 0." in error.message

    @pytest.mark.parametrize(
        ("method", "says"), [("linear", "set `normalize: false`"), ("multislerp", "set `normalize_weights: false`")]
    )
    def test_weights_that_cancel(self, llamas: dict[str, Path], tmp_path: Path, method: str, says: str) -> None:
        text = f"merge_method: {method}\nmodels:\n"
        text += "  - {model: $a, parameters: {weight: 1}}\n  - {model: $b, parameters: {weight: -1}}\n"
        error = refused_plan(llamas, tmp_path, text)
        assert (error.line, says in error.message) == (2, True)  # no single line is wrong
        text = f"merge_method: {method}\nmodels: [{{model: $a}}, {{model: $b}}]\nparameters:\n  weight: 0\n"
        error = refused_plan(llamas, tmp_path, text)
        assert (error.line, error.path) == (4, ("parameters", "weight"))

    def test_a_gradient_of_a_whole_number(self, llamas: dict[str, Path], tmp_path: Path) -> None:
        text = "merge_method: karcher\nmodels: [{model: $a}, {model: $b}]\nparameters:\n  max_iter: [1, 3]\n"
        error = refused_plan(llamas, tmp_path, text)
        assert (error.line, error.path) == (4, ("parameters", "max_iter"))
        assert "max_iter must be a whole number, but its gradient [1, 3] is 1.66667 in one of the layers" in str(error)

    def test_sums_of_0_with_an_eps_of_0(self) -> None:
        """An eps of 0 once divided by 0."""
        x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
        cancelling = {"weight": (1.0, -1.0)}
        equal = merge("nuslerp", [x, y], {"weight": (1.0, 1.0)})
        assert torch.equal(merge("nuslerp", [x, y], cancelling | {"eps": 0.0}), equal)
        with pytest.raises(MethodError, match="the weights sum to 0"):
            merge("multislerp", [x, y], cancelling | {"eps": 0.0})
        zero = torch.zeros(2)
        assert torch.equal(merge("model_stock", [zero, x, -x], {"eps": 0.0}, base=0), zero)


USER_METHOD = '''
from typing import Annotated

from mergeloom.methods import Array, Fraction, Inputs, PerInput, PositiveInt, Range, add, merge_method


@merge_method("mine")
def mine(
    t: Inputs,
    *,
    share: PerInput[Fraction] = (1.0,),
    angle: Annotated[float, Range(-180, 180, exclusive_minimum=True)] = 0.0,
    steps: PositiveInt = 1,
    plain: float = 1.0,
) -> Array:
    """A weighted sum.

    Args:
        share: weight of this model.
        angle: angle in degrees.
        steps: number of steps.
        plain: a number.
    """
    return add([w * x for w, x in zip(share, t.models, strict=True)])
'''


@pytest.mark.usefixtures("forget_methods")
class TestUserMethods:
    def test_have_ranges_too(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(USER_METHOD)
        plugins.load_methods(tmp_path / "mine.py")
        mine = merge_methods()["mine"]
        assert [parameter.values for parameter in mine.parameters] == [
            "between 0 and 1",
            "above -180 and at most 180",
            "at least 1",
            "any finite number",
        ]
        models = "merge_method: mine\nmodels: [{model: a}]\nparameters:\n"
        parse_built_in(models + "  share: [0, 1]\n  angle: 180\n  steps: 1\n  plain: -1e9\n")
        error = parse_error(models + "  share: [0, 30]\n  angle: -180\n  steps: 0\n  plain: .inf\n")
        assert [problem.partition(": mine: ")[2] for problem in str(error).splitlines()] == [
            "share must be between 0 and 1, got 30: did you mean 0.3?",
            "angle must be above -180 and at most 180, got -180",
            "steps must be a whole number (at least 1), got 0",
            "plain must be a finite number, got inf",
        ]
        with pytest.raises(MethodError, match="share must be between 0 and 1, got 30") as caught:
            mine.kernel(InputSpec(2, None, (3,)), {"share": (1.0, 30.0)})
        assert (caught.value.parameters, caught.value.index) == (("share",), 1)

    def test_the_base_has_no_value_to_check(self) -> None:
        @merge_method("based", base=Base.REQUIRED)
        def based(t: Inputs, *, weight: PerInput[Annotated[float, Range(1, 2)]]) -> Array:
            """A weighted sum.

            Args:
                weight: weight of this model.
            """
            assert weight == (1.0,)  # of the only model other than the base
            return t.base + weight[0] * t.other

        kernel = merge_methods()["based"].kernel
        kernel(InputSpec(2, 0, (3,)), {"weight": (0.0, 1.0)})
        with pytest.raises(MethodError, match="weight must be between 1 and 2, got 0") as caught:
            kernel(InputSpec(2, 0, (3,)), {"weight": (1.0, 0.0)})
        assert caught.value.index == 1

    def test_declarations_are_checked(self) -> None:
        def declare(annotation: Any, default: Any) -> None:
            def declared(t: Inputs, *, share: Any = default) -> Array:
                """A sum.

                Args:
                    share: weight of all inputs.
                """
                return add([share * x for x in t.models])

            declared.__annotations__["share"] = annotation
            merge_method("declared")(declared)

        for annotation, default, says in (
            (Fraction, 2.0, r"the default of 'share' must be between 0 and 1: 2.0"),
            (PerInput[Fraction], (-1.0,), r"the default of 'share' must be between 0 and 1: -1.0"),
            (Annotated[bool, Range(0, 1)], True, "only numbers can have a Range"),
            (Annotated[str, Range(0, 1)], "x", "must be a float, int or bool"),
        ):
            with pytest.raises(TypeError, match=rf"^{re.escape(__file__)}:\d+: merge method 'declared': .*{says}"):
                declare(annotation, default)
            assert "declared" not in merge_methods()

    @pytest.mark.parametrize("bounds", [(1, 0), (math.nan, 1), (0, 0, True), (0, 0, False, True)])
    def test_an_empty_range_is_an_error(self, bounds: tuple[Any, ...]) -> None:
        with pytest.raises(ValueError, match="no number lies in the range"):
            Range(*bounds)

    def test_a_range_in_words(self) -> None:
        words = {
            Range(): "any finite number",
            Range(0, 1): "between 0 and 1",
            Range(0, 0.5, exclusive_maximum=True): "at least 0 and below 0.5",
            Range(-1, 1, exclusive_minimum=True): "above -1 and at most 1",
            Range(maximum=3): "at most 3",
            Range(0, exclusive_minimum=True): "above 0",
        }
        assert {given: str(given) for given in words} == words
        assert 10**400 in Range(1)
        assert math.inf not in Range(1)
        assert math.nan not in Range()
