"""The explanation of an output tensor, compared with the recipe, the files, and what a merge writes."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mergeloom
from mergeloom import __main__
from mergeloom.errors import UsageError
from mergeloom.report.explain import Explanation, explain, explanation_sections, nearest_names
from mergeloom.report.sections import plain
from tests.conftest import MakeModel
from tests.support import models
from tests.support.outputs import read_model
from tests.support.plans import linear, slerp, stacked, task_vectors

T = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": [1, 0.5]}, {"value": 0.25}]
UP = "model.layers.{}.mlp.up_proj.weight"


def explained(recipe: dict[str, Any], name: str, **options: Any) -> Explanation:
    """Explain an output tensor of a recipe."""
    return explain(mergeloom.plan(recipe, device="cpu", **options), name)


def header_of(file: Path) -> tuple[int, dict[str, Any]]:
    """Return the offset of a safetensors file's data, and its header."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        return 8 + size, json.loads(stream.read(size))


# ------------------------------------------------------------------------------------------------ content


def test_sources_are_where_their_headers_say(llamas: dict[str, Path]) -> None:
    found = explained(linear(llamas["a"], llamas["b"]), UP.format(2))
    assert [source.model for source in found.sources] == [str(llamas["a"]), str(llamas["b"])]
    for source in found.sources:
        start, header = header_of(Path(source.file))
        entry = header[source.name]
        assert source.offset == start + entry["data_offsets"][0]
        assert source.nbytes == entry["data_offsets"][1] - entry["data_offsets"][0] == source.bytes_read
        assert (source.dtype, list(source.shape)) == (entry["dtype"], entry["shape"])


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", UP.format(5), "model.norm.weight"])
def test_the_destination_is_where_the_merge_writes_it(name: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = stacked((llamas["a"], (0, 3)), (llamas["a"], (0, 4)))
    plan = mergeloom.plan(recipe, shard_size=60_000)
    found = explain(plan, name)
    mergeloom.merge(plan, tmp_path / "out")
    assert {place.name for place in found.destinations} >= {name}
    outputs = read_model(tmp_path / "out")
    for place in found.destinations:
        file = tmp_path / "out" / place.file
        start, header = header_of(file)
        assert start + header[place.name]["data_offsets"][0] == place.offset
        assert torch.equal(outputs[place.name], outputs[name])


def test_a_layer_that_is_used_twice_has_two_places(llamas: dict[str, Path]) -> None:
    found = explained(stacked((llamas["a"], (0, 3)), (llamas["a"], (1, 4))), UP.format(4))
    assert [place.name for place in found.destinations] == [UP.format(4), UP.format(2)]
    assert "computed once" in plain(explanation_sections(found))


def test_parameters_are_those_of_the_layer_and_the_filter(llamas: dict[str, Path]) -> None:
    recipe = slerp(llamas["base"], llamas["a"], T)
    for layer, (attention, mlp) in enumerate([(0, 1), (1 / 3, 5 / 6), (2 / 3, 2 / 3), (1, 0.5)]):
        query = explained(recipe, f"model.layers.{layer}.self_attn.q_proj.weight")
        up = explained(recipe, UP.format(layer))
        if 0 < layer < 3:  # at 0 and 1 slerp is a copy of one of the two
            assert query.parameters["t"] == pytest.approx(attention)
            assert query.how == "merge"
        if layer:
            assert up.parameters["t"] == pytest.approx(mlp)
        norm = explained(recipe, f"model.layers.{layer}.input_layernorm.weight")
        assert norm.parameters["t"] == 0.25
    assert explained(recipe, "model.norm.weight").slice is None


def test_each_source_has_its_own_parameters(llamas: dict[str, Path]) -> None:
    recipe = task_vectors("ties", llamas["base"], llamas["a"], llamas["b"])
    recipe["models"][1]["parameters"]["weight"] = [0.2, 0.8]
    found = explained(recipe, UP.format(3))
    base = next(place for place, source in enumerate(found.sources) if source.base)
    weights = [value for place, value in enumerate(found.parameters["weight"]) if place != base]
    assert weights == pytest.approx([0.5, 0.8])
    assert found.passes > 1
    text = plain(explanation_sections(found))
    assert f"{llamas['base']} (base)" in text
    assert "base     base" in text
    assert f"{found.passes}: {found.passes - 1} reductions and the output" in text


def test_each_stage_has_its_own_parameters(llamas: dict[str, Path]) -> None:
    base, a = str(llamas["base"]), str(llamas["a"])
    curve = slerp(llamas["base"], llamas["a"], T, name="curve")
    tuned = [("curve", 0.75, 0.5), (a, 0.5, 0.25)]
    models = [{"model": name, "parameters": {"weight": w, "density": d}} for name, w, d in tuned]
    recipe = [curve, {"merge_method": "ties", "base_model": base, "models": models}]
    found = explain(mergeloom.plan(recipe, device="cpu"), "model.layers.1.input_layernorm.weight")
    text = plain(explanation_sections(found))
    width = max(len(base), len(a))
    first, second = text[text.index("Parameters of slerp") : text.index("\n\nWork")].split("\n\n")
    assert first.startswith("Parameters of slerp, stage curve\n  t ")
    assert first.splitlines()[1].split() == ["t", "0.25"]
    assert second.splitlines()[0] == "Parameters of ties"
    assert second.splitlines()[-4:] == [
        f"  {'model':{width}}  weight  density",
        f"  {'curve':{width}}    0.75      0.5",
        f"  {a:{width}}     0.5     0.25",
        f"  {base:{width}}    base     base",
    ]
    content = json.loads(json.dumps(found.to_dict()))
    assert content["parameters"]["0. slerp"]["t"] == 0.25
    assert content["parameters"]["1. ties"]["weight"][:2] == [0.75, 0.5]
    assert [(stage["stage"], stage["sources"], stage["base"]) for stage in content["stages"]] == [
        ("curve", [base, a], 0),
        (None, ["curve", a, base], 2),
    ]


@pytest.mark.parametrize(("layer", "number", "source", "position"), [(0, 1, 0, 0.0), (2, 1, 2, 1.0), (4, 2, 2, 0.5)])
def test_the_slice_of_a_layer(layer: int, number: int, source: int, position: float, llamas: dict[str, Path]) -> None:
    found = explained(stacked((llamas["a"], (0, 3)), (llamas["b"], (1, 4))), UP.format(layer)).slice
    assert found is not None
    assert (found.number, found.slices, found.layer) == (number, 2, layer)
    assert found.layers == (source,)
    assert found.position == position


def test_steps_chunks_and_tiles_match_the_schedule(make_model: MakeModel) -> None:
    tensors = {"model.layers.0.w.weight": (2048, 2048), "model.layers.1.w.weight": (2048, 2048)}
    base, a, b = (make_model(name, tensors, dtype="F32", fill=None) for name in ("base", "a", "b"))
    recipe = task_vectors("ties", base, a, b)
    least = mergeloom.plan(recipe, device="cpu").schedule.minimum_ram
    plan = mergeloom.plan(recipe, device="cpu", max_ram=least + (8 << 20))
    found = explain(plan, "model.layers.1.w.weight")
    node = plan.built.graph.outputs[1].node
    assert found.steps == tuple(n for n, step in enumerate(plan.schedule.steps, 1) if step.node == node)
    assert len(found.steps) == found.passes
    assert found.chunks > 1
    assert (found.chunks - 1) * found.chunk < 2048 * 2048 <= found.chunks * found.chunk
    assert 0 < found.tile <= found.chunk
    assert any(source.bytes_read > source.nbytes for source in found.sources)
    assert f"{found.steps[0]:,} to {found.steps[-1]:,}" in plain(explanation_sections(found))


def test_a_copied_tensor(llamas: dict[str, Path]) -> None:
    found = explained(stacked((llamas["a"], (0, 4))), UP.format(1))
    assert (found.how, found.tile, found.device) == ("copy", 0, "")
    text = plain(explanation_sections(found))
    assert "a copy of the source's bytes" in text
    assert "tile" not in text


def test_integers_are_copied_where_they_are_equal(make_model: MakeModel) -> None:
    tensors = {"model.layers.0.w.weight": (8, 8), "model.steps.weight": (3,)}
    dtypes = {"model.layers.0.w.weight": "F32", "model.steps.weight": "I64"}
    a, b = (make_model(name, tensors, dtype=dtypes) for name in "ab")
    found = explained(linear(a, b), "model.steps.weight")
    assert found.how == "same"
    assert "the merge fails if the sources differ" in plain(explanation_sections(found))


# ------------------------------------------------------------------------------------------------ no such tensor


def test_names_that_are_near(llamas: dict[str, Path]) -> None:
    recipe = linear(llamas["a"], llamas["b"])
    with pytest.raises(UsageError, match=r"did you mean model\.layers\.2\.mlp\.up_proj\.weight"):
        explained(recipe, "model.layers.2.mlp.upproj.weight")
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.up_proj\.weight or model\.layers\.1\.mlp"):
        explained(recipe, "mlp.up_proj.weight")
    with pytest.raises(UsageError, match="inspect MODEL --tensors"):
        explained(recipe, "zzz")
    with pytest.raises(UsageError, match=r"model\.layers\."):
        explained(recipe, "layers.0")
    with pytest.raises(UsageError, match=r"did you mean model\.layers\.2\.mlp\.up_proj\.weight\?$"):
        explained(recipe, "layers.2.up_proj")
    with pytest.raises(UsageError, match=r"did you mean model\.layers\.2\.self_attn\.q_proj\.weight\?$"):
        explained(recipe, "model.layers.2.self_attn.q_proj.weigth")


def test_a_tensor_that_is_not_in_the_output_has_a_reason(llamas: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="layer 3 is in no slice"):
        explained(stacked((llamas["a"], (0, 2))), UP.format(3))


def test_names_among_a_hundred_thousand_are_found_at_once() -> None:
    experts = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(61) for expert in range(256)]
    names = [f"{expert}.{which}_proj.weight" for expert in experts for which in ("up", "gate", "down")]
    near = nearest_names("model.layers.60.mlp.experts.17.upproj.weight", names * 2)
    assert near[0] == "model.layers.60.mlp.experts.17.up_proj.weight"


# ------------------------------------------------------------------------------------------------ the command


def run(*arguments: object) -> tuple[int, str, str]:
    """Run mergeloom in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = __main__.main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def test_the_command(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(linear(llamas["a"], llamas["b"])))
    code, out, _ = run("plan", recipe, "--explain", UP.format(0))
    assert code == 0
    assert out.startswith(UP.format(0))
    assert "peak RAM" not in out
    code, out, _ = run("plan", recipe, "--explain", UP.format(0), "--json")
    found = json.loads(out)
    assert found["method"] == "linear"
    assert found["parameters"]["weight"] == [0.5, 0.5]
    assert found["sources"][1]["model"] == str(llamas["b"])
    code, out, err = run("plan", recipe, "--explain", "model.layers.0.mlp.up_prj.weight")
    assert (code, out) == (2, "")
    assert f"did you mean {UP.format(0)}" in err


def test_every_output_tensor_can_be_explained(llamas: dict[str, Path]) -> None:
    for recipe in (linear(llamas["a"], llamas["b"]), stacked((llamas["a"], (1, 4)), (llamas["b"], (0, 2)))):
        plan = mergeloom.plan(recipe)
        for output in plan.built.graph.outputs:
            found = explain(plan, output.name)
            assert plain(explanation_sections(found)).startswith(output.name)
            assert (found.slice is not None) == ("layers" in output.name)
            json.dumps(found.to_dict())


def test_the_real_encoder(encoder: Path, tmp_path: Path) -> None:
    other = models.perturbed_encoder(tmp_path / "other", 1)
    found = explained(linear(encoder, other), "encoder.layer.3.attention.self.query.weight")
    assert found.dtype == "F32"
    assert found.slice is not None
    assert found.slice.layers == (3, 3)


def test_two_stacks(make_model: MakeModel) -> None:
    """An encoder and a decoder, sliced separately."""
    shapes = {f"{side}.block.{i}.layer.0.w.weight": (4, 4) for side in ("encoder", "decoder") for i in range(3)}
    config = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3}
    path = make_model("t5", models.Model({"shared.weight": (8, 4), **shapes}, config))
    part = [{"sources": [{"model": str(path), "layer_range": [1, 3]}]}]
    recipe = {
        "merge_method": "passthrough",
        "modules": {"encoder": {"slices": part}, "decoder": {"models": [{"model": str(path)}]}},
    }
    found = explained(recipe, "encoder.block.1.layer.0.w.weight").slice
    assert found is not None
    assert (found.module, found.layers, found.ranges) == ("encoder", (2,), ((str(path), 1, 3),))
    other = explained(recipe, "decoder.block.1.layer.0.w.weight").slice
    assert other is not None
    assert (other.module, other.layers) == ("decoder", (1,))
