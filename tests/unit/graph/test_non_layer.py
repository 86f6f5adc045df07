"""`non_layer:` sets the models that embeddings, norm and head come from; by default, the slices determine them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, RecipeError
from tests.support.models import Model, tiny_llama, write_checkpoint
from tests.support.outputs import config_of, read_model, same_bits

CPU = Options(device="cpu", threads=1)
EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    """Models a, b and c."""
    return {name: write_checkpoint(tmp_path / name, tiny_llama(), fill=n, dtype="F32") for n, name in enumerate("abc")}


def stacked(first: Path, last: Path, **more: Any) -> dict[str, Any]:
    """Layers of two models."""
    slices = [{"sources": [{"model": str(m), "layer_range": r}]} for m, r in ((first, [0, 2]), (last, [2, 4]))]
    return {"merge_method": "passthrough", "slices": slices, **more}


def named(models: dict[str, Path], **parts: str) -> dict[str, str]:
    """The mapping for `non_layer`."""
    return {part: str(models[name]) for part, name in parts.items()}


def sources(planned: Plan, name: str) -> list[str]:
    """The directories' names of the models that make an output tensor, and the tensors' names there."""
    graph = planned.built.graph
    (node,) = (output.node for output in graph.outputs if output.name == name)
    return [
        f"{Path(graph.models[graph.read_models[read]]).name}:{graph.read_names[read]}"
        for read in graph.node_sources[node]
    ]


def test_by_default_the_first_and_the_last_slice_decide(three: dict[str, Path]) -> None:
    planned = plan(stacked(three["a"], three["b"]), CPU)
    assert [sources(planned, name)[0][0] for name in (EMBEDDINGS, NORM, HEAD)] == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"embeddings": "b"}, "bbb"),
        ({"norm": "a"}, "aab"),
        ({"head": "a"}, "aba"),
        ({"embeddings": "c", "norm": "c", "head": "c"}, "ccc"),
        ({"embeddings": "b", "head": "c"}, "bbc"),
    ],
)
def test_each_part_comes_from_where_it_is_named(three: dict[str, Path], parts: dict[str, str], expected: str) -> None:
    planned = plan(stacked(three["a"], three["b"], non_layer=named(three, **parts)), CPU)
    assert "".join(sources(planned, name)[0][0] for name in (EMBEDDINGS, NORM, HEAD)) == expected
    assert sources(planned, "model.layers.1.input_layernorm.weight") == ["a:model.layers.1.input_layernorm.weight"]
    assert [model.name for model in planned.built.models][:2] == [str(three["a"]), str(three["b"])]
    assert planned.built.donor == 0


def test_what_is_named_is_not_merged(tmp_path: Path, three: dict[str, Path]) -> None:
    recipe = {
        "merge_method": "slerp",
        "base_model": str(three["a"]),
        "models": [{"model": str(three["b"])}],
        "parameters": {"t": 0.4},
        "dtype": "float32",
    }
    merge(recipe, tmp_path / "plain", CPU)
    chosen = named(three, embeddings="b", head="c")
    merge(recipe | {"non_layer": chosen}, tmp_path / "out", CPU)
    plain, out = read_model(tmp_path / "plain"), read_model(tmp_path / "out")
    assert same_bits(out[EMBEDDINGS], read_model(three["b"])[EMBEDDINGS])
    assert same_bits(out[HEAD], read_model(three["c"])[HEAD])
    assert all(same_bits(out[name], plain[name]) for name in plain if name not in (EMBEDDINGS, HEAD))
    merge(recipe | {"non_layer": chosen, "out_dtype": "bfloat16"}, tmp_path / "rounded", CPU)
    assert same_bits(read_model(tmp_path / "rounded")[HEAD], out[HEAD].bfloat16())


def test_random_methods_are_not_touched(tmp_path: Path, three: dict[str, Path]) -> None:
    models = [{"model": str(three[name]), "parameters": {"weight": 1, "density": 0.5}} for name in "bc"]
    recipe = {"merge_method": "dare_ties", "base_model": str(three["a"]), "models": models}
    other = write_checkpoint(tmp_path / "other", tiny_llama(), fill=9, dtype="F32")
    merge(recipe, tmp_path / "plain", CPU)
    merge(recipe | {"non_layer": {"norm": str(other)}}, tmp_path / "out", CPU)
    plain, out = read_model(tmp_path / "plain"), read_model(tmp_path / "out")
    assert [name for name in plain if not same_bits(plain[name], out[name])] == [NORM]


def test_a_stage_can_be_named(tmp_path: Path, three: dict[str, Path]) -> None:
    mean = {
        "name": "mean",
        "merge_method": "linear",
        "models": [{"model": str(three[name]), "parameters": {"weight": 1}} for name in "ab"],
    }
    merge([mean, stacked(three["a"], three["b"], non_layer={"head": "mean"})], tmp_path / "out", CPU)  # type: ignore[arg-type]
    merge(mean, tmp_path / "mean", CPU)
    assert same_bits(read_model(tmp_path / "out")[HEAD], read_model(tmp_path / "mean")[HEAD])


@pytest.mark.parametrize("tied", ["abc", "ac", "c", "a"])
def test_tied_heads(tied: str, tmp_path: Path) -> None:
    models = {
        name: write_checkpoint(tmp_path / name, tiny_llama(tied=name in tied), fill=n) for n, name in enumerate("abc")
    }
    recipe = stacked(models["a"], models["b"], non_layer=named(models, head="c"))
    if tied == "abc":
        with pytest.raises(RecipeError, match=r"non_layer\.head: none of the models has a separate head"):
            plan(recipe, CPU)
        recipe["non_layer"] = named(models, head="c", embeddings="c")
        merge(recipe, tmp_path / "out", CPU)
        assert HEAD not in read_model(tmp_path / "out")
        assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
        return
    planned = plan(recipe, CPU)
    assert sources(planned, HEAD) == [f"c:{EMBEDDINGS if 'c' in tied else HEAD}"]
    merge(planned, tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_models_that_do_not_fit_are_refused(tmp_path: Path, three: dict[str, Path]) -> None:
    wide = write_checkpoint(tmp_path / "wide", tiny_llama(hidden=64), fill=1)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[32\] in .*a and \[64\] in .*wide"):
        plan(stacked(three["a"], three["b"], non_layer={"norm": str(wide)}), CPU)
    bare = Model({name: shape for name, shape in tiny_llama().tensors.items() if name != NORM}, tiny_llama().config)
    write_checkpoint(tmp_path / "bare", bare, fill=1)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in .*a but not in .*bare"):
        plan(stacked(three["a"], three["b"], non_layer={"norm": str(tmp_path / "bare")}), CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("non_layer: x", "non_layer: expected a mapping of embeddings, norm and head to models, got 'x'"),
        ("non_layer: {norms: x}", "non_layer.norms: unknown key; did you mean `norm`?"),
        ("non_layer: {head: [x]}", "non_layer.head: expected a model"),
        ("non_layer: {head: a+}", "has no adapter after the +"),
        ("outside: {norms: x}", "outside.norms: unknown key; did you mean `norm`?"),
        ("non_layer: {}\noutside: {}", "outside: `non_layer` and its former name `outside` are mutually exclusive"),
    ],
)
def test_mistakes(text: str, message: str, tmp_path: Path, three: dict[str, Path]) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {three['a']}}}]\n{text}\n")
    with pytest.raises(RecipeError) as caught:
        plan(recipe, Options(device="cpu", strict=True))
    assert message in str(caught.value)
