"""Layers, filters, accounting, checks and reports see the values of a model, not the parts that they are stored in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import mergeloom
from mergeloom.engine.files.config import mixed_dtypes
from mergeloom.engine.files.vocabulary_checks import models_with_merged_embeddings
from mergeloom.engine.model.formats import registry
from mergeloom.engine.model.logical import LogicalTensor, Part
from mergeloom.engine.model.open import open_named
from mergeloom.engine.model.self_merge import stack_recipe
from mergeloom.engine.run.plan import Plan
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import Verification
from mergeloom.errors import RecipeError
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.report.explain import explain, explanation_sections
from mergeloom.report.html.layer_map import stack_maps
from mergeloom.report.inspect import inspection_sections
from mergeloom.report.plan import inputs_section
from mergeloom.report.sections import plain
from tests.support.models import toy_format, write_checkpoint
from tests.support.outputs import read_model

Pair = tuple[Path, Path]
UP, DOWN, QUERY = (f"model.layers.0.{name}.weight" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))
PARTS = re.compile(r"\.(scales|rows|qkv|turned|a|b)\b")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMATS, "toy", toy_format.find)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    root = tmp_path_factory.mktemp("toys")
    return [toy_format.write_pair(root, seed) for seed in (1, 2)]


def recipe(method: str, *models: Path, dtype: str | None = "float32", **keys: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"merge_method": method, "models": [{"model": str(model)} for model in models], **keys}
    return made | ({"dtype": dtype} if dtype else {})


def stored_sizes(model: Path) -> dict[str, int]:
    """The size of each stored tensor in bytes."""
    with safe_open(model / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118  safe_open is not a dict


def warnings_of(planned: Plan) -> list[str]:
    return list(map(str, planned.warnings))


# ------------------------------------------------------------------------------------------------ inspect, stack


def test_inspect_lists_values_and_the_bytes_that_they_are_stored_in(pairs: list[Pair]) -> None:
    toy, twin = (mergeloom.inspect(model) for model in pairs[0])
    found, expected, sizes = toy.to_dict(tensors=True), twin.to_dict(tensors=True), stored_sizes(pairs[0][0])
    shapes, others = ({each["name"]: each["shape"] for each in made["tensor_list"]} for made in (found, expected))
    assert shapes == others
    assert (found["parameters"], found["tensors"]) == (expected["parameters"], expected["tensors"])
    assert found["outside"] == expected["outside"]
    assert found["bytes"] == sum(sizes.values())
    (stack,), (plain_stack,) = found["stacks"], expected["stacks"]
    assert stack["tensors"] == plain_stack["tensors"]
    assert stack["bytes"] == sum(size for name, size in sizes.items() if ".layers." in name)
    assert {name: group["parameters"] for name, group in found["dtypes"].items()} == {
        "F32": expected["parameters"] - 4 * 20 * 12,
        "F32 (toy scaled)": 2 * 20 * 12,
        "F32 (toy adapted)": 2 * 20 * 12,
    }
    scaled = [size for name, size in sizes.items() if ".up_proj" in name]
    assert found["dtypes"]["F32 (toy scaled)"]["bytes"] == sum(scaled)
    assert sum(group["bytes"] for group in found["dtypes"].values()) == found["bytes"]
    text = plain(inspection_sections(toy, tensors=True))
    assert re.search(rf"{UP} +F32 +\[20, 12\] +564B  toy scaled of 2 tensors", text)
    assert not PARTS.search(text)


def test_a_stack_has_the_layers_and_parameters_of_the_values(pairs: list[Pair]) -> None:
    found, expected = (stack_recipe(*open_named(str(model)), window=1, step=1)[1] for model in pairs[0])
    assert (found.layers, found.parameters) == (expected.layers, expected.parameters)


# ------------------------------------------------------------------------------------------------ filters, accounting


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_filter_for_a_part_matches_no_name(pairs: list[Pair], dtype: str | None) -> None:
    filters = [{"filter": "scales", "value": 1}, {"filter": "layers.2.mlp.up_proj.weight", "value": 1}, {"value": 1}]
    sources = [{"model": str(pairs[0][0]), "layer_range": part} for part in ([0, 2], [1, 2])]
    made = {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources]}
    made |= {"parameters": {"scale": filters}} | ({"dtype": dtype} if dtype else {})
    (found,) = [text for text in warnings_of(plan(made)) if "filter" in text]
    assert "filter 'scales' matches no tensor name" in found


def test_unused_tensors_are_values(pairs: list[Pair]) -> None:
    def unused(model: Path) -> list[dict[str, Any]]:
        slices = [{"sources": [{"model": str(model), "layer_range": [0, 1]}]}]
        found = plan({"merge_method": "passthrough", "slices": slices, "dtype": "float32"}).to_dict()["inputs"]
        assert found["tensors"] == 17
        return [sorted(each["tensors"]) for each in found["unused"]]

    assert unused(pairs[0][0]) == unused(pairs[0][1])


def test_the_inputs_of_a_plan_are_values_in_their_formats(pairs: list[Pair]) -> None:
    planned = plan(recipe("linear", *pairs[0], parameters={"weight": 0.5}))
    toy, twin = inputs_section(planned, [0] * len(planned.built.graph.reads)).grid.rows  # type: ignore[union-attr]
    assert (toy[2], toy[-1]) == ("17", "F32, F32 (toy adapted), F32 (toy scaled)")
    assert (twin[2], twin[-1]) == ("17", "F32")


# ------------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_head_is_that_of_the_model_whose_embeddings_are_chosen(pairs: list[Pair], order: tuple[int, int]) -> None:
    models = [pairs[number][0] for number in order]
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 2]} for model in models]}]
    made = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 0.5}, "dtype": "float32"}
    for chosen in models:
        same = {"embeddings": str(chosen), "head": str(chosen)}
        assert plan(made | {"non_layer": same}).built.graph.outputs
    with pytest.raises(RecipeError, match="none of the models has a separate head"):
        plan(made | {"non_layer": {"embeddings": str(models[0]), "head": str(models[1])}})


def test_embeddings_are_found_by_their_names_and_rows(pairs: list[Pair]) -> None:
    planned = plan(recipe("linear", *(toy for toy, _ in pairs), parameters={"weight": 0.5}))
    assert models_with_merged_embeddings(planned.built) == {0, 1}
    config = planned.files.config or {}
    assert config["vocab_size"] == toy_format.VOCABULARY


def test_a_mixture_of_dtypes_is_one_of_values(
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_dtypes, "_SHARE", 0.01)  # few of the toy's bytes are codes
    values = {name: tensor.bfloat16() for name, tensor in read_model(pairs[0][1]).items()}
    narrow = write_checkpoint(tmp_path / "narrow", values, config=toy_format.CONFIG)
    sources = [{"model": str(pairs[0][0]), "layer_range": [0, 1]}, {"model": str(narrow), "layer_range": [1, 2]}]
    made = {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources]}
    (found,) = [text for text in warnings_of(plan(made)) if "the output has tensors in" in text]
    assert f"F32 (from {pairs[0][0]}) and BF16 (from {narrow})" in found


# ------------------------------------------------------------------------------------------------ explain, HTML, verify


@pytest.mark.parametrize("name", [UP, DOWN, QUERY, "model.embed_tokens.weight", "model.layers.0.norm.weight"])
def test_explain_names_values_and_their_parts(pairs: list[Pair], name: str) -> None:
    made = {"base_model": str(pairs[0][0]), "parameters": {"weight": 0.5, "density": 0.5}}
    toys = recipe("ties", *(toy for toy, _ in pairs), **made)
    twins = recipe("ties", *(twin for _, twin in pairs), **(made | {"base_model": str(pairs[0][1])}))
    found, expected = explain(plan(toys), name), explain(plan(twins), name)
    assert (found.method, found.parameters, found.shape) == (expected.method, expected.parameters, expected.shape)
    assert [(each.name, each.base, each.shape) for each in found.sources] == [
        (each.name, each.base, each.shape) for each in expected.sources
    ]
    parts = {
        UP: [UP, f"{UP}.scales"],
        DOWN: [DOWN, f"{DOWN}.b", f"{DOWN}.a"],
        QUERY: ["model.layers.0.self_attn.qkv"],
        "model.embed_tokens.weight": ["model.embed_tokens.weight.rows"],
    }.get(name, [])
    assert [[part.name for part in each.parts] for each in found.sources] == [parts, parts]
    sizes = stored_sizes(pairs[0][0])
    assert [part.nbytes for part in found.sources[0].parts] == [sizes[part] for part in parts]
    text = plain(explanation_sections(found))
    assert "ties of 2 tensors" in text
    assert "(base)" in text
    for part in parts:
        assert f"from {part}" in text


def test_the_map_of_layers_is_that_of_the_values(pairs: list[Pair]) -> None:
    maps = []
    for place in (0, 1):
        found, others = stack_maps(plan(recipe("linear", *(pair[place] for pair in pairs), parameters={"weight": 0.5})))
        maps.append(
            repr([(each.prefix, len(each.runs)) for each in found]) + repr([sorted(each.tensors) for each in others])
        )
    assert maps[0] == maps[1]


def test_sources_are_verified_as_they_are_stored(pairs: list[Pair], tmp_path: Path) -> None:
    models = [toy for toy, _ in pairs]
    mergeloom.merge(recipe("linear", *models, parameters={"weight": 0.5}), tmp_path / "out", device="cpu")
    assert not PARTS.search((tmp_path / "out" / "README.md").read_text())
    verdict = Verification(tmp_path / "out", sources=True).run()
    assert (verdict.tensors, verdict.damaged, verdict.changed_sources) == (17, (), ())


def test_a_buffer_that_is_stored_under_another_name_is_copied(
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, stored = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.frequencies"

    def find(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
        if stored in checkpoint.tensors:
            part = Part(stored, checkpoint.tensors[stored])
            yield LogicalTensor(buffer, part.ref.shape, part.ref.dtype, (part,))

    monkeypatch.setitem(registry.FORMATS, "buffers", find)
    models = []
    for name, (_, twin), value in (("a", pairs[0], 1.0), ("b", pairs[1], 2.0)):
        tensors = read_model(twin) | {stored if name == "a" else buffer: torch.full((6,), value)}
        models.append(write_checkpoint(tmp_path / name, tensors, config=toy_format.CONFIG))
    mergeloom.merge(recipe("linear", *models, parameters={"weight": 0.5}), tmp_path / "out", device="cpu")
    merged = read_model(tmp_path / "out")
    assert torch.equal(merged[buffer], torch.full((6,), 1.0))
    assert stored not in merged
