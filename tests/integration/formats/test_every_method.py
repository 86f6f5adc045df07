"""Every method on quantized inputs is within a unit in the last place of float64, computed from complete tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergeloom
from mergeloom.methods import merge_methods
from tests.support.methods.cases import CASES, Case
from tests.support.methods.expected import WITHOUT_BASE, expected
from tests.support.methods.reference import Expected
from tests.support.models import quantized, write_checkpoint
from tests.support.outputs import read_model
from tests.support.published import masks
from tests.support.published.compare import STEP, ulp_at

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = {"fp8 blocks": (261, 517), "int4": (130, 528), "mxfp4": (130, 528)}
"""By format, the shape of the weight; FP8 has partial blocks at both edges."""
LARGEST_SHARES = {"fp8 blocks": 0.001, "int4": 0.002, "mxfp4": 0.001}
"""Shares of elements that may fit another election or threshold than the one that float64 chooses.

On the grid of INT4, sums of task vectors with weights such as 0.5, 0.3 and 0.4 are often 0, where rounding elects a
sign.
"""
OTHER_FORMATS = [
    (form, case) for form in ("int4", "mxfp4") for case in CASES if case.method in ("linear", "slerp", "ties", "della")
]


def fine_tunes(count: int, base: int | None, shape: tuple[int, int]) -> list[Tensor]:
    """Weights with rows of several magnitudes, and changes of 7% as in a strong fine-tune."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.exp2(torch.randint(-4, 1, (shape[0], 1), generator=generator).float())
    start = torch.randn(shape, generator=generator) * rows * 0.02
    steps = [torch.randn(shape, generator=generator) * rows * 0.0014 for _ in range(count)]
    return [start if number == base else start + step for number, step in enumerate(steps)]


def write_models(directory: Path, form: str, case: Case) -> tuple[list[Path], list[Tensor]]:
    """Write a model for each input, and return the values that the format's library decodes."""
    quantize, section = quantized.FORMATS[form]
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": section}
    models, values = [], []
    for number, weight in enumerate(fine_tunes(case.models, case.base, SHAPES[form])):
        made = quantize(weight)
        stored = {f"{NAME.removesuffix('.weight')}.{ending}": tensor for ending, tensor in made.stored.items()}
        models.append(write_checkpoint(directory / str(number), stored, config=config))
        values.append(made.value)
    return models, values


def recipe(case: Case, models: Sequence[Path], dtype: str) -> dict[str, Any]:
    """A recipe with the models in the order of the case's inputs."""
    entries: list[dict[str, Any]] = []
    for number, model in enumerate(models):
        of_input = {name: value[number] for name, value in case.parameters.items() if isinstance(value, tuple)}
        is_base = number == case.base and case.method not in WITHOUT_BASE
        entries.append({"model": str(model)} | ({} if is_base else {"parameters": of_input}))
    shared = {name: value for name, value in case.parameters.items() if not isinstance(value, tuple)}
    made = {"merge_method": case.method, "models": entries, "parameters": shared, "dtype": dtype}
    return made if case.base is None else made | {"base_model": str(models[case.base])}


def reference(case: Case, values: Sequence[Tensor]) -> Expected:
    """The valid outputs in float64; masks are those of the definition of the random numbers."""
    x = [value.to(torch.float64) for value in values]
    key = masks.key_of(0, NAME)

    def mask(number: int) -> Tensor:
        density = case.parameters["density"][number]
        if "epsilon" not in case.parameters:
            return masks.dare(tuple(x[0].shape), density, key=key, position=number)
        delta = x[number] - x[case.base or 0]
        return masks.della(delta, density, case.parameters["epsilon"][number], key=key, position=number)

    def drawn() -> list[list[Tensor]]:
        others = [number for number in range(case.models) if number != case.base]
        found = [mask(number) for number in others]
        if case.parameters.get("unbiased"):
            found = [each / chance(case, x, number) for each, number in zip(found, others, strict=True)]
        return [[each] for each in found]

    return expected(case.method, x, base=case.base, parameters=case.parameters, drawn=drawn)


def chance(case: Case, x: Sequence[Tensor], number: int) -> Tensor:
    """The probability with which each element of a task vector is kept."""
    density, delta = case.parameters["density"][number], x[number] - x[case.base or 0]
    width = case.parameters.get("epsilon", (0.0,) * case.models)[number]
    ranks = delta.abs().to(torch.float32).argsort(dim=1, stable=True).argsort(dim=1).to(torch.float64)
    return density - width + 2 * width * ranks / (delta.shape[1] - 1)


def assert_within_an_ulp(found: Tensor, wanted: Expected, models: int, share: float) -> None:
    """One unit in the last place, and the rounding of float32 terms that cancel; close decisions can be others'."""
    values = found.to(torch.float64)

    def fits(candidate: Tensor) -> Tensor:
        return (values - candidate).abs() <= ulp_at(candidate, found.dtype) + models * STEP * wanted.size

    exact = fits(wanted.outputs[0])
    assert torch.stack([fits(each) for each in wanted.outputs]).any(0).all()
    assert int((~exact).sum()) < share * exact.numel()


def check(directory: Path, form: str, case: Case, dtype: str) -> None:
    models, values = write_models(directory, form, case)
    mergeloom.merge(recipe(case, models, dtype), directory / "out", device="cpu")
    found: Mapping[str, Tensor] = read_model(directory / "out")
    assert found.keys() == {NAME}
    assert found[NAME].dtype == getattr(torch, dtype)
    assert_within_an_ulp(found[NAME], reference(case, values), case.models, LARGEST_SHARES[form])


def test_every_registered_method_is_among_the_cases() -> None:
    assert {case.method for case in CASES} == set(merge_methods())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_method_on_fp8_blocks_equals_float64(tmp_path: Path, case: Case, dtype: str) -> None:
    check(tmp_path, "fp8 blocks", case, dtype)


@pytest.mark.parametrize(("form", "case"), OTHER_FORMATS, ids=[f"{form}-{case}" for form, case in OTHER_FORMATS])
def test_a_method_on_4_bits_equals_float64(tmp_path: Path, form: str, case: Case) -> None:
    check(tmp_path, form, case, "bfloat16")
