"""`out_dtype` as a dtype, as ``same``, and as a filter list."""

from __future__ import annotations

import pytest

from mergeloom.engine.recipe.entries.block_format import BlockFormat
from mergeloom.engine.recipe.entries.output_dtype import DtypeRule, OutputDtype, Stored
from mergeloom.engine.recipe.warnings import WarningKind
from mergeloom.io.tensors.dtypes import BF16, DTYPES, F32, DType
from tests.unit.recipe.parsing import parse, refused

E8M0 = DTYPES["F8_E8M0"]
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
        ("same", (DtypeRule(None, Stored.SAME),), None),
        ("fp8_blocks", (DtypeRule(None, BlockFormat()),), None),
        ("{format: fp8_blocks}", (DtypeRule(None, BlockFormat(128, 128, F32)),), None),
        ("{format: fp8_blocks, block: [64, 32], scales: ue8m0}", (DtypeRule(None, BlockFormat(64, 32, E8M0)),), None),
        ("{value: {format: fp8_blocks, scales: torch.bfloat16}}",
         (DtypeRule(None, BlockFormat(128, 128, BF16)),), None),
        ("[{filter: mlp, value: fp8_blocks}, {filter: attn, value: fp8_blocks}, {value: same}]",
         (DtypeRule("mlp", BlockFormat()), DtypeRule("attn", BlockFormat()), DtypeRule(None, Stored.SAME)), None),
        ("[{value: fp8_blocks}, {value: bfloat16}]", (DtypeRule(None, BlockFormat()), DtypeRule(None, BF16)), None),
        ("{value: float32}", (DtypeRule(None, F32),), F32),
        ("{filter: head, value: float32}", (DtypeRule("head", F32),), None),
        ("[{filter: head, value: same}, {value: bfloat16}]", (DtypeRule("head", Stored.SAME), DtypeRule(None, BF16)),
         None),
        ("[{filter: '*', value: bfloat16}]", (DtypeRule("*", BF16),), BF16),
    ],
)  # fmt: skip
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
    assert [rule and (rule.filter, rule.value) for rule in rules] == [
        ("mlp", Stored.SAME), ("layers.0", BF16), ("head", F32), None,
    ]  # fmt: skip


def test_a_rule_after_one_for_all_tensors_is_reported() -> None:
    recipe = parse(f"{MODELS}out_dtype: [{{value: bfloat16}}, {{filter: head, value: float32}}]\n")
    (warning,) = recipe.warnings
    assert warning.kind is WarningKind.UNREACHABLE
    assert warning.place == ("out_dtype", 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int8", "out_dtype: unknown dtype 'int8'; use one of bfloat16, float16, float32, float64, same, fp8_blocks"),
        ("sam", "out_dtype: unknown dtype 'sam'; did you mean `same`?"),
        ("[]", "out_dtype: expected a list of conditions: `{filter: lm_head, value: float32}`, got an empty list"),
        ("[float32]", "out_dtype[0]: expected a condition, such as `{filter: lm_head, value: float32}`, got 'float32'"),
        ("[{filter: head, value: float32}, bfloat16]", "out_dtype[1]: expected a condition, such as `{filter: lm_head, "
         "value: float32}`, got 'bfloat16'; for all other tensors, write `{value: bfloat16}`"),
        ("[{filter: head, value: [float32]}]", "out_dtype[0].value: expected one of bfloat16, float16, float32, "
         "float64, same, fp8_blocks, got the list ['float32']"),
        ("[{filter: head}]", "out_dtype[0]: `value` is missing"),
        ("fp8_block", "out_dtype: unknown dtype 'fp8_block'; did you mean `fp8_blocks`?"),
        ("{format: fp8}", "out_dtype.format: unknown format 'fp8'; the only one is fp8_blocks, as in `{format: "),
        ("{format: fp8_blocks, block: 128}", "out_dtype.block: expected the rows and columns of a block, such as [128, "
         "128], got 128"),
        ("{format: fp8_blocks, block: [128, 0]}", "such as [128, 128], got"),
        ("{format: fp8_blocks, block: [true, 128]}", "such as [128, 128], got"),
        ("{format: fp8_blocks, block: [128]}", "such as [128, 128], got"),
        ("{format: fp8_blocks, scales: float16}", "scales can be float32, bfloat16, ue8m0, not 'float16'"),
        ("[{filter: a, value: fp8_blocks}, {filter: b, value: {format: fp8_blocks, block: [64, 64]}}]",
         "out_dtype[1].filter: config.json describes one size of blocks and one dtype of scales"),
        ("[{filter: 3, value: same}]", "out_dtype[0].filter: expected a substring of tensor names, got 3"),
    ],
)  # fmt: skip
def test_values_that_are_rejected(value: str, message: str) -> None:
    assert message in str(refused(f"{MODELS}out_dtype: {value}\n"))
