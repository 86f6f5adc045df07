"""Stages that are saved: written beside the output, each to a folder of its own, out of the same reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.manifest import read_manifest
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.errors import RecipeError
from mergeloom.report.plan import plan_text
from tests.support.faults import Kill, Stopped, watching
from tests.support.models.write import tiny_llama, write_checkpoint, write_tokenizer
from tests.support.outputs import digests, read_model, same_tensors

OPTIONS = Options(max_ram=4 << 30, device="cpu", threads=1, shard_size=40_000)

FIRST = """\
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.3}}}}
  - {{model: {b}, parameters: {{weight: 0.7}}}}
dtype: bfloat16
"""
LAST = """\
merge_method: slerp
base_model: {middle}
models: [{{model: {b}}}]
parameters: {{t: 0.4}}
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two small Llamas in float32, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    found = {name: write_checkpoint(root / name, tiny_llama(), dtype="F32", fill=n) for n, name in enumerate("ab")}
    for path in found.values():
        write_tokenizer(path)
    return found


def both(
    models: dict[str, Path], directory: Path, *, save: bool = True, name: str = "middle", last: str = LAST
) -> Path:
    """A recipe of two stages, of which the first may be saved."""
    stage = f"name: {name}\n{'save: true' if save else ''}\n{FIRST.format(**models)}"
    file = directory / f"{'saved' if save else 'plain'}.yml"
    file.write_text(f"{stage}---\n{last.format(middle=name, **models)}")
    return file


def top(directory: Path) -> dict[str, str]:
    """The digests of the weights and the index right in a directory."""
    names = digests(directory, "model*")
    return {name: digest for name, digest in names.items() if "/" not in name}


def test_both_models_are_what_they_are_alone(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "first.yml").write_text(FIRST.format(**models))
    merge(tmp_path / "first.yml", tmp_path / "first", OPTIONS)
    merge(both(models, tmp_path, save=False), tmp_path / "plain", OPTIONS)
    planned = plan(both(models, tmp_path), OPTIONS)
    result = merge(planned, tmp_path / "out")
    assert top(tmp_path / "out") == top(tmp_path / "plain")  # bfloat16 rounds only the copy on the disk
    assert top(tmp_path / "out/middle") == top(tmp_path / "first")
    assert len(top(tmp_path / "out/middle")) > 2  # several shards and their index
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out/middle" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
    assert "# middle" in (tmp_path / "out/middle/README.md").read_text()

    output, (saved,) = planned.to_dict()["output"], planned.to_dict()["saved"]
    alone = plan(tmp_path / "first.yml", OPTIONS).to_dict()["output"]
    assert saved == {"folder": "middle", **alone}
    assert output == plan(both(models, tmp_path, save=False), OPTIONS).to_dict()["output"]
    assert planned.bytes_written == output["bytes"] + saved["bytes"] == result.measured.bytes_written
    assert planned.bytes_read == sum(ref.nbytes for ref in planned.built.graph.reads) == result.measured.bytes_read
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert planned.disk == on_disk
    assert "saved beside  middle/: 4 layers" in " ".join(plan_text(planned).split("\n")).replace("   ", "  ")


def test_a_tensor_of_both_is_read_once_and_made_once(models: dict[str, Path], tmp_path: Path) -> None:
    last = "merge_method: passthrough\nmodels: [{{model: {middle}}}]\ndtype: bfloat16\n"
    planned = plan(both(models, tmp_path, last=last), OPTIONS)
    graph = planned.built.graph
    assert all(len(outputs) == 2 for outputs in graph.destinations())
    merge(planned, tmp_path / "out")
    same_tensors(read_model(tmp_path / "out"), read_model(tmp_path / "out/middle"))


def test_a_saved_stage_that_no_other_uses(models: dict[str, Path], tmp_path: Path) -> None:
    last = "merge_method: passthrough\nmodels: [{{model: {a}}}]\n"
    planned = plan(both(models, tmp_path, last=last), OPTIONS)
    assert planned.warnings == ()
    merge(planned, tmp_path / "out")
    same_tensors(read_model(tmp_path / "out"), read_model(models["a"]))
    assert len(read_model(tmp_path / "out/middle")) == len(read_model(models["a"]))


def test_killed_and_gone_on_with(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = both(models, tmp_path)
    merge(recipe, tmp_path / "whole", OPTIONS)
    calls = Kill()
    with watching(calls):
        merge(recipe, tmp_path / "counted", OPTIONS, group_bytes=20_000)
    stopped = 0
    for after in range(5, len(calls.calls), max(1, len(calls.calls) // 12)):
        out = tmp_path / f"out{after}"
        try:
            with watching(Kill(after)):
                merge(recipe, out, OPTIONS, group_bytes=20_000)
        except Stopped:
            stopped += 1
        merge(recipe, out, replace(OPTIONS, threads=2), group_bytes=20_000)
        assert digests(out) == digests(tmp_path / "whole")
    assert stopped >= 8


def test_verify_looks_into_the_folder(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(both(models, tmp_path), out, OPTIONS)
    found = verify(out)
    assert found.whole
    assert found.tensors == len(read_manifest(out)["tensors"]) == 2 * len(read_model(out))
    shard = sorted((out / "middle").glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [text for text in verify(out).damaged if "middle/" in text]
    shard.write_bytes(whole)
    (out / "middle/config.json").write_text("{}")
    assert verify(out).damaged == ("middle/config.json: was changed",)
    (out / "middle/other.safetensors").write_bytes(b"")
    (out / "middle/additional_chat_templates").mkdir()
    (out / "middle/additional_chat_templates/tools.jinja").write_text("")
    assert verify(out).added == ("middle/additional_chat_templates/tools.jinja", "middle/other.safetensors")


@pytest.mark.parametrize(
    "name", ["Config.json", "readme.md", "TOKENIZER.json", "model-00001-of-00002.safetensors", "mergeloom.json"]
)
def test_names_that_something_else_in_out_has(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"saved\.yml:1: .*\.name: .*of a saved stage, which becomes a folder"):
        plan(both(models, tmp_path, name=name), OPTIONS)
    plan(both(models, tmp_path, name=name, save=False), OPTIONS)  # it doesn't matter where nothing is written


@pytest.mark.parametrize("name", ["../up", "a/b", ".mergeloom", "a..", "nul\0"])
def test_names_that_lead_elsewhere(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    recipe = both(models, tmp_path)
    recipe.write_text(recipe.read_text().replace("middle", json.dumps(name)))
    with pytest.raises(RecipeError):
        plan(recipe, OPTIONS)


def test_the_output_may_say_that_it_is_saved(models: dict[str, Path], tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": str(models["a"])}], "save": True}
    planned = plan(recipe, OPTIONS)
    assert planned.saved == ()
    assert json.loads(json.dumps(planned.to_dict()))["saved"] == []
