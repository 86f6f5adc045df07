"""Every recipe in recipes/ plans at the true shapes of its models, and makes what its comment says.

The models are sparse files with real headers, in a directory where their ids on the Hub are paths: the recipes are
planned as they are. What they make is counted here from the raw YAML and the tables of shapes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeloom.engine.recipe.load import load_recipe
from mergeloom.engine.recipe.types import Recipe, Stage
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.methods import merge_methods
from tests.support import models
from tests.support.models.published import PRESETS, SHAPES, Preset, llama_2_70b
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
FILES = sorted(RECIPES.rglob("*.yml"))
OPTIONS = Options(max_ram=8 << 30, device="cpu", threads=2)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every model stands under its id: sparse files, one set for all models of the same shapes."""
    directory = tmp_path_factory.mktemp("hub")
    for preset, names in PRESETS.items():
        dtype = "F16" if preset is llama_2_70b else "BF16"
        written = directory / "files" / preset.__name__
        models.write_checkpoint(written, preset(), dtype=dtype, fill=None, shard_bytes=5 * 10**9)
        models.write_tokenizer(written)
        for name in names:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).symlink_to(written)
    return directory


@pytest.fixture(autouse=True)
def _in_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)


# ------------------------------------------------------------------------------------------------ what is expected


def documents(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Text and content of each stage of a recipe, by plain YAML."""
    for text in re.split(r"^---$", file.read_text(), flags=re.MULTILINE):
        yield text, yaml.safe_load(text)


def stated(text: str) -> tuple[int, int]:
    """Layers and parameters, as the one line of the comment says."""
    ((layers, parameters),) = re.findall(r"^# Makes (\d+) layers, ([\d,]+) parameters\.$", text, re.MULTILINE)
    return int(layers), int(parameters.replace(",", ""))


@cache
def elements(preset: Preset) -> tuple[dict[int, int], int]:
    """How many elements the tensors of each layer have, and those outside of the layers."""
    layers: dict[int, int] = {}
    outside = 0
    for name, shape in preset().tensors.items():
        if match := re.match(r"model\.layers\.(\d+)\.", name):
            layers[int(match[1])] = layers.get(int(match[1]), 0) + prod(shape)
        else:
            outside += prod(shape)
    return layers, outside


def counted(recipe: Mapping[str, Any]) -> tuple[int, int]:
    """Layers and parameters of what a stage makes: those of the first source of each slice, or of the first model."""
    content = recipe["modules"]["default"] if "modules" in recipe else recipe
    sources = [part["sources"][0] for part in content["slices"]] if "slices" in content else content["models"][:1]
    number, total = 0, elements(SHAPES[sources[0]["model"]])[1]
    for source in sources:
        layers, _ = elements(SHAPES[source["model"]])
        for layer in range(*source.get("layer_range", (0, len(layers)))):
            number, total = number + 1, total + layers[layer]
    return number, total


# ------------------------------------------------------------------------------------------------ planning


def plan_stage(recipe: Recipe, stage: Stage) -> Plan:
    """One stage alone."""
    return plan(replace(recipe, stages=(stage,)), OPTIONS)


WARNS = {
    "Llama-3.1-SuperNova-Lite_TIES_with_Base": ("is listed twice, here and on line 16: it counts once",),
    "Llama-3.2-3B-dare_ties": ("parameters.interpolation_factor", "of the base model"),
}
"""What each warning about a published recipe says; there is none about the others."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_makes_what_its_comment_says(file: Path) -> None:
    warns = WARNS.get(file.stem, ())
    recipe = load_recipe(file, strict=file.stem != "Llama-3.2-3B-dare_ties", methods=merge_methods())
    assert [word in str(warning) for word, warning in zip(warns, recipe.warnings, strict=True)] == [True] * len(warns)
    for text, content in documents(file):
        (stage,) = (stage for stage in recipe.stages if stage.name == content.get("name"))
        output = plan_stage(recipe, stage).to_dict()["output"]
        assert (output["layers"], output["parameters"]) == stated(text) == counted(content)
        dtypes = {"bfloat16": ["BF16"], "float16": ["F16"]}
        assert "dtype" not in content or output["dtypes"] == dtypes[content["dtype"]]


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        ("Meta-Llama-3-120B-Instruct", 140, 121_892_970_496),
        ("BigLlama-3.1-681B-Instruct", 210, 673_620_508_672),
        ("BigLlama-3.1-1T-Instruct", 315, 1_008_329_408_512),
    ],
)
def test_the_published_sizes(name: str, layers: int, parameters: int) -> None:
    output = plan(RECIPES / f"{name}.yml", OPTIONS).to_dict()["output"]
    assert (output["layers"], output["parameters"]) == (layers, parameters)


def test_both_stages_of_the_1t_are_its_two_recipes() -> None:
    names = ("BigLlama-3.1-681B-Instruct", "BigLlama-3.1-1T-Instruct")
    alone = [content for name in names for _, content in documents(RECIPES / f"{name}.yml")]
    first, second = (content for _, content in documents(RECIPES / "BigLlama-3.1-1T-from-405B.yml"))
    assert first.pop("name") == "mlabonne/BigLlama-3.1-681B-Instruct" == second["slices"][0]["sources"][0]["model"]
    assert [first, second] == alone


def test_the_1t_reads_the_405b_once() -> None:
    planned = plan(RECIPES / "BigLlama-3.1-1T-from-405B.yml", OPTIONS).to_dict()
    assert planned["inputs"]["models"] == ["meta-llama/Meta-Llama-3.1-405B-Instruct"]
    assert (planned["output"]["layers"], planned["output"]["parameters"]) == (315, 1_008_329_408_512)
    (unused,) = planned["inputs"]["unused"]
    assert unused["reason"] == "mlabonne/BigLlama-3.1-681B-Instruct: layer 209 is in no slice"
    assert len(unused["tensors"]) == 9
    assert all(name.startswith("model.layers.125.") for name in unused["tensors"])
    assert planned["bytes_read"] == 2 * (models.llama_3_1_405b().parameters - elements(models.llama_3_1_405b)[0][125])
    assert planned["bytes_written"] == 2 * 1_008_329_408_512


def test_the_1t_leaves_a_layer_of_the_681b_unused() -> None:
    (unused,) = plan(RECIPES / "BigLlama-3.1-1T-Instruct.yml", OPTIONS).to_dict()["inputs"]["unused"]
    assert len(unused["tensors"]) == 9
    assert all(name.startswith("model.layers.209.") for name in unused["tensors"])


# ------------------------------------------------------------------------------------------------ the collection


def test_every_method_has_an_example() -> None:
    code = "from mergeloom.methods import merge_methods; print(*merge_methods())"  # here, tests may have added some
    built_in = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    examples = {file.stem: file for file in FILES if file.parent.name == "methods"}
    assert examples.keys() == set(built_in)
    for name, file in examples.items():
        assert yaml.safe_load(file.read_text())["merge_method"] == name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_says_where_it_was_published(file: Path) -> None:
    assert re.search(r"^# (Published: |Not published: )\S", file.read_text(), re.MULTILINE)


def test_the_readme_lists_every_recipe() -> None:
    linked = set(re.findall(r"\]\(([^)]+\.(?:yml|py))\)", (RECIPES / "README.md").read_text()))
    assert linked == {str(file.relative_to(RECIPES)) for file in [*FILES, *RECIPES.glob("*.py")]}


def test_the_readme_has_the_numbers_of_the_recipes() -> None:
    rows = re.findall(r"\]\((\S+\.yml)\) \|[^|]*\| (\d+) \| ([\d,]+) \|", (RECIPES / "README.md").read_text())
    assert len(rows) == len(list(RECIPES.glob("*.yml")))
    for name, layers, parameters in rows:
        *_, (text, _) = documents(RECIPES / name)
        assert stated(text) == (int(layers), int(parameters.replace(",", "")))


def test_no_model_is_there_that_no_recipe_names() -> None:
    text = "\n".join(file.read_text() for file in FILES)
    assert {name for name in SHAPES if name not in text} == set()
