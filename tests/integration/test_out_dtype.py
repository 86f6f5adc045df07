"""`out_dtype` for each tensor: as stored, or by parts of names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeloom.engine.model.warnings import ModelWarningKind
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.outputs import config_of, read_model

CPU = Options(device="cpu", threads=1)
LLAMA = tiny_llama(layers=2)
NORMS_F32 = {name: "F32" if "norm" in name else "BF16" for name in LLAMA.tensors}
EDGES_F32 = {name: "F32" if "layers" not in name else "F16" for name in LLAMA.tensors}
FILTERS = [{"filter": "lm_head", "value": "float32"}, {"filter": "mlp", "value": "same"}, {"value": "bfloat16"}]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models that store norms, or everything outside the layers, in float32."""
    config = LLAMA.config | {"torch_dtype": "bfloat16"}
    a = write_checkpoint(tmp_path / "a", LLAMA.tensors, dtype=NORMS_F32, config=config, fill=1)
    b = write_checkpoint(tmp_path / "b", LLAMA.tensors, dtype=EDGES_F32, config=config, fill=2)
    return a, b


def mean(a: Path, b: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(a)}, {"model": str(b)}]
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}, **more}


def pairs(out: Path, a: Path, b: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of each tensor, its value in the output, and the mean in float64."""
    made, ours, theirs = (read_model(path) for path in (out, a, b))
    assert made.keys() == ours.keys()
    for name, value in made.items():
        yield name, value, (ours[name].double() + theirs[name].double()) / 2


def test_same_is_the_dtype_in_which_the_first_input_stores_each_tensor(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    merge(mean(*models, out_dtype="same"), tmp_path / "out", CPU)
    for name, made, exact in pairs(tmp_path / "out", *models):
        assert made.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(made, exact.float().to(made.dtype))
    assert config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"
    assert not [each for each in plan(mean(*models, out_dtype="same"), CPU).findings if "dtype" in str(each)]


def test_same_follows_the_base_model(models: tuple[Path, Path]) -> None:
    a, b = models
    recipe = mean(a, b, out_dtype="same", base_model=str(b))
    graph = plan(recipe, CPU).built.graph
    dtypes = {output.name: graph.node_dtype[output.node].name for output in graph.outputs}
    assert dtypes == EDGES_F32


def test_same_copies_what_it_does_not_change(models: tuple[Path, Path]) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(models[0])}], "out_dtype": "same"}
    assert plan(recipe, CPU).bytes_computed == 0


def test_each_tensor_has_the_dtype_of_the_first_filter_that_matches(models: tuple[Path, Path], tmp_path: Path) -> None:
    b, a = models  # whose projections are in float16
    merge(mean(a, b, out_dtype=FILTERS), tmp_path / "out", CPU)
    found = set()
    for name, made, exact in pairs(tmp_path / "out", a, b):
        expected = torch.float32 if "lm_head" in name else torch.float16 if "mlp" in name else torch.bfloat16
        assert made.dtype == expected, name
        assert torch.equal(made, exact.float().to(expected)), name
        found.add(expected)
    assert len(found) == 3
    assert config_of(tmp_path / "out")["torch_dtype"] == "float16"  # the projections are the largest tensors
    sizes = plan(mean(a, b, out_dtype=FILTERS), CPU).output_dict()
    assert sizes["dtypes"] == ["BF16", "F16", "F32"]


def test_without_a_matching_filter_dtype_applies_or_else_promotion(models: tuple[Path, Path]) -> None:
    only = [{"filter": "lm_head", "value": "float64"}]
    for more, layer in (({}, "F32"), ({"dtype": "float16"}, "F16")):
        graph = plan(mean(*models, out_dtype=only, **more), CPU).built.graph
        dtypes = {output.name: graph.node_dtype[output.node].name for output in graph.outputs}
        assert dtypes["lm_head.weight"] == "F64"
        assert dtypes["model.layers.0.mlp.up_proj.weight"] == layer


def test_config_json_states_the_dtype_of_most_parameters(tmp_path: Path) -> None:
    config = LLAMA.config | {"torch_dtype": "float32"}
    a = write_checkpoint(tmp_path / "a", LLAMA.tensors, dtype="F32", config=config, fill=1)
    rules = [{"filter": "norm", "value": "float32"}, {"value": "float16"}]
    recipe = {"merge_method": "passthrough", "models": [{"model": str(a)}], "out_dtype": rules}
    merge(recipe, tmp_path / "out", CPU)
    assert config_of(tmp_path / "out")["torch_dtype"] == "float16"
    values = read_model(a)
    for name, made in read_model(tmp_path / "out").items():
        assert torch.equal(made, values[name] if "norm" in name else values[name].half())


def test_a_filter_that_matches_nothing_is_a_warning(models: tuple[Path, Path]) -> None:
    found = plan(
        mean(*models, out_dtype=[{"filter": "lm_heat", "value": "float32"}, {"value": "bfloat16"}]), CPU
    ).findings
    (warning,) = [each for each in found if each.kind is ModelWarningKind.FILTER]
    assert "filter 'lm_heat' matches no tensor name" in str(warning)
    assert "did you mean `lm_head`?" in str(warning)


def test_a_quantized_donor_is_rejected_where_its_dtype_is_needed(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    scale = {f"{name}_scale": ()}
    dtypes = dict.fromkeys(LLAMA.tensors, "BF16") | {name: "F8_E4M3", f"{name}_scale": "F32"}
    config = LLAMA.config | {"quantization_config": {"quant_method": "fp8"}}
    a = write_checkpoint(tmp_path / "a", {**LLAMA.tensors, **scale}, dtype=dtypes, config=config)
    copied = {"merge_method": "passthrough", "models": [{"model": str(a)}], "out_dtype": "same"}
    assert plan(copied, CPU).bytes_computed == 0
    scaled = copied | {"parameters": {"scale": 0.5}}
    with pytest.raises(
        CheckpointError, match=r"tensor .*up_proj.weight.* is stored in the format FP8 .*, and out_dtype `same`"
    ):
        plan(scaled, CPU)


def test_an_intermediate_stage_is_rounded_where_a_filter_says_so(models: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = models
    first = mean(a, b, name="first", out_dtype=[{"filter": "mlp", "value": "float16"}])
    last = {"merge_method": "linear", "models": [{"model": "first"}, {"model": str(a)}], "dtype": "float32"}
    merge([first, {**last, "parameters": {"weight": 0.5}}], tmp_path / "out", CPU)
    ours = read_model(a)
    differing = 0
    for name, value in read_model(tmp_path / "out").items():
        exact = (ours[name].double() + read_model(b)[name].double()) / 2
        middle = exact.half().double() if "mlp" in name else exact
        assert torch.allclose(value.double(), (middle + ours[name].double()) / 2, rtol=3e-7, atol=1e-9), name
        differing += not torch.allclose(value.double(), (exact + ours[name].double()) / 2, rtol=3e-7, atol=1e-9)
    assert differing == 6


def test_a_saved_stage_has_the_dtypes_of_its_filters(models: tuple[Path, Path], tmp_path: Path) -> None:
    first = mean(*models, name="first", save=True, dtype="bfloat16", out_dtype=[{"filter": "norm", "value": "same"}])
    last = {"merge_method": "passthrough", "models": [{"model": "first"}], "dtype": "float16"}
    merge([first, last], tmp_path / "out", CPU)
    for name, made, exact in pairs(tmp_path / "out" / "first", *models):
        assert made.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(made, exact.float().to(made.dtype))
