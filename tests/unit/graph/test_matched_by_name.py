"""Models whose layers can't be identified: complete models are merged by tensor names, and other recipes rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from mergeloom.report.plan import plan_text
from mergeloom.report.result import result_text
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.outputs import config_of, read_model
from tests.support.plans import without_location
from tests.unit.graph.building import Shape, build, checkpoint, complete, decoder

CPU = Options(device="cpu", threads=1)
UNET: dict[str, Shape] = {
    "conv_in.weight": (4, 4, 3, 3),
    **{f"{side}_blocks.{n}.resnets.0.conv1.weight": (4, 4) for side in ("down", "up") for n in range(4)},
    "mid_block.attentions.0.proj_in.weight": (4, 4),
    "conv_out.weight": (4, 4),
}
XLM: dict[str, Shape] = {
    f"transformer.{part}.{n}.weight": (4, 4) for part in ("attentions", "ffns", "layer_norm1") for n in range(4)
}
ALBERT: dict[str, Shape] = {
    "albert.embeddings.word_embeddings.weight": (8, 4),
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": (4, 4),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {"_class_name": "UNet2DConditionModel", "layers_per_block": 2},
    "xlm": {"n_layers": 4, "torch_dtype": "float32"},
    "albert": {"num_hidden_layers": 12, "num_hidden_groups": 1, "torch_dtype": "float32"},
}
SHAPES = {"unet": UNET, "xlm": XLM, "albert": ALBERT}


def write(directory: Path, kind: str, **config: Any) -> dict[str, Any]:
    """Write two models, and return a recipe for their mean in bfloat16."""
    for number, name in enumerate("ab"):
        write_checkpoint(directory / name, SHAPES[kind], fill=number, dtype="F32", config=CONFIGS[kind] | config)
    models = [{"model": str(directory / name)} for name in "ab"]
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 1}, "dtype": "bfloat16"}


@pytest.mark.parametrize("kind", SHAPES)
def test_complete_models_are_merged(kind: str, tmp_path: Path) -> None:
    recipe = write(tmp_path, kind)
    planned = plan(recipe, CPU)
    assert planned.built.matched_by_name
    assert planned.findings == plan(recipe, Options(device="cpu", strict=True)).findings
    assert not [finding for finding in planned.findings if "layer" in str(finding)]
    assert "none identified: tensors are matched by their complete names" in plan_text(planned)
    assert planned.to_dict()["inputs"]["layers_identified"] is False
    result = merge(planned, tmp_path / "out")
    assert "none identified" in result_text(result)
    first, second, out = (read_model(tmp_path / name) for name in ("a", "b", "out"))
    assert set(out) == set(SHAPES[kind])
    for name, tensor in out.items():
        assert tensor.equal((first[name] * 0.5 + second[name] * 0.5).bfloat16())
    wanted = {"torch_dtype": "bfloat16"} if "torch_dtype" in CONFIGS[kind] else {}
    assert config_of(tmp_path / "out") == CONFIGS[kind] | wanted


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parameters": {"weight": [0, 1]}}, "the gradient of `weight`"),
        ({"parameters": {"weight": [{"filter": "conv", "value": [0, 1]}, {"value": 1}]}}, "the gradient of `weight`"),
        ({"non_layer": {"norm": "a"}}, "`non_layer`"),
        ({"models": None, "modules": {"encoder": {"models": [{"model": "a"}]}}}, "`modules`"),
        ({"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}, "`slices`"),
    ],
)
def test_what_needs_layers_is_rejected(change: dict[str, Any], reason: str) -> None:
    recipe = {key: value for key, value in (complete("linear", "a", "b") | change).items() if value is not None}
    models = {name: checkpoint(name, UNET, config=CONFIGS["unet"]) for name in "ab"}
    with pytest.raises(CheckpointError) as caught:
        build(recipe, models)
    assert without_location(caught.value).startswith(
        "a: config.json states no number of layers, but the tensor names don't show"
    )
    assert str(caught.value).endswith(f"They are needed for {reason}.")
    recipe = complete("linear", "a", "b") | {"parameters": {"weight": [1, 1]}}
    assert build(recipe, models).names == list(UNET)


def test_two_lists_of_equal_length() -> None:
    shapes = {name: shape for name, shape in decoder().items() if ".layers." in name}
    shapes |= {name.replace("layers", "others.layers"): shape for name, shape in shapes.items()}
    models = {"a": checkpoint("a", shapes), "b": checkpoint("b", shapes)}
    built = build(complete("linear", "a", "b"), models)
    assert built.found.matched_by_name
    assert sorted(built.names) == sorted(shapes)
    assert not build(complete("linear", "c"), {"c": checkpoint("c", decoder())}).found.matched_by_name


@pytest.mark.parametrize("config", [None, {"num_hidden_layers": 4}])
def test_missing_layers_are_still_rejected(config: dict[str, Any] | None) -> None:
    lost = "model.layers.1." if config is None else "model.layers.3."
    experts = {f"model.layers.0.mlp.experts.{number}.weight": (4, 4) for number in range(4)}
    shapes = {name: shape for name, shape in (decoder() | experts).items() if not name.startswith(lost)}
    models = {name: checkpoint(name, shapes, config=config) for name in "ab"}
    with pytest.raises(CheckpointError, match="Either tensors are missing"):
        build(complete("linear", "a", "b"), models)


def test_identified_layers_are_reported_as_before(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "a", tiny_llama(), fill=0)
    planned = plan(complete("linear", str(directory)), CPU)
    assert planned.to_dict()["inputs"]["layers_identified"] is True
    assert "none identified" not in plan_text(planned)
