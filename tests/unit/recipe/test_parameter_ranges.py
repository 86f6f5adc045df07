"""Every parameter of every built-in method: its type and range, in every form and scope of a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeloom.__main__ import main
from mergeloom.engine.recipe.load import load_recipe
from mergeloom.engine.recipe.parameters import ParameterError, accept
from mergeloom.errors import RecipeError
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.method import Method
from mergeloom.methods.kernel.signature import Parameter
from mergeloom.methods.kernel.spec import Base, InputSpec, MethodError
from tests.support.methods.kernels import merge
from tests.unit.recipe.parsing import parse_built_in, parse_error

BUILT_IN = {
    name: method
    for name, method in merge_methods().items()
    if method.function.__module__.startswith("mergeloom.methods.")
}
PARAMETERS = [(method, parameter) for method in BUILT_IN.values() for parameter in method.parameters]
IDS = [f"{method.name}-{parameter.name}" for method, parameter in PARAMETERS]

Numbers = tuple[float | int, ...]
Row = tuple[str, Numbers, Numbers]

FINITE: Row = ("a finite number", (-1e6, 0, 1e6), ())
FRACTION: Row = ("between 0 and 1", (0, 0.5, 1), (-0.5, -1e-9, 1.0001, 50))
AT_LEAST_0: Row = ("at least 0", (0, 1e-9, 0.9), (-1e-9, -1))
ABOVE_0: Row = ("above 0", (1e-9, 0.9), (0, -1e-9))
SWITCH: Row = ("true or false", (), (2, 0.5, -1))

TABLE: dict[str, Row] = {
    "weight": FINITE,
    "scale": FINITE,
    "lambda": FINITE,
    "slerp t": FINITE,
    "nearswap t": AT_LEAST_0,
    "density": FRACTION,
    "gamma": FRACTION,
    "select_topk": FRACTION,
    "dot_threshold": FRACTION,
    "della epsilon": ("at least 0 and below 0.5", (0, 0.4999), (-0.1, 0.5, 1)),
    "della_linear epsilon": ("at least 0 and below 0.5", (0, 0.4999), (-0.1, 0.5, 1)),
    "ram epsilon": AT_LEAST_0,
    "ramplus_tl epsilon": AT_LEAST_0,
    "r": AT_LEAST_0,
    "alpha": AT_LEAST_0,
    "iqr_factor": FINITE,
    "karcher max_iter": ("a whole number (at least 1)", (1, 9999), (0, -1, 1.5)),
    "multislerp max_iter": ("a whole number (at least 0)", (0, 9999), (-1, 1.5)),
    "tol": ABOVE_0,
    "nearswap eps": ABOVE_0,
    "arcee_fusion eps": ABOVE_0,
    "eps": AT_LEAST_0,
    "weight_eps": AT_LEAST_0,
    "rescale_eps": AT_LEAST_0,
    "divisor_eps": AT_LEAST_0,
    **dict.fromkeys(("normalize", "normalize_weights", "rescale", "unbiased", "filter_wise"), SWITCH),
    **dict.fromkeys(("nuslerp_flatten", "nuslerp_row_wise"), SWITCH),
}
"""For each parameter: its range in words, valid values including the bounds, and invalid numbers.

The key is the parameter's name, prefixed with the method's name if methods differ."""

NUMBERS_NEVER = (".nan", ".inf", "-.inf", "abc", "true", "off", "~", "[]", "[[0.5]]", "{value: {value: 1}}", "''")
SWITCHES_NEVER = (".nan", "maybe", "~", "[]", "[[true]]", "{value: {value: true}}", "''")
"""Values of the wrong type, as YAML."""

RECIPE = """\
merge_method: {method}
{base}
models:
  - model: first
    parameters:
      int8_mask: false
      {first}
  - model: second
parameters:
  int8_mask: false
  {all}
"""
"""A recipe with the values for the first model in line 7 and those for all models in line 11."""


def row(method: Method, parameter: Parameter) -> Row:
    return TABLE.get(f"{method.name} {parameter.name}") or TABLE[parameter.name]


def invalid_values(method: Method, parameter: Parameter) -> list[str]:
    """YAML of invalid values of a parameter."""
    _, _, numbers = row(method, parameter)
    return [*map(str, numbers), *(SWITCHES_NEVER if parameter.type is bool else NUMBERS_NEVER)]


def valid_values(method: Method, parameter: Parameter) -> list[str]:
    """YAML of valid values of a parameter."""
    _, numbers, _ = row(method, parameter)
    if parameter.type is bool:
        return ["true", "off", "1", "0.0", "'yes'"]
    return [str(number) for number in numbers] + [f"'{numbers[-1]}'"]


def text_of(method: Method, *, first: str = "", everywhere: str = "") -> str:
    """A recipe that sets these parameters for its first model, or for all models."""
    base = "base_model: base" if method.base is Base.REQUIRED else "# no base"
    text = RECIPE.format(method=method.name, base=base, first=first, all=everywhere)
    few = method.maximum == 1
    return text.replace("  - model: second\n", "  # one model\n") if few else text


@pytest.mark.parametrize(("method", "parameter"), PARAMETERS, ids=IDS)
class TestEveryParameter:
    def test_declares_its_range(self, method: Method, parameter: Parameter) -> None:
        if parameter.type is not bool:
            assert parameter.range is not None, "annotate it with a Range; Finite for any finite number"
        assert parameter.expected == row(method, parameter)[0]

    def test_accepts_its_bounds_in_every_form(self, method: Method, parameter: Parameter) -> None:
        name = parameter.name
        for value in valid_values(method, parameter):
            for form in (value, f"[{value}, {value}]", f"{{filter: mlp, value: {value}}}", f"[{{value: [{value}]}}]"):
                parse_built_in(text_of(method, everywhere=f"{name}: {form}"))
                if parameter.per_input:
                    parse_built_in(text_of(method, first=f"{name}: {form}"))

    def test_rejects_other_values_in_every_form(self, method: Method, parameter: Parameter) -> None:
        name = parameter.name
        good = valid_values(method, parameter)[0]
        for value in invalid_values(method, parameter):
            forms = {
                value: name,
                f"[{good}, {value}]": f"{name}[1]",
                f"{{filter: mlp, value: {value}}}": f"{name}.value",
                f"[{{filter: mlp, value: [{good}, {value}]}}, {{value: {good}}}]": f"{name}[0].value[1]",
                f"[{{filter: mlp, value: {good}}}, {{value: {value}}}]": f"{name}[1].value",
            }
            for form, path in forms.items():
                if "{value: {value" in value and path in (name, f"{name}[1]"):
                    continue  # that is a condition there, or a list of plain values and conditions
                if value == "~" and path.endswith("value"):
                    continue  # a condition without a value
                self.check(text_of(method, everywhere=f"{name}: {form}"), 11, f"parameters.{path}", method, parameter)
                if parameter.per_input:
                    text = text_of(method, first=f"{name}: {form}")
                    self.check(text, 7, f"models[0].parameters.{path}", method, parameter, ", model first")

    def check(self, text: str, line: int, path: str, method: Method, parameter: Parameter, model: str = "") -> None:
        error = parse_error(text)
        assert error.line == line, text
        said = str(error)
        assert said.startswith(f"r.yml:{line}: {path}"), text
        condition = ", filter 'mlp'" if "filter: mlp" in text and not path.endswith("[1].value") else ""
        expected = row(method, parameter)[0]
        assert f": {method.name}{model}{condition}: {parameter.name} must be {expected}, got " in said, text

    def test_is_checked_in_every_scope(self, method: Method, parameter: Parameter) -> None:
        value = f"{parameter.name}: {invalid_values(method, parameter)[0]}"
        sources = "".join(f"          - {{model: m{i}, layer_range: [0, 2]}}\n" for i in range(method.minimum))
        if method.base is Base.REQUIRED:
            sources += "          - {model: base, layer_range: [0, 2]}\n"
        text = (
            f"merge_method: {method.name}\nbase_model: {'base' if method.base is Base.REQUIRED else '~'}\n"
            f"modules:\n  default:\n    slices:\n      - sources:\n{sources}"
        )
        line = text.count("\n") + 1
        scopes = {
            f"        parameters: {{{value}}}\n": "modules.default.slices[0].parameters",
            f"    parameters: {{{value}}}\n": "modules.default.parameters",
            f"parameters: {{{value}}}\n": "parameters",
        }
        for setting, path in scopes.items():
            assert str(parse_error(text + setting)).startswith(f"r.yml:{line}: {path}.{parameter.name}: "), setting
        if parameter.per_input:
            source = text.replace("[0, 2]}", f"[0, 2], parameters: {{{value}}}}}", 1)
            path = f"modules.default.slices[0].sources[0].parameters.{parameter.name}"
            assert str(parse_error(source)).startswith(f"r.yml:7: {path}: ")

    def test_bounds_give_finite_results(self, method: Method, parameter: Parameter) -> None:
        """Also of equal tensors and of zeros, where lengths, differences and sums of weights are 0."""
        if parameter.type is bool:
            values: tuple[Any, ...] = (True, False)
        else:
            values = row(method, parameter)[1]
        base = 0 if method.base is Base.REQUIRED else None
        count = (1 if method.maximum == 1 else 2) + (base == 0)
        generator = torch.Generator().manual_seed(1)
        random = [torch.randn(6, 40, generator=generator) for _ in range(count)]
        for inputs in (random, [random[0]] * count, [torch.zeros(6, 40)] * count):
            for value in values:
                settings: dict[str, Any] = {
                    other.name: (1.0,) * count if other.per_input else 0.5
                    for other in method.parameters
                    if other.required
                }
                if parameter.name == "epsilon" and method.name.startswith("della"):
                    settings["density"] = (0.5,) * count
                settings[parameter.name] = (value,) * count if parameter.per_input else value
                if method.name in ("linear", "multislerp") and settings["weight"][0] == 0:
                    continue  # weights that sum to 0 are an error of their own
                assert merge(method.name, inputs, settings, base=base).isfinite().all(), (value, inputs)

    def test_kernels_refuse_other_values(self, method: Method, parameter: Parameter) -> None:
        base = 0 if method.base is Base.REQUIRED else None
        count = method.minimum + (base == 0)
        settings = {p.name: (1.0,) * count if p.per_input else 0.5 for p in method.parameters if p.required}
        if parameter.type is bool:
            return
        wrong = [n for n in row(method, parameter)[2] if isinstance(n, parameter.type) or parameter.type is float]
        for number in (*wrong, math.nan, math.inf):
            settings[parameter.name] = (number,) * count if parameter.per_input else number
            with pytest.raises(MethodError, match=f"^{parameter.name} must be ") as caught:
                method.kernel(InputSpec(count, base, (3, 4)), settings)
            assert caught.value.parameters == (parameter.name,)


class TestMessages:
    @pytest.mark.parametrize(
        ("value", "meant"),
        [
            (50, 0.5),
            (100, 1),
            ("53", 0.53),
            ("50%", 0.5),
            ("7.5 %", 0.075),
            ("0,5", 0.5),
            (-0.5, 0.5),
            (True, 1),
            (1.5, None),
            (-50, None),
            (101, None),
            ("half", None),
            (10**400, None),
        ],
    )
    def test_suggest_the_probable_value(self, value: Any, meant: float | None) -> None:
        (density,) = (parameter for parameter in BUILT_IN["ties"].parameters if parameter.name == "density")
        with pytest.raises(ParameterError) as caught:
            accept(value, density)
        text, _, suggestion = str(caught.value).partition(": did you mean ")
        assert text.startswith("density must be between 0 and 1, got ")
        assert suggestion == ("" if meant is None else f"{meant:g}?")

    def test_a_whole_number_is_suggested_for_one(self) -> None:
        (steps, _) = BUILT_IN["karcher"].parameters
        for value, text in ((1.5, "got 1.5"), (True, "got true: did you mean 1?"), (-1, "got -1")):
            with pytest.raises(ParameterError) as caught:
                accept(value, steps)
            assert str(caught.value) == f"max_iter must be a whole number (at least 1), {text}"

    def test_all_mistakes_of_a_recipe_are_reported(self) -> None:
        error = parse_error("""\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: yes, density: 50}
  - model: b
    parameters:
      weight: [1, x]
      density: {filter: mlp, value: -0.5}
parameters: {normalize: 3}
dtype: float61
""")
        assert str(error).splitlines() == [
            "r.yml:5: models[0].parameters.weight: ties, model a: weight must be a finite number, got true: "
            "did you mean 1?",
            "r.yml:5: models[0].parameters.density: ties, model a: density must be between 0 and 1, got 50: "
            "did you mean 0.5?",
            "r.yml:8: models[1].parameters.weight[1]: ties, model b: weight must be a finite number, got 'x'",
            "r.yml:9: models[1].parameters.density.value: ties, model b, filter 'mlp': density must be between "
            "0 and 1, got -0.5: did you mean 0.5?",
            "r.yml:10: parameters.normalize: ties: normalize must be true or false, got 3",
            "r.yml:11: dtype: unknown dtype 'float61'; did you mean `float64`?",
        ]
        assert (error.line, error.path) == (5, ("models", 0, "parameters", "weight"))
        assert [other.line for other in error.more] == [5, 8, 9, 10, 11]

    def test_many_mistakes_are_counted(self) -> None:
        values = ", ".join(["50"] * 30)
        lines = str(parse_error(text_of(BUILT_IN["ties"], everywhere=f"density: [{values}]"))).splitlines()
        assert len(lines) == 11
        assert lines[-1] == "... and 20 more mistakes"

    def test_a_recipe_without_a_file_names_the_keys(self) -> None:
        data = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": math.nan}}]}
        with pytest.raises(
            RecipeError, match=r"^recipe: models\[0\].parameters.weight: linear, model a: weight must be"
        ):
            load_recipe(data, methods=merge_methods())


def test_the_command_line_shows_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "della"]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    for name, accepts in {"density": "between 0 and 1", "epsilon": "at least 0 and below 0.5"}.items():
        assert f" {accepts} " in shown[name]


def test_the_command_line_rejects_invalid_values(
    llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The values 50 and -0.5, which used to be clamped to 1 and 0."""
    file, out = tmp_path / "r.yml", tmp_path / "out"
    for value, meant in ((50, 0.5), (-0.5, 0.5)):
        file.write_text(
            f"merge_method: ties\nbase_model: {llamas['base']}\nmodels:\n  - model: {llamas['a']}\n"
            f"    parameters:\n      weight: 1\n      density: {value}\n"
        )
        for command in (["plan", str(file)], ["merge", str(file), str(out)]):
            assert main([*command, "--device", "cpu"]) == 2
            assert capsys.readouterr().err == (
                f"mergeloom: {file}:7: models[0].parameters.density: ties, model {llamas['a']}: density must be "
                f"between 0 and 1, got {value}: did you mean {meant}?\n"
            )
    assert not out.exists()
