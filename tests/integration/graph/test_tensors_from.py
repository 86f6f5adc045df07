"""`tensors_from`: tensors that are copied from one model, such as a convolution with nine input channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergeloom.engine.model.inspect import inspect_model
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, RecipeError
from mergeloom.report.explain import explain, explanation_sections
from mergeloom.report.sections import plain
from tests.support.merges.single_files import CONVOLUTION, CPU, check_mean, linear, write_pair
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.models.diffusion import Arrays, sd15, write_file


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints in a directory with other files that don't belong to them."""
    return write_pair(tmp_path / "checkpoints")


@pytest.fixture
def inpainting(tmp_path: Path) -> Path:
    """A checkpoint whose UNet has nine input channels."""
    return write_file(tmp_path / "inpainting.safetensors", sd15(7, channels=9, dtype="float32"))


def test_nine_input_channels_come_from_one_model(pair: tuple[Path, Path], inpainting: Path, tmp_path: Path) -> None:
    taken = {"filter": CONVOLUTION, "model": str(inpainting)}
    recipe = linear(*pair, tensors_from=[taken], dtype="float16")
    result = merge(recipe, tmp_path / "out", CPU)
    found: Arrays = load_file(tmp_path / "out/model.safetensors")
    expected = load_file(inpainting)[CONVOLUTION]
    assert expected.shape == (8, 9, 3, 3)
    assert found[CONVOLUTION].dtype == np.float16
    assert (found[CONVOLUTION] == expected.astype(np.float16)).all()
    first, second = map(load_file, pair)
    other = "model.diffusion_model.out.2.weight"
    check_mean(found[other], [first[other], second[other]], (0.25, 0.75))
    assert inspect_model(tmp_path / "out").description.title.startswith("Stable Diffusion checkpoint with 9 input ch")
    unused = {reason.reason: reason.tensors for reason in result.plan.built.unused}
    assert CONVOLUTION in unused[f"`tensors_from` takes it from {inpainting}"]
    assert len(unused["`tensors_from` takes only other tensors of this model"]) == len(load_file(inpainting)) - 1
    explained = explain(plan(recipe, CPU), CONVOLUTION)
    assert explained.to_dict()["tensors_from"] == CONVOLUTION
    assert [source.model for source in explained.sources] == [str(inpainting)]
    assert f"tensors_from, filter '{CONVOLUTION}'" in plain(explanation_sections(explained))
    assert "- `inpainting.safetensors`" in (tmp_path / "out/README.md").read_text()


def test_other_input_channels_are_an_error_with_the_entry_to_add(pair: tuple[Path, Path], inpainting: Path) -> None:
    with pytest.raises(CheckpointError, match="has shape") as caught:
        plan(linear(pair[0], inpainting), CPU)
    assert f"tensors_from: [{{filter: {CONVOLUTION}, model: {inpainting}}}]" in str(caught.value)
    planned = plan(linear(pair[0], inpainting, tensors_from=[{"filter": CONVOLUTION, "model": str(inpainting)}]), CPU)
    assert planned.warnings == ()


def test_a_model_of_tensors_from_may_be_a_stage(pair: tuple[Path, Path], tmp_path: Path) -> None:
    third = write_file(tmp_path / "c.safetensors", sd15(2))
    stages = [
        linear(pair[0], third, weights=(0.5, 0.5), name="text encoders"),
        linear(*pair, tensors_from={"filter": "cond_stage_model.", "model": "text encoders"}),
    ]
    merge(stages, tmp_path / "out", CPU)
    a, b, c = (load_file(file) for file in (*pair, third))
    found = load_file(tmp_path / "out/model.safetensors")
    name = "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    check_mean(found[name], [a[name], c[name]], (0.5, 0.5))
    check_mean(found[CONVOLUTION], [a[CONVOLUTION], b[CONVOLUTION]], (0.25, 0.75))


def test_a_layer_of_a_language_model_comes_from_another_one(tmp_path: Path) -> None:
    models = [write_checkpoint(tmp_path / str(n), tiny_llama(layers=3), fill=n, dtype="F32") for n in range(3)]
    taken = [{"filter": "layers.1.mlp", "model": str(models[2])}]
    merge(linear(*models[:2], tensors_from=taken), tmp_path / "out", CPU)
    found, first, second, third = (load_file(model / "model.safetensors") for model in (tmp_path / "out", *models))
    for name, value in found.items():
        if "layers.1.mlp" in name:
            assert (value == third[name]).all()
        else:
            check_mean(value, [first[name], second[name]], (0.25, 0.75))
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("input_block.", "c")], r"filter 'input_block\.' matches no tensor of .*; did you mean `input_blocks\.`"),
        (
            [("out.2", "c"), ("out.2.weight", "a")],
            r"filter 'out.2.weight' matches .*out.2.weight, which filter 'out.2' takes from",
        ),
        ([("cond_stage_model.", "v")], r"matches cond_stage_model\S*layers.11\S*, which .*v.safetensors does not have"),
    ],
)
def test_mistakes_in_tensors_from(
    entries: list[tuple[str, str]], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    partial = {name: value for name, value in sd15(3).items() if "layers.11" not in name}
    models = {
        "a": pair[0],
        "c": write_file(tmp_path / "c.safetensors", sd15(2)),
        "v": write_file(tmp_path / "v.safetensors", partial),
    }
    taken = [{"filter": text, "model": str(models[name])} for text, name in entries]
    with pytest.raises(RecipeError, match=message) as caught:
        plan(linear(*pair, tensors_from=taken), CPU)
    assert "tensors_from[" in str(caught.value)


def test_a_tensor_that_only_this_model_has_is_added(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_file(tmp_path / "e.safetensors", sd15(4, ema=True))
    planned = plan(linear(*pair, tensors_from=[{"filter": "model_ema.decay", "model": str(other)}]), CPU)
    names = [output.name for output in planned.built.graph.outputs]
    assert set(names) == {*load_file(pair[0]), "model_ema.decay"}


def test_a_filter_that_only_matches_layers_outside_the_slices_is_an_error(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "a", tiny_llama(layers=4))
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(model), "layer_range": [0, 2]}]}],
        "tensors_from": [{"filter": "layers.3.mlp", "model": str(model)}],
    }
    with pytest.raises(RecipeError, match=r"filter 'layers.3.mlp' matches no tensor of the output"):
        plan(recipe, CPU)
    recipe["tensors_from"] = [{"filter": "embed_tokens", "model": str(model)}]
    other = write_checkpoint(tmp_path / "b", tiny_llama(layers=4), fill=1)
    recipe["non_layer"] = {"embeddings": str(other)}
    with pytest.raises(RecipeError, match="which `non_layer` takes from"):
        plan(recipe, CPU)
