"""The text part of a vision-language model merges with a text model by `modules`, and transformers loads the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import MergeloomError
from mergeloom.report.explain import explain
from tests.support.merges.resumable import interrupt, run
from tests.support.models.vision import FAMILIES, LAYERS, Family, load, write_model, write_text
from tests.support.outputs import config_of, digests, read_model, same_tensors

CPU = Options(device="cpu", threads=1)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path, Path]:
    """A family with a vision-language model and a text model."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    return family, write_model(family, folder / "whole", 1), write_text(family, folder / "text", 2)


def modules(whole: Path, text: Path, **weights: float) -> dict[str, Any]:
    """The text model merged into the text part; every other part as it is."""
    both = [{"model": str(whole), "parameters": {"weight": 0.25}}, {"model": str(text), "parameters": {"weight": 0.75}}]
    parts = {"text_decoder": both, "vision_tower": both[:1]}
    if any("projector" in name for name in read_model(whole)):
        parts["multi_modal_projector"] = both[:1]
    return {name: {"models": models} for name, models in parts.items()}


def counterparts(whole: Path, text: Path) -> dict[str, str]:
    """The names in the vision-language model of the text model's tensors: those that end in the same way."""
    names = read_model(whole)
    found = {}
    for name in read_model(text):
        rest = name.removeprefix("model.")
        language = [other for other in names if not any(word in other for word in ("visual", "vision", "projector"))]
        (found[name],) = [other for other in language if other == rest or other.endswith(f".{rest}")]
    return found


def means(whole: Path, text: Path) -> dict[str, Tensor]:
    """What the merge should be, in float64."""
    expected = {name: value.double() for name, value in read_model(whole).items()}
    values = read_model(text)
    for name, other in counterparts(whole, text).items():
        expected[other] = 0.25 * expected[other] + 0.75 * values[name].double()
    return expected


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name].double(), value, rtol=1e-6, atol=1e-7) for name, value in expected.items()
    )


def test_a_text_model_is_merged_into_a_vision_language_model(pair: tuple[Family, Path, Path], tmp_path: Path) -> None:
    family, whole, text = pair
    recipe = {"merge_method": "linear", "base_model": str(whole), "modules": modules(whole, text)}
    merge(recipe, tmp_path / "out", CPU)
    assert close(read_model(tmp_path / "out"), means(whole, text))
    assert len(counterparts(whole, text)) == len(read_model(text)) > 9 * LAYERS
    model, problems = load(family.model, tmp_path / "out")
    assert problems == {}
    assert model.config.text_config.num_hidden_layers == LAYERS
    assert config_of(tmp_path / "out")["architectures"] == [family.model]
    assert plan(recipe, CPU).to_dict()["inputs"]["unused"] == []


def test_the_text_part_is_merged_into_the_text_model(pair: tuple[Family, Path, Path], tmp_path: Path) -> None:
    family, whole, text = pair
    models = [
        {"model": str(text), "parameters": {"weight": 0.75}},
        {"model": str(whole), "parameters": {"weight": 0.25}},
    ]
    recipe = {"merge_method": "linear", "base_model": str(text), "modules": {"text_decoder": {"models": models}}}
    merge(recipe, tmp_path / "out", CPU)
    names = counterparts(whole, text)
    merged = means(whole, text)
    assert close(read_model(tmp_path / "out"), {name: merged[other] for name, other in names.items()})
    _, problems = load(family.text, tmp_path / "out")
    assert problems == {}
    planned = plan(recipe, CPU)
    (unused,) = planned.to_dict()["inputs"]["unused"]
    assert unused["model"] == str(whole)
    assert unused["reason"] == "no module of the recipe includes this part of the model"
    assert set(unused["tensors"]) == read_model(whole).keys() - set(names.values())


def test_task_arithmetic_copies_the_parts_that_list_only_the_base(tmp_path: Path) -> None:
    family = FAMILIES["qwen3_vl"]
    model, text = write_model(family, tmp_path / "model", 1), write_text(family, tmp_path / "text", 2)
    both = [{"model": str(model)}, {"model": str(text), "parameters": {"weight": 0.5}}]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(model),
        "modules": {"text_decoder": {"models": both}, "vision_tower": {"models": both[:1]}},
    }
    merge(recipe, tmp_path / "out", CPU)
    expected = {name: value.double() for name, value in read_model(model).items()}
    for name, other in counterparts(model, text).items():
        expected[other] = expected[other] + 0.5 * (read_model(text)[name].double() - expected[other])
    assert close(read_model(tmp_path / "out"), expected)
    graph = plan(recipe, CPU).built.graph
    copied = [each.name for each in graph.outputs if graph.operation(each.node).copies_tensor]
    assert copied == [name for name in graph.outputs.names if "visual" in name]
    assert len(copied) == len(expected) - len(read_model(text))


def test_layers_of_both_are_stacked_by_slices(tmp_path: Path) -> None:
    family = FAMILIES["qwen3_vl"]
    whole, text = write_model(family, tmp_path / "whole", 1), write_text(family, tmp_path / "text", 2)
    slices = [
        {"sources": [{"model": str(whole), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(text), "layer_range": [1, LAYERS]}]},
    ]
    recipe = {
        "merge_method": "passthrough",
        "base_model": str(whole),
        "modules": {"text_decoder": {"slices": slices}, "vision_tower": {"models": [{"model": str(whole)}]}},
    }
    merge(recipe, tmp_path / "out", CPU)
    made, ours, theirs = (read_model(path) for path in (tmp_path / "out", whole, text))
    prefix = next(name for name in ours if ".layers.0." in name and "visual" not in name).partition("layers.0.")[0]
    for name, value in made.items():
        layer = name.removeprefix(f"{prefix}layers.").split(".")[0] if name.startswith(f"{prefix}layers.") else ""
        if layer in ("2", "3"):
            rest = name.removeprefix(f"{prefix}layers.{layer}.")
            assert torch.equal(value, theirs[f"model.layers.{int(layer) - 1}.{rest}"])
        elif name == f"{prefix}norm.weight":  # the last slice
            assert torch.equal(value, theirs["model.norm.weight"])
        else:
            assert torch.equal(value, ours[name])
    model, problems = load(family.model, tmp_path / "out")
    assert problems == {}
    assert model.config.text_config.num_hidden_layers == 4
    source = explain(plan(recipe, CPU), f"{prefix}norm.weight").sources[0]
    assert (source.model, source.name) == (str(text), "model.norm.weight")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_text_model_takes_the_place_of_the_text_part(kind: str, tmp_path: Path) -> None:
    family = FAMILIES[kind]
    model, text = write_model(family, tmp_path / "model", 1), write_text(family, tmp_path / "text", 2)
    parts = {name: {"models": [{"model": str(model)}]} for name in modules(model, text)}
    parts["text_decoder"] = {"slices": [{"sources": [{"model": str(text), "layer_range": [0, LAYERS]}]}]}
    recipe = {"merge_method": "passthrough", "base_model": str(model), "modules": parts}
    assert plan(recipe, CPU).bytes_computed == 0
    merge(recipe, tmp_path / "out", CPU)
    values = read_model(text)
    replaced = {other: values[name] for name, other in counterparts(model, text).items()}
    assert same_tensors(read_model(tmp_path / "out"), read_model(model) | replaced)
    assert load(family.model, tmp_path / "out")[1] == {}


def test_a_stage_makes_the_text_model(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    whole = write_model(family, tmp_path / "whole", 1)
    a, b = (write_text(family, tmp_path / name, seed) for seed, name in ((2, "a"), (3, "b")))
    first = {"name": "mean", "merge_method": "linear", "parameters": {"weight": 0.5}}
    first["models"] = [{"model": str(a)}, {"model": str(b)}]
    last = {"merge_method": "linear", "base_model": str(whole), "modules": modules(whole, Path("mean"))}
    merge([first, last], tmp_path / "out", CPU)
    mean = {name: (value.double() + read_model(b)[name].double()) / 2 for name, value in read_model(a).items()}
    expected = {name: value.double() for name, value in read_model(whole).items()}
    for name, other in counterparts(whole, a).items():
        expected[other] = 0.25 * expected[other] + 0.75 * mean[name]
    assert close(read_model(tmp_path / "out"), expected)


def test_an_untied_head_meets_a_tied_one(tmp_path: Path) -> None:
    """The text model's own head is merged with the embedding that serves as the other model's head."""
    from dataclasses import replace

    family = FAMILIES["qwen2_5_vl"]
    whole = write_model(replace(family, head=False), tmp_path / "whole", 1)
    text = write_text(family, tmp_path / "text", 2)
    recipe = {"merge_method": "linear", "base_model": str(whole), "modules": modules(whole, text)}
    merge(recipe, tmp_path / "out", CPU)
    made, ours, theirs = (read_model(path) for path in (tmp_path / "out", whole, text))
    (embedding,) = [name for name in ours if name.endswith("embed_tokens.weight")]
    (head,) = made.keys() - ours.keys()
    assert torch.allclose(
        made[head].double(), 0.25 * ours[embedding].double() + 0.75 * theirs["lm_head.weight"].double()
    )
    model, problems = load(family.model, tmp_path / "out")
    assert problems == {}
    assert model.config.tie_word_embeddings is False


def test_the_merge_resumes_after_an_interruption(tmp_path: Path) -> None:
    family = FAMILIES["gemma3"]
    whole, text = write_model(family, tmp_path / "whole", 1), write_text(family, tmp_path / "text", 2)
    recipe = {"merge_method": "linear", "base_model": str(whole), "modules": modules(whole, text)}
    merge(recipe, tmp_path / "complete", CPU)
    interrupt(recipe, tmp_path / "again", 2, CPU)
    assert run(recipe, tmp_path / "again", CPU).earlier.bytes_written > 0
    assert digests(tmp_path / "complete", "*.safetensors") == digests(tmp_path / "again", "*.safetensors")


def test_without_modules_the_error_shows_them(tmp_path: Path) -> None:
    family = FAMILIES["qwen3_vl"]
    whole, text = write_model(family, tmp_path / "whole", 1), write_text(family, tmp_path / "text", 2)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(whole)}, {"model": str(text)}],
        "parameters": {"weight": 1},
    }
    with pytest.raises(MergeloomError, match="list both models under `modules`"):
        plan(recipe, CPU)
