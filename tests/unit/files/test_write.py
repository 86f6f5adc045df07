"""Non-weight files: config.json made true, companions taken over, a card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import mergeloom
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.models import tiny_llama, write_checkpoint, write_tokenizer
from tests.support.outputs import config_of, digests

CPU = Options(device="cpu", threads=1)
WRITTEN = {"README.md", "mergekit_config.yml", "mergeloom.json"}
"""Files that describe the merge."""


def passed(model: Path, **more: object) -> dict[str, object]:
    """A recipe that passes a model through."""
    return {"merge_method": "passthrough", "models": [{"model": str(model)}], **more}


def test_what_belongs_to_a_model_goes_with_it(tmp_path: Path) -> None:
    model = write_tokenizer(write_checkpoint(tmp_path / "model", tiny_llama(tied=True)))
    (model / "LICENSE").write_text("Do what you like.\n")
    (model / "notes.md").write_text("nobody's business")
    (model / "training_args.bin").write_bytes(b"pickle")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    merge(passed(model), tmp_path / "out", CPU)
    found, expected = digests(tmp_path / "out"), digests(model)
    assert found.keys() == expected.keys() - {"notes.md", "training_args.bin"} | WRITTEN
    changed = {"model.safetensors", "config.json"}  # another header, another order of keys
    assert {name: found[name] for name in expected.keys() & found.keys() - changed} == {
        name: expected[name] for name in expected.keys() & found.keys() - changed
    }
    assert config_of(tmp_path / "out") == config_of(model)


def test_a_model_given_as_a_file_has_its_companions_beside_it(tmp_path: Path) -> None:
    model = write_tokenizer(write_checkpoint(tmp_path / "model", tiny_llama()))
    merge(passed(model / "model.safetensors"), tmp_path / "file", CPU)
    merge(passed(model), tmp_path / "directory", CPU)
    found, expected = digests(tmp_path / "file"), digests(tmp_path / "directory")
    assert {name for name in expected if found.get(name) != expected[name]} == {
        *WRITTEN,  # which name the model
    }


def test_a_base_model_gives_config_and_tokenizer(tmp_path: Path) -> None:
    a = write_tokenizer(write_checkpoint(tmp_path / "a", tiny_llama(layers=4)))
    b = write_tokenizer(write_checkpoint(tmp_path / "b", tiny_llama(layers=3)), words=40)
    slices = [{"sources": [{"model": str(a), "layer_range": [0, 4]}]}] * 2
    merge({"merge_method": "passthrough", "base_model": str(b), "slices": slices}, tmp_path / "out", CPU)
    assert digests(tmp_path / "out", "tokenizer.json") == digests(b, "tokenizer.json") != digests(a, "tokenizer.json")
    assert config_of(tmp_path / "out") == config_of(b) | {"num_hidden_layers": 8}


def test_lists_of_layers_follow_the_slices(tmp_path: Path) -> None:
    base = tiny_llama(layers=4)
    kinds = ["full_attention", "sliding_attention", "chunked_attention", "linear_attention"]
    model = write_checkpoint(tmp_path / "model", base, config=base.config | {"layer_types": kinds})
    slices = [{"sources": [{"model": str(model), "layer_range": part}]} for part in ([0, 3], [1, 4])]
    merge({"merge_method": "passthrough", "slices": slices, "dtype": "float16"}, tmp_path / "out", CPU)
    found = config_of(tmp_path / "out")
    assert found["num_hidden_layers"] == 6
    assert found["layer_types"] == [*kinds[:3], *kinds[1:]]
    assert found["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("own_head", "said", "other_head", "expected"),
    [
        (True, False, True, False),
        (True, True, True, False),  # a head was written, so it counts
        (True, None, True, False),
        (False, True, False, True),
        (False, None, False, True),
        (False, False, False, True),  # loaders would initialize the head at random
        (False, True, True, False),
        (True, False, False, False),
    ],
)
def test_tied_heads_in_config(
    own_head: bool, said: bool | None, other_head: bool, expected: bool | None, tmp_path: Path
) -> None:
    key = "tie_word_embeddings"
    config = {name: value for name, value in tiny_llama().config.items() if name != key}
    a = write_checkpoint(
        tmp_path / "a", tiny_llama(tied=not own_head), config=config | ({} if said is None else {key: said})
    )
    b = write_checkpoint(tmp_path / "b", tiny_llama(tied=not other_head))
    models = [{"model": str(model), "parameters": {"weight": 1}} for model in (a, b)]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out", CPU)
    assert config_of(tmp_path / "out").get(key) is expected


def test_a_model_without_config_gets_none(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"weight": (4, 4)})
    planned = plan(passed(model), CPU)
    assert [warning for warning in planned.warnings if "has no config.json" in warning]
    merge(planned, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "mergekit_config.yml", "mergeloom.json", "model.safetensors"]


def test_any_text_in_config_survives(tmp_path: Path) -> None:
    odd = {"id2label": {"0": "très 好 \ud800 \x00"}, "score": float("inf"), "deep": [[[{}]]]}
    model = write_checkpoint(tmp_path / "model", {"weight": (4, 4)}, config=odd)
    merge(passed(model), tmp_path / "out", CPU)
    assert config_of(tmp_path / "out") == odd


@pytest.mark.parametrize("keep_paths", [False, True])
def test_card_recipe_and_manifest_have_the_published_form(tmp_path: Path, keep_paths: bool) -> None:
    model = write_checkpoint(tmp_path / "tiny", tiny_llama())
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    out = tmp_path / "out"
    recipe = passed(model, name="stack", dtype="bfloat16")
    mergeloom.merge(recipe, out, device="cpu", seed=7, keep_paths=keep_paths)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit"
    assert {"mergeloom", "merge"} <= set(card.data.tags)
    assert card.data.base_model is None  # the Hub does not know a directory
    assert "mergeloom merge mergekit_config.yml merged --seed 7\n" in card.text
    shown = recipe | {"models": [{"model": str(model) if keep_paths else "tiny"}]}
    manifest = json.loads((out / "mergeloom.json").read_text())
    for text in (
        (out / "mergekit_config.yml").read_text(),
        card.text.split("```yaml\n")[1].split("```")[0],
        manifest["recipe"],
    ):
        assert yaml.safe_load(text) == shown
    assert manifest["models"] == [str(model) if keep_paths else "tiny"]
    everything = b"".join((out / name).read_bytes() for name in ("README.md", "mergekit_config.yml", "mergeloom.json"))
    assert (str(tmp_path).encode() in everything) is keep_paths
    said: list[str] = []
    mergeloom.merge(recipe, out, device="cpu", seed=7, keep_paths=not keep_paths, say=said.append)
    assert "already complete" in said[0]


def test_the_published_recipe_makes_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(tmp_path / "tiny", tiny_llama())
    mergeloom.merge(passed(model, dtype="bfloat16"), tmp_path / "out", device="cpu")
    monkeypatch.chdir(tmp_path)
    mergeloom.merge("out/mergekit_config.yml", "again", device="cpu")
    for name in ("model.safetensors", "config.json", "mergekit_config.yml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_inputs_with_equal_directory_names_are_published_under_different_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("x", "y")):
        write_checkpoint(tmp_path / name / "tiny", tiny_llama(), fill=seed)
    weights = {str(tmp_path / "x" / "tiny"): 0.75, str(tmp_path / "y" / "tiny"): 0.25}
    models = [{"model": path, "parameters": {"weight": weight}} for path, weight in weights.items()]
    said: list[str] = []
    out = tmp_path / "out"
    mergeloom.merge({"merge_method": "linear", "models": models}, out, device="cpu", say=said.append)
    assert said[0] == f"directories have the same name: the recipe and the model card in {out} say x/tiny, y/tiny"
    published = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert [model["model"] for model in published["models"]] == ["x/tiny", "y/tiny"]
    assert "- `x/tiny`\n- `y/tiny`\n" in (out / "README.md").read_text()
    manifest = json.loads((out / "mergeloom.json").read_text())
    assert (manifest["models"], manifest["local_models"]) == (["x/tiny", "y/tiny"], [0, 1])
    monkeypatch.chdir(tmp_path)
    mergeloom.merge("out/mergekit_config.yml", "again", device="cpu")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_plan_says_what_config_can_not(tmp_path: Path) -> None:
    base = tiny_llama(layers=4)
    model = write_checkpoint(tmp_path / "model", base, config=base.config | {"full_attention_interval": 4})
    slices = [{"sources": [{"model": str(model), "layer_range": part}]} for part in ([0, 3], [1, 4])]
    planned = plan({"merge_method": "passthrough", "slices": slices}, CPU)
    assert [warning for warning in planned.warnings if "full_attention_interval = 4 no longer describes" in warning]
    assert json.loads(json.dumps(planned.to_dict()))["warnings"] == list(planned.warnings)


def test_the_card_names_the_library_that_loads_the_model(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tiny_llama())
    merge(passed(model), tmp_path / "1", CPU)
    assert ModelCard.load(tmp_path / "1" / "README.md").data.library_name == "transformers"
    (model / "modules.json").write_text("[]")
    merge(passed(model), tmp_path / "2", CPU)
    assert ModelCard.load(tmp_path / "2" / "README.md").data.library_name == "sentence-transformers"
    unet = write_checkpoint(
        tmp_path / "unet", {"conv_in.weight": (4, 4)}, config={"_class_name": "UNet2DConditionModel"}
    )
    merge(passed(unet), tmp_path / "3", CPU)
    assert ModelCard.load(tmp_path / "3" / "README.md").data.library_name == "diffusers"
