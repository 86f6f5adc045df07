"""The layer map: which input layers become which output layers, compared with the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

import mergeloom
from mergeloom.report.html.layer_map import LayerRun, curves, stack_maps
from tests.conftest import MakeModel
from tests.support import models
from tests.support.plans import linear, slerp, stacked, task_vectors, windows


def test_a_self_merge_of_windows(make_model: MakeModel) -> None:
    #  0 1 2 3 4 5 6 7
    #  └─────┘
    #      └─────┘             three windows of four layers, two apart
    #          └─────┘
    model = make_model("a", models.tiny_llama(layers=8), fill=None)
    (stack,), outside = stack_maps(mergeloom.plan(windows(model, 8, 4, 2)))
    assert stack.layers == 12
    assert [source.count for source in stack.inputs] == [8]
    assert stack.runs == (LayerRun(0, 0, 0, 4), LayerRun(0, 2, 4, 4), LayerRun(0, 4, 8, 4))
    assert {name for each in outside for name in each.tensors} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_slices_of_two_models(llamas: dict[str, Path]) -> None:
    recipe = stacked((llamas["a"], (0, 3)), (llamas["b"], (1, 4)), (llamas["a"], (3, 4)))
    (stack,), _ = stack_maps(mergeloom.plan(recipe))
    assert [source.name for source in stack.inputs] == [str(llamas["a"]), str(llamas["b"])]
    assert stack.runs == (LayerRun(0, 0, 0, 3), LayerRun(1, 1, 3, 3), LayerRun(0, 3, 6, 1))


def test_layers_that_lie_on_each_other(llamas: dict[str, Path]) -> None:
    recipe = task_vectors("ties", llamas["base"], llamas["a"], llamas["b"])
    (stack,), outside = stack_maps(mergeloom.plan(recipe))
    assert {run.input for run in stack.runs} == {0, 1, 2}
    assert all((run.first, run.out, run.count) == (0, 0, 4) for run in stack.runs)
    assert set(outside[0].models) == {str(llamas[name]) for name in ("base", "a", "b")}


def test_adjacent_slices_are_one_run(llamas: dict[str, Path]) -> None:
    (stack,), _ = stack_maps(mergeloom.plan(stacked((llamas["a"], (0, 2)), (llamas["a"], (2, 4)))))
    assert stack.runs == (LayerRun(0, 0, 0, 4),)


def test_a_layer_made_of_two_of_one_model(llamas: dict[str, Path]) -> None:
    sources = [{"model": str(llamas["a"]), "layer_range": r, "parameters": {"weight": 1}} for r in ([0, 2], [2, 4])]
    (stack,), _ = stack_maps(mergeloom.plan({"merge_method": "linear", "slices": [{"sources": sources}]}))
    assert stack.layers == 2
    assert stack.runs == (LayerRun(0, 0, 0, 2), LayerRun(0, 2, 0, 2))


def test_two_stacks(make_model: MakeModel) -> None:
    shapes = {f"{side}.block.{i}.layer.0.w.weight": (4, 4) for side in ("encoder", "decoder") for i in range(3)}
    config = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3}
    path = make_model("t5", models.Model({"shared.weight": (8, 4), **shapes}, config))
    found, _ = stack_maps(mergeloom.plan({"merge_method": "passthrough", "models": [{"model": str(path)}]}))
    assert [stack.prefix for stack in found] == ["encoder.block", "decoder.block"]


def test_parameters_over_the_layers(llamas: dict[str, Path]) -> None:
    t = [{"filter": "self_attn", "value": [0.2, 0.8]}, {"filter": "mlp", "value": [0.8, 0.2]}, {"value": 0.5}]
    found = {
        curve.tensors[0].split(".")[0]: curve for curve in curves(mergeloom.plan(slerp(llamas["base"], llamas["a"], t)))
    }
    assert [round(value or 0, 6) for value in found["self_attn"].values] == [0.2, 0.4, 0.6, 0.8]
    assert [round(value or 0, 6) for value in found["mlp"].values] == [0.8, 0.6, 0.4, 0.2]
    assert len(found["self_attn"].tensors) == 4
    assert set(found["input_layernorm"].values) == {0.5}
    assert all((curve.parameter, curve.model) == ("t", "") for curve in found.values())


def test_each_model_has_its_own_curve(llamas: dict[str, Path]) -> None:
    recipe = linear(llamas["a"], llamas["b"])
    recipe["models"][1]["parameters"]["weight"] = [0.1, 0.7]
    (curve,) = curves(mergeloom.plan(recipe))
    assert (curve.parameter, curve.model) == ("weight", str(llamas["b"]))
    assert curve.values[0] == 0.1
    assert curves(mergeloom.plan(linear(llamas["a"], llamas["b"]))) == []


def test_curves_of_a_stage_name_it(llamas: dict[str, Path]) -> None:
    t = [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.5}]
    curve = slerp(llamas["base"], llamas["a"], t, name="x")
    last = task_vectors("ties", llamas["base"], Path("x"), llamas["b"])
    first, second = sorted(curves(mergeloom.plan([curve, last])), key=lambda each: each.values[0] or 0)
    assert (first.parameter, second.parameter) == ("t in x", "t in x")
    assert first.values == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert set(second.values) == {0.5}
