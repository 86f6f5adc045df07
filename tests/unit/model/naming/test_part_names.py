"""Parts of models that have other prefixes, matched by their stacks of layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, RecipeError
from tests.support.models import Shape, tiny_llama, write_checkpoint
from tests.support.plans import without_location
from tests.unit.model.refusing import CPU

LLAMA = tiny_llama(layers=2)
TOWER: dict[str, Shape] = {
    **{f"blocks.{number}.attn.qkv.weight": (4, 4) for number in range(3)},
    "patch_embed.proj.weight": (4, 4),
}
CONFIG = {"model_type": "llava", "text_config": LLAMA.config, "vision_config": {"depth": 3}}


def names(text: str, head: str, tower: str = "", projector: str = "") -> dict[str, Shape]:
    """The shapes of a model with these prefixes: of the text part, its head, the vision tower and the projector."""
    shapes = {name.replace("model.", text, 1): shape for name, shape in LLAMA.tensors.items() if "lm_head" not in name}
    shapes |= {f"{head}weight": LLAMA.tensors["lm_head.weight"]} if head else {}
    shapes |= {f"{tower}{name}": shape for name, shape in TOWER.items()} if tower else {}
    return shapes | ({f"{projector}linear.weight": (4, 4)} if projector else {})


def write(directory: Path, shapes: Mapping[str, Shape]) -> Path:
    multimodal = any("visual" in name for name in shapes)
    return write_checkpoint(directory, shapes, dtype="F32", config=CONFIG if multimodal else LLAMA.config)


def recipe(donor: Path, other: Path, *parts: str, alone: tuple[str, ...] = (), **entry: Any) -> dict[str, Any]:
    both = [{"model": str(donor)}, {"model": str(other), **entry}]
    modules = {part: {"models": both} for part in parts} | {part: {"models": both[:1]} for part in alone}
    return {"merge_method": "linear", "base_model": str(donor), "modules": modules, "parameters": {"weight": 0.5}}


def sources(recipe: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the sources of each output tensor."""
    graph = plan(recipe, CPU).built.graph
    return {
        output.name: [graph.read_names[read] for read in graph.node_sources[output.node]] for output in graph.outputs
    }


NEW = names("model.language_model.", "lm_head.", "model.visual.")
OLD = names("model.", "lm_head.", "visual.")
OLDEST = names("language_model.model.", "language_model.lm_head.", "visual.")
TEXT = names("model.", "lm_head.")


@pytest.mark.parametrize(("donor", "other"), [(NEW, OLD), (OLD, NEW), (OLDEST, NEW), (NEW, OLDEST), (OLD, OLDEST)])
def test_two_namings_of_one_architecture(donor: dict[str, Shape], other: dict[str, Shape], tmp_path: Path) -> None:
    pair = write(tmp_path / "a", donor), write(tmp_path / "b", other)
    found = sources(recipe(*pair, "text_decoder", "vision_tower"))
    assert found == {name: [name, counterpart] for name, counterpart in zip(donor, other, strict=True)}


@pytest.mark.parametrize("donor", [NEW, OLD, OLDEST])
def test_text_models_and_their_place_in_others(donor: dict[str, Shape], tmp_path: Path) -> None:
    pair = write(tmp_path / "a", donor), write(tmp_path / "b", TEXT)
    found = sources(recipe(*pair, "text_decoder", alone=("vision_tower",)))
    assert found == {
        name: [name] if "visual" in name else [name, counterpart]
        for name, counterpart in zip(donor, [*TEXT, *TOWER], strict=True)
    }
    planned = plan(recipe(pair[1], pair[0], "text_decoder"), CPU)
    assert sources(recipe(pair[1], pair[0], "text_decoder")) == {
        name: [name, counterpart] for name, counterpart in zip(TEXT, donor, strict=False)
    }
    assert [(each.cause, set(each.tensors)) for each in planned.built.unused] == [
        ("no module of the recipe includes this part of the model", {name for name in donor if "visual" in name})
    ]


def test_the_projector_of_the_other_model_is_not_used_for_a_text_model(tmp_path: Path) -> None:
    tensors = names("language_model.model.", "language_model.lm_head.", "visual.", "multi_modal_projector.")
    pair = write(tmp_path / "a", TEXT), write(tmp_path / "b", tensors)
    (unused,) = plan(recipe(*pair, "text_decoder"), CPU).built.unused
    assert "multi_modal_projector.linear.weight" in unused.tensors


def test_a_projector_without_a_module_of_its_own_is_missing_in_the_text_model(tmp_path: Path) -> None:
    tensors = names("language_model.model.", "language_model.lm_head.", "visual.", "multi_modal_projector.")
    pair = write(tmp_path / "a", tensors), write(tmp_path / "b", TEXT)
    with pytest.raises(CheckpointError) as caught:
        plan(recipe(*pair, "text_decoder", alone=("vision_tower",)), CPU)
    message = str(caught.value)
    assert f"tensor multi_modal_projector.linear.weight is in {pair[0]} but not in {pair[1]}" in message
    assert message.endswith(f". List only {pair[0]} under a module `multi_modal_projector`")
    found = sources(recipe(*pair, "text_decoder", alone=("vision_tower", "multi_modal_projector")))
    assert found["multi_modal_projector.linear.weight"] == ["multi_modal_projector.linear.weight"]


def test_non_layer_names_the_text_model_for_tensors_with_other_names(tmp_path: Path) -> None:
    pair = write(tmp_path / "a", OLDEST), write(tmp_path / "b", TEXT)
    chosen = {"norm": str(pair[1]), "head": str(pair[1])}
    found = sources(recipe(*pair, "text_decoder", alone=("vision_tower",)) | {"non_layer": chosen})
    assert found["language_model.lm_head.weight"] == ["lm_head.weight"]
    assert found["language_model.model.norm.weight"] == ["model.norm.weight"]
    assert found["language_model.model.embed_tokens.weight"] == [
        "language_model.model.embed_tokens.weight",
        "model.embed_tokens.weight",
    ]


def test_projectors_with_other_prefixes_need_a_rename(tmp_path: Path) -> None:
    new = names("model.language_model.", "lm_head.", "model.visual.", "model.projector.")
    old = names("language_model.model.", "language_model.lm_head.", "visual.", "projector.")
    pair = write(tmp_path / "a", new), write(tmp_path / "b", old)
    parts = "text_decoder", "vision_tower", "multi_modal_projector"
    with pytest.raises(CheckpointError) as caught:
        plan(recipe(*pair, *parts), CPU)
    assert without_location(caught.value).startswith(
        f"tensor model.projector.linear.weight is in {pair[0]} but not in {pair[1]}"
    )
    advice = str(caught.value).partition(f"if so, write in the recipe's entry of {pair[1]}:")[2]
    assert yaml.safe_load(advice) == {"rename": [["projector.", "model.projector."]]}
    found = sources(recipe(*pair, *parts, **yaml.safe_load(advice)))
    assert found["model.projector.linear.weight"] == ["model.projector.linear.weight"] * 2


def test_a_head_without_a_counterpart_needs_a_name(tmp_path: Path) -> None:
    tied = names("model.language_model.", "", "model.visual.")
    pair = write(tmp_path / "a", tied), write(tmp_path / "b", OLDEST)
    with pytest.raises(RecipeError) as caught:
        plan(recipe(*pair, "text_decoder", alone=("vision_tower",)), CPU)
    assert (
        f"modules.text_decoder: {pair[0]} has no head, so it is unclear what language_model.lm_head.weight of "
        f"{pair[1]} would be: name them as in {pair[0]} with `rename` in the entry of {pair[1]}" in str(caught.value)
    )
    named = recipe(*pair, "text_decoder", alone=("vision_tower",), rename=[["language_model.lm_head.", "lm_head."]])
    assert sources(named)["lm_head.weight"] == ["model.language_model.embed_tokens.weight", "lm_head.weight"]


def test_two_tensors_of_one_name_are_an_error(tmp_path: Path) -> None:
    pair = write(tmp_path / "a", TEXT), write(tmp_path / "b", {**NEW, "model.norm.weight": (32,)})
    with pytest.raises(
        RecipeError, match=r"both model\.\S*norm\.weight and model\.\S*norm\.weight of .*b would be model"
    ):
        plan(recipe(*pair, "text_decoder"), CPU)


def test_a_mismatch_inside_the_part_is_not_blamed_on_the_prefix(tmp_path: Path) -> None:
    missing = {name: shape for name, shape in TEXT.items() if name != "model.layers.1.mlp.up_proj.weight"}
    pair = write(tmp_path / "a", NEW), write(tmp_path / "b", missing)
    with pytest.raises(CheckpointError) as caught:
        plan(recipe(*pair, "text_decoder", alone=("vision_tower",)), CPU)
    assert without_location(caught.value).startswith(
        f"tensor model.language_model.layers.1.mlp.up_proj.weight is in {pair[0]} but not in {pair[1]}: "
    )
