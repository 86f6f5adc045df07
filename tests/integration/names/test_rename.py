"""`rename` gives a model other tensor names before anything looks at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeloom.engine.run.manifest import MANIFEST
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.errors import MergeloomError, RecipeError, UsageError
from mergeloom.report.explain import explain, explanation_sections
from mergeloom.report.plan import plan_text
from mergeloom.report.sections import plain
from tests.support.merges.resumable import interrupt, run
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.outputs import config_of, digests, read_model, same_tensors

CPU = Options(device="cpu", threads=1, keep_paths=True)
LLAMA = tiny_llama(layers=3)
OLD = [["transformer.blocks.", "model.layers."], ["transformer.", "model."], ["head.", "lm_head."]]


def old_name(name: str) -> str:
    for old, new in OLD:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models, the second one with other names."""
    a = write_checkpoint(tmp_path / "a", LLAMA, dtype="F32", fill=1)
    values = read_model(write_checkpoint(tmp_path / "original", LLAMA, dtype="F32", fill=2))
    b = write_checkpoint(
        tmp_path / "b", {old_name(name): value for name, value in values.items()}, dtype="F32", config=LLAMA.config,
        shard_bytes=20_000,
    )  # fmt: skip
    return a, b


def linear(a: Path, b: Path, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(a)}, {"model": str(b), "rename": OLD}]
    return {"merge_method": "linear", "models": entries, "parameters": {"weight": 0.5}, **more}


def expected_mean(a: Path, b: Path) -> dict[str, torch.Tensor]:
    theirs = read_model(b)
    return {name: (value.double() + theirs[old_name(name)].double()) / 2 for name, value in read_model(a).items()}


def test_a_model_with_other_names_is_merged(models: tuple[Path, Path], tmp_path: Path) -> None:
    merge(linear(*models), tmp_path / "out", CPU)
    made = read_model(tmp_path / "out")
    for name, value in expected_mean(*models).items():
        assert torch.equal(made[name].double(), value.float().double())
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["renames"] == {"1": OLD}
    verdict = verify(tmp_path / "out", sources=True)
    assert (verdict.whole, verdict.changed_sources, verdict.missing_sources) == (True, (), ())


def test_the_output_has_the_new_names_of_a_renamed_donor(models: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = models
    model = {"path": str(b), "rename": OLD}
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out", CPU)
    theirs = read_model(b)
    assert same_tensors(read_model(tmp_path / "out"), {name: theirs[old_name(name)] for name in read_model(a)})
    assert config_of(tmp_path / "out") == config_of(b) | {
        key: config_of(tmp_path / "out")[key] for key in ("torch_dtype", "dtype") if key in config_of(tmp_path / "out")
    }


def test_slices_base_model_and_non_layer_name_the_renamed_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = models
    slices = [
        {"sources": [{"model": str(b), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(a), "layer_range": [1, 3]}]},
        {"sources": [{"model": str(b), "layer_range": [2, 3]}]},
    ]
    recipe = {
        "merge_method": "passthrough",
        "slices": slices,
        "non_layer": {"head": str(a)},
        "base_model": {"model": {"path": str(b)}, "rename": OLD},
    }
    merge(recipe, tmp_path / "out", CPU)
    made, ours, theirs = (read_model(path) for path in (tmp_path / "out", a, b))
    assert torch.equal(made["lm_head.weight"], ours["lm_head.weight"])
    assert torch.equal(made["model.norm.weight"], theirs["transformer.norm.weight"])
    origins = [(theirs, "transformer.blocks.0"), (theirs, "transformer.blocks.1"), (ours, "model.layers.1"),
               (ours, "model.layers.2"), (theirs, "transformer.blocks.2")]  # fmt: skip
    for layer, (values, prefix) in enumerate(origins):
        rests = {name.removeprefix(f"{prefix}.") for name in values if name.startswith(f"{prefix}.")}
        assert len(rests) == 9
        for rest in rests:
            assert torch.equal(made[f"model.layers.{layer}.{rest}"], values[f"{prefix}.{rest}"])


def test_a_prefix_can_be_added_and_removed(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.config.items() if key != "architectures"}  # they state the names
    values = read_model(write_checkpoint(tmp_path / "a", LLAMA.tensors, config=config))
    write_checkpoint(tmp_path / "b", {f"module.{name}": value for name, value in values.items()}, config=LLAMA.config)
    entry = {"model": str(tmp_path / "b"), "rename": [["module.", ""]]}
    merge({"merge_method": "passthrough", "models": [entry]}, tmp_path / "out", CPU)
    assert same_tensors(read_model(tmp_path / "out"), values)
    entry = {"model": str(tmp_path / "a"), "rename": [["lm_head.", "lm_head."], ["", "net."]]}
    merge({"merge_method": "passthrough", "models": [entry]}, tmp_path / "longer", CPU)
    longer = {name if name.startswith("lm_head.") else f"net.{name}": value for name, value in values.items()}
    assert same_tensors(read_model(tmp_path / "longer"), longer)


def test_the_new_names_are_checked_like_stored_ones(models: tuple[Path, Path]) -> None:
    entry = {"model": str(models[0]), "rename": [["", "module."]]}
    with pytest.raises(MergeloomError, match="has names with 'module.', which a wrapper such as DDP"):
        plan({"merge_method": "passthrough", "models": [entry]}, CPU)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ([["transfomer.", "model."]], "no tensor of {b} begins with 'transfomer.'; did you mean 'transformer.'?"),
        ([["zzz.", "model."]], "no tensor of {b} begins with 'zzz.'; the most frequent prefixes: 'transformer.', "
         "'transformer.blocks.', 'head.'"),
        ([["transformer.norm.", "x."], ["transformer.embed_tokens.", "x."]],
         "{b} would have two tensors named x.weight: transformer."),
        ([["transformer.norm.weight", ""]], "transformer.norm.weight of {b} would become '', which is not a name"),
        ([["transformer", ""]], "{b} would become '.blocks.0.input_layernorm.weight', which is not a name: pre"),
        ([["transformer.blocks.", "model.layers."], ["transformer.embed", "e"], ["transformer.norm", "n"],
          ["transformer", "t"]], "the pairs before it rename all tensors of {b} with 'transformer': remove it"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit_the_names_are_rejected(
    rename: list[list[str]], message: str, models: tuple[Path, Path]
) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(models[1]), "rename": rename}]}
    with pytest.raises(RecipeError) as caught:
        plan(recipe, CPU)
    assert message.format(b=models[1]) in str(caught.value)
    assert "models[0].rename" in str(caught.value)


def test_names_in_the_description_of_quantized_tensors_are_not_renamed(tmp_path: Path) -> None:
    config = LLAMA.config | {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}}
    a = write_checkpoint(tmp_path / "a", LLAMA.tensors, config=config)
    entry = {"model": str(a), "rename": [["lm_head.", "head."]]}
    with pytest.raises(RecipeError, match="config.json of .* refers to lm_head by this name in its descript"):
        plan({"merge_method": "passthrough", "models": [entry]}, CPU)
    entry["rename"] = [["model.embed_tokens.", "model.embedding."]]
    assert len(plan({"merge_method": "passthrough", "models": [entry]}, CPU).built.graph.outputs) == len(LLAMA.tensors)


def test_plan_and_explanation_show_the_stored_names(models: tuple[Path, Path]) -> None:
    planned = plan(linear(*models), CPU)
    model = planned.built.models[1]
    assert len(model.checkpoint.stored) == len(LLAMA.tensors)
    assert f"{models[1]}: 'transformer.blocks.' becomes 'model.layers.', " in plan_text(planned)
    assert planned.to_dict()["inputs"]["renamed"] == [{"model": str(models[1]), "pairs": OLD}]
    explanation = explain(planned, "model.layers.1.mlp.up_proj.weight")
    assert [source.stored for source in explanation.sources] == [
        "model.layers.1.mlp.up_proj.weight",
        "transformer.blocks.1.mlp.up_proj.weight",
    ]
    assert "(stored as transformer.blocks.1.mlp.up_proj.weight)" in plain(explanation_sections(explanation))


def test_other_pairs_make_another_merge(tmp_path: Path) -> None:
    """The names are the same with both, but each belongs to the other tensor."""
    tensors = {f"{side}.layers.{layer}.w.weight": (64, 64) for side in ("a", "b") for layer in range(2)}
    model = write_checkpoint(tmp_path / "m", tensors, dtype="F32", fill=3)
    twin = write_checkpoint(tmp_path / "n", tensors, dtype="F32", fill=4)

    def recipe(rename: list[list[str]]) -> dict[str, Any]:
        models = [{"model": str(model), "rename": rename}, {"model": str(twin)}]
        return {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}

    same, swapped = [["a.", "a."]], [["a.", "b."], ["b.", "a."]]
    merge(recipe(same), tmp_path / "same", CPU)
    merge(recipe(swapped), tmp_path / "swapped", CPU)
    ours, theirs = read_model(model), read_model(twin)
    mean = (ours["a.layers.0.w.weight"].double() + theirs["b.layers.0.w.weight"].double()) / 2
    assert torch.equal(read_model(tmp_path / "swapped")["b.layers.0.w.weight"].double(), mean.float().double())
    with pytest.raises(UsageError, match="recipe"):
        merge(recipe(swapped), tmp_path / "same", CPU)


def test_an_interrupted_merge_resumes_with_the_same_pairs_only(models: tuple[Path, Path], tmp_path: Path) -> None:
    merge(linear(*models), tmp_path / "complete", CPU)
    interrupt(linear(*models), tmp_path / "out", 2, CPU)
    other = linear(*models)
    other["models"][0]["rename"] = [["model.layers.0.", "model.layers.1."], ["model.layers.1.", "model.layers.0."]]
    with pytest.raises(UsageError, match="rename"):
        run(other, tmp_path / "out", CPU)
    result = run(linear(*models), tmp_path / "out", CPU)
    assert result.earlier.bytes_written > 0
    assert digests(tmp_path / "out", "*.safetensors") == digests(tmp_path / "complete", "*.safetensors")
