"""`out_dtype` as a dtype, as ``same``, and as a filter list."""

from __future__ import annotations

import pytest

from mergeloom.engine.recipe.entries.output_dtype import DtypeRule, OutputDtype
from mergeloom.engine.recipe.warnings import WarningKind
from mergeloom.io.tensors.dtypes import BF16, F32, DType
from tests.unit.recipe.parsing import parse, refused

MODELS = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"


def read(value: str) -> OutputDtype | None:
    recipe = parse(f"{MODELS}out_dtype: {value}\n")
    assert recipe.warnings == ()
    return recipe.output.out_dtype


def test_without_it_the_stage_has_none() -> None:
    assert parse(MODELS).output.out_dtype is None


@pytest.mark.parametrize(
    ("value", "rules", "constant"),
    [
        ("float32", (DtypeRule(None, F32),), F32),
        ("torch.float32", (DtypeRule(None, F32),), F32),
        ("same", (DtypeRule(None, None),), None),
        ("{value: float32}", (DtypeRule(None, F32),), F32),
        ("{filter: head, value: float32}", (DtypeRule("head", F32),), None),
        ("[{filter: head, value: same}, {value: bfloat16}]", (DtypeRule("head", None), DtypeRule(None, BF16)), None),
        ("[{filter: '*', value: bfloat16}]", (DtypeRule("*", BF16),), BF16),
    ],
)
def test_values(value: str, rules: tuple[DtypeRule, ...], constant: DType | None) -> None:
    found = read(value)
    assert found == OutputDtype(rules)
    assert found is not None
    assert found.constant == constant


def test_the_first_rule_that_matches_applies() -> None:
    found = read("[{filter: mlp, value: same}, {filter: layers.0, value: bfloat16}, {filter: head, value: float32}]")
    assert found is not None
    names = ("layers.0.mlp.w", "layers.0.attn.w", "head.weight", "norm.weight")
    rules = [found.rule(name) for name in names]
    assert [rule and (rule.filter, rule.dtype) for rule in rules] == [
        ("mlp", None), ("layers.0", BF16), ("head", F32), None,
    ]  # fmt: skip


def test_a_rule_after_one_for_all_tensors_is_reported() -> None:
    recipe = parse(f"{MODELS}out_dtype: [{{value: bfloat16}}, {{filter: head, value: float32}}]\n")
    (warning,) = recipe.warnings
    assert warning.kind is WarningKind.UNREACHABLE
    assert warning.place == ("out_dtype", 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int8", "out_dtype: unknown dtype 'int8'; use one of bfloat16, float16, float32, float64, same"),
        ("sam", "out_dtype: unknown dtype 'sam'; did you mean `same`?"),
        ("[]", "out_dtype: expected a list of conditions: `{filter: lm_head, value: float32}`, got an empty list"),
        ("[float32]", "out_dtype[0]: expected a condition, such as `{filter: lm_head, value: float32}`, got 'float32'"),
        ("[{filter: head, value: float32}, bfloat16]", "out_dtype[1]: expected a condition, such as `{filter: lm_head, "
         "value: float32}`, got 'bfloat16'; for all other tensors, write `{value: bfloat16}`"),
        ("[{filter: head, value: [float32]}]", "out_dtype[0].value: expected one of bfloat16, float16, float32, "
         "float64, same, got the list ['float32']"),
        ("[{filter: head}]", "out_dtype[0]: `value` is missing"),
        ("[{filter: 3, value: same}]", "out_dtype[0].filter: expected a substring of tensor names, got 3"),
    ],
)  # fmt: skip
def test_values_that_are_rejected(value: str, message: str) -> None:
    assert message in str(refused(f"{MODELS}out_dtype: {value}\n"))
