"""Stages, `diff` and `plan` see the values of quantized models in every format, as those of their twins."""

from __future__ import annotations

from pathlib import Path

import pytest

import mergeloom
from mergeloom.engine.run.planning import plan
from mergeloom.report.explain import explain
from tests.support.models import quantized
from tests.support.outputs import read_model

STAGES = """\
name: copied
merge_method: passthrough
models: [{{model: {first}}}]
---
merge_method: linear
models: [{{model: copied}}, {{model: {second}}}]
parameters: {{weight: 0.5}}
dtype: float32
"""


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_a_stage_that_copies_codes_passes_on_their_values(tmp_path: Path, form: str) -> None:
    (model, values), (other, _) = (quantized.write_pair(tmp_path, form, seed) for seed in (1, 2))
    merged = []
    for number, first in enumerate((model, values)):
        file = tmp_path / f"{number}.yml"
        file.write_text(STAGES.format(first=first, second=other))
        mergeloom.merge(file, tmp_path / f"out{number}", device="cpu")
        merged.append(
            {name: tensor.numpy().tobytes() for name, tensor in read_model(tmp_path / f"out{number}").items()}
        )
    assert merged[0] == merged[1]


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_a_model_and_its_values_are_equal(tmp_path: Path, form: str) -> None:
    (model, values), (other, others) = (quantized.write_pair(tmp_path, form, seed) for seed in (1, 2))
    assert mergeloom.diff(model, values).equal
    found, expected = mergeloom.diff(model, other), mergeloom.diff(values, others)
    similarities = [{tensor.name: tensor.similarity for tensor in each.tensors} for each in (found, expected)]
    assert similarities[0] == similarities[1]
    assert any(each.formats[0] for each in found.tensors)


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_a_plan_that_copies_codes_counts_the_parameters_of_values(tmp_path: Path, form: str) -> None:
    model, values = quantized.write_pair(tmp_path, form, 1)
    copied, expected = (
        plan({"merge_method": "passthrough", "models": [{"model": str(each)}]}).to_dict() for each in (model, values)
    )
    assert copied["output"]["parameters"] == expected["output"]["parameters"]
    assert copied["inputs"]["tensors"] == expected["inputs"]["tensors"]
    merged = plan({"merge_method": "passthrough", "models": [{"model": str(model)}], "dtype": "float32"})
    for name in read_model(values):
        assert [source.name for source in explain(merged, name).sources] == [name]
