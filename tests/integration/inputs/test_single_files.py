"""Single files as models: a pair of diffusion checkpoints merges, and the output is one file like them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mergeloom.engine.model.inspect import inspect_model
from mergeloom.engine.run.diff.compare import Comparison
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.errors import CheckpointError, UsageError
from mergeloom.report.plan import plan_text
from tests.support.merges.resumable import interrupt, run
from tests.support.merges.single_files import CONVOLUTION, CPU, check_mean, linear, write_pair
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.models.diffusion import DIFFUSERS_UNET, FLUX, sd15, sdxl, values, write_file
from tests.support.outputs import digests
from tests.support.plans import without_location


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints in a directory with other files that don't belong to them."""
    return write_pair(tmp_path / "checkpoints")


def test_a_pair_of_checkpoints_merges_to_one_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = merge(linear(*pair), out, CPU)
    assert result.plan.findings == ()
    assert result.measured.bytes_read == result.plan.bytes_read
    assert result.measured.bytes_written == result.plan.bytes_written
    assert sorted(file.name for file in out.iterdir()) == [
        *("README.md", "mergekit_config.yml", "mergeloom.json", "model.safetensors")
    ]
    found, first, second = load_file(out / "model.safetensors"), *map(load_file, pair)
    assert found.keys() == first.keys()
    for name, value in found.items():
        assert value.dtype == first[name].dtype
        if name.endswith(("position_ids", "betas", "cumprod")):
            assert (value == first[name]).all()
        else:
            check_mean(value, [first[name], second[name]], (0.25, 0.75))
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert file.metadata() == {
            "format": "pt",
            "modelspec.architecture": "stable-diffusion-v1",
            "ss_steps": "100",
        }
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "`a.safetensors`" in card
    assert "Layers" not in card
    assert "not stated by the models" in card


def test_verify_diff_inspect_and_another_merge_take_the_output(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(linear(*pair), out, CPU)
    assert verify(out, sources=True, models={file.name: str(file) for file in pair}).whole
    different = Comparison(out, pair[0], threads=1).run()
    assert len(different.tensors) == len(load_file(pair[0]))
    inspection = inspect_model(out).to_dict()
    assert inspection["content"]["kind"] == "diffusion model"
    assert inspection["remarks"] == []
    for number, again in enumerate((out, out / "model.safetensors")):
        result = merge(linear(again, pair[1], weights=(0.5, 0.5)), tmp_path / f"again {number}", CPU)
        assert result.plan.findings == ()
        assert [shard.name for shard in result.plan.layout.shards] == ["model.safetensors"]
        assert result.out is not None
        found, first, second = map(load_file, (result.out / "model.safetensors", out / "model.safetensors", pair[1]))
        check_mean(found[CONVOLUTION], [first[CONVOLUTION], second[CONVOLUTION]], (0.5, 0.5))
        with safe_open(result.out / "model.safetensors", "numpy") as file:
            assert file.metadata()["ss_steps"] == "100"


def test_stages_and_task_vectors_of_single_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    third = write_file(tmp_path / "c.safetensors", sd15(2))
    stages = [
        linear(*pair, name="mean"),
        {
            "merge_method": "task_arithmetic",
            "base_model": str(third),
            "models": [{"model": "mean", "parameters": {"weight": 1.0}}],
            "parameters": {"lambda": 0.5},
        },
    ]
    stages[0]["save"] = True
    merge(stages, tmp_path / "out", CPU)
    a, b, c = (load_file(file) for file in (*pair, third))
    found = load_file(tmp_path / "out/model.safetensors")
    check_mean(found[CONVOLUTION], [a[CONVOLUTION], b[CONVOLUTION], c[CONVOLUTION]], (0.125, 0.375, 0.5))
    saved = load_file(tmp_path / "out/mean/model.safetensors")
    check_mean(saved[CONVOLUTION], [a[CONVOLUTION], b[CONVOLUTION]], (0.25, 0.75))
    assert not list((tmp_path / "out").rglob("config.json"))
    assert (
        inspect_model(tmp_path / "out").description.source_text
        == "directory, no config.json, 1 file, made by mergeloom"
    )
    text = inspect_model(tmp_path / "out/mean").description.source_text
    assert text == f"directory, no config.json, 1 file, a stage that was saved with the merge in {tmp_path / 'out'}"


@pytest.mark.parametrize(("tensors", "title"), [(sdxl, "SDXL checkpoint"), (lambda n: values(FLUX, n), "Flux transf")])
def test_other_architectures_merge_by_names(tensors: Any, title: str, tmp_path: Path) -> None:
    files = [write_file(tmp_path / f"{number}.safetensors", tensors(number)) for number in (0, 1)]
    assert inspect_model(files[0]).description.title.startswith(title)
    result = merge(linear(*files), tmp_path / "out", CPU)
    assert result.plan.built.matched_by_name
    first, second = map(load_file, files)
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        check_mean(value, [first[name], second[name]], (0.25, 0.75))


def test_models_of_different_families_are_rejected_with_both_names(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_file(tmp_path / "xl.safetensors", sdxl(1))
    with pytest.raises(CheckpointError) as caught:
        plan(linear(pair[0], other), CPU)
    kinds = "Stable Diffusion checkpoint and SDXL checkpoint"
    assert without_location(caught.value).startswith(
        f"{pair[0]} and {other} are of different architectures, by their tensor names: {kinds}"
    )


def test_filters_choose_parts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    weight = [{"filter": "model.diffusion_model.", "value": 0.5}, {"value": 0}]
    recipe = linear(*pair)
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "model.diffusion_model.", "value": 0.5}, {"value": 1}]}
    recipe["models"][1]["parameters"] = {"weight": weight}
    merge(recipe, tmp_path / "out", CPU)
    found, first, second = load_file(tmp_path / "out/model.safetensors"), *map(load_file, pair)
    for name, value in found.items():
        if name.startswith("model.diffusion_model."):
            check_mean(value, [first[name], second[name]], (0.5, 0.5))
        else:
            assert (value == first[name]).all(), name


@pytest.mark.parametrize("key", ["slices", "gradient"])
def test_layers_of_a_diffusion_model_are_rejected_with_filters_as_the_alternative(
    key: str, pair: tuple[Path, Path]
) -> None:
    recipe = linear(*pair)
    if key == "slices":
        source = {"model": str(pair[0]), "layer_range": [0, 2]}
        recipe = {"merge_method": "passthrough", "slices": [{"sources": [source]}]}
    else:
        recipe["models"][0]["parameters"] = {"weight": [0, 1]}
    with pytest.raises(CheckpointError, match=r"it is a diffusion model, whose parts have layers .* Use filters"):
        plan(recipe, CPU)


def test_a_file_larger_than_the_default_shard_size_stays_in_one_piece(tmp_path: Path) -> None:
    shapes = {f"model.diffusion_model.input_blocks.{n}.0.weight": (20_000, 25_000) for n in range(7)}
    shapes |= {"first_stage_model.quant_conv.weight": (8, 8)}
    files = []
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, shapes, fill=None)
        files.append((tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors"))
    whole = plan(linear(*files), CPU)
    assert whole.layout.nbytes > 7 * 10**9
    assert [shard.name for shard in whole.layout.shards] == ["model.safetensors"]
    split = plan(linear(*files), Options(device="cpu", threads=1, max_ram=4 << 30, shard_size=2 * 10**9))
    assert len(split.layout.shards) == 7
    assert max(shard.nbytes for shard in split.layout.shards) <= 2 * 10**9


def test_metadata_counts_towards_the_size_of_a_shard(tmp_path: Path) -> None:
    files = [
        write_file(tmp_path / f"{number}.safetensors", sd15(number), description="x" * 30_000) for number in (0, 1)
    ]
    planned = plan(linear(*files), Options(device="cpu", threads=1, max_ram=4 << 30, shard_size=60_000))
    assert max(shard.nbytes for shard in planned.layout.shards) <= 60_000
    assert len(planned.layout.shards) > 1


def test_an_interrupted_merge_resumes(tmp_path: Path) -> None:
    shapes = {f"model.diffusion_model.input_blocks.{n}.0.weight": (96, 128) for n in range(12)}
    files = [write_file(tmp_path / f"{n}.safetensors", values(shapes, n, "float32"), note="kept") for n in (0, 1)]
    run(linear(*files), tmp_path / "at once", CPU)
    assert interrupt(linear(*files), tmp_path / "out", 2, CPU)
    said: list[str] = []
    run(linear(*files), tmp_path / "out", CPU, say=said.append)
    assert said[0].startswith("resuming: ")
    assert digests(tmp_path / "out") == digests(tmp_path / "at once")


def test_a_file_with_the_usual_name_is_the_model_of_its_directory(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "a", tiny_llama(layers=2))
    other = write_checkpoint(tmp_path / "b", tiny_llama(layers=2), fill=1)
    planned = plan(linear(model / "model.safetensors", other), CPU)
    assert planned.files.config is not None
    assert planned.built.layers == 2
    named = (other / "model.safetensors").rename(other / "tuned.safetensors")
    planned = plan(linear(named, model), CPU)
    assert planned.files.config is None
    assert "give the path of the directory" in " ".join(planned.warnings)
    assert planned.built.layers == 2


def test_a_config_json_of_something_else_is_ignored(pair: tuple[Path, Path]) -> None:
    planned = plan(linear(*pair), CPU)
    assert planned.warnings == ()
    assert planned.files.config is None
    assert "metadata from" in plan_text(planned)


def test_weights_of_diffusers_keep_their_config(tmp_path: Path) -> None:
    config = {"_class_name": "UNet2DConditionModel", "in_channels": 4}
    units = []
    for number, name in enumerate(("a", "b")):
        unit = write_checkpoint(tmp_path / name / "unet", DIFFUSERS_UNET, fill=number, config=config)
        (unit / "model.safetensors").rename(unit / "diffusion_pytorch_model.safetensors")
        write_checkpoint(tmp_path / "variant", DIFFUSERS_UNET, fill=number)
        (tmp_path / "variant/model.safetensors").rename(unit / "diffusion_pytorch_model.fp16.safetensors")
        units.append(unit)
    planned = plan(linear(units[0], units[1] / "diffusion_pytorch_model.safetensors"), CPU)
    assert planned.files.config is not None
    assert planned.files.config["_class_name"] == "UNet2DConditionModel"
    assert len(planned.built.graph.outputs) == len(DIFFUSERS_UNET)
    assert inspect_model(units[0]).description.title == "UNet2DConditionModel of diffusers"
    for size, names in ((5 * 10**9, ["diffusion_pytorch_model.safetensors"]), (8_200, None)):
        out = tmp_path / str(size)
        options = Options(device="cpu", threads=1, max_ram=4 << 30, shard_size=size)
        result = merge(linear(*units, weights=(0.5, 0.5)), out, options)
        files = sorted(file.name for file in out.glob("*.safetensors"))
        assert files == names if names else len(files) > 1
        assert (out / "diffusion_pytorch_model.safetensors.index.json").exists() == (len(files) > 1)
        assert "library_name: diffusers" in (out / "README.md").read_text()
        assert inspect_model(out).to_dict()["tensors"] == len(DIFFUSERS_UNET)
        assert {shard.name for shard in result.plan.layout.shards} == set(files)


def test_an_output_that_is_named_like_a_file_is_rejected(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="OUT is a directory, not a file"):
        merge(linear(*pair), tmp_path / "merged.safetensors", CPU)
    assert not (tmp_path / "merged.safetensors").exists()


# ------------------------------------------------------------------------------------------------ EMA copies, parts


@pytest.mark.parametrize("ema", [(True, True), (True, False), (False, True)])
def test_an_ema_copy_is_merged_if_all_models_have_one(ema: tuple[bool, bool], tmp_path: Path) -> None:
    files = [write_file(tmp_path / f"{n}.safetensors", sd15(n, ema=has)) for n, has in enumerate(ema)]
    planned = plan(linear(*files), CPU)
    names = [output.name for output in planned.built.graph.outputs]
    copies = [name for name in load_file(files[ema.index(True)]) if name.startswith("model_ema.")]
    assert copies
    assert {name for name in names if name.startswith("model_ema.")} == (set(copies) if all(ema) else set())
    dropped = [unused for unused in planned.built.unused if "has no EMA copy" in unused.reason]
    assert sum(len(unused.tensors) for unused in dropped) == (0 if all(ema) else len(copies))


def test_a_missing_part_is_named_with_the_entry_that_adds_it(tmp_path: Path) -> None:
    with_vae = write_file(tmp_path / "a.safetensors", sd15(0))
    without = write_file(tmp_path / "b.safetensors", sd15(1, vae=False))
    with pytest.raises(CheckpointError) as caught:
        plan(linear(with_vae, without), CPU)
    entry = f"tensors_from: [{{filter: first_stage_model., model: {with_vae}}}]"
    assert f"{without} has no VAE (tensors named first_stage_model.*)" in str(caught.value)
    assert entry in str(caught.value)
    for files in ((with_vae, without), (without, with_vae)):
        taken = [{"filter": "first_stage_model.", "model": str(with_vae)}]
        merge(linear(*files, tensors_from=taken), tmp_path / f"out {files[0].stem}", CPU)
        found, source = load_file(tmp_path / f"out {files[0].stem}/model.safetensors"), load_file(with_vae)
        assert found.keys() == source.keys()
        assert all((found[name] == source[name]).all() for name in source if name.startswith("first_stage_model."))
