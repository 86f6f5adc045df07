"""Two models that don't match: the error names the common cause, not only the first tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergeloom.engine.model.checks.names import Renaming, find_renaming, shortest_prefixes
from mergeloom.engine.run.merge import merge
from tests.support.models import Shape, encoder_dir, tiny_llama, write_checkpoint
from tests.support.outputs import read_model, same_tensors
from tests.unit.model.refusing import CPU, linear, refused

ENCODER = list(read_model(encoder_dir()))
LLAMA = tiny_llama(layers=2)


def small_encoder() -> dict[str, torch.Tensor]:
    """The encoder's tensors, of each dimension the first eight indices: enough where names count."""
    values = read_model(encoder_dir())
    return {name: value[tuple(slice(8) for _ in value.shape)].clone() for name, value in values.items()}


def evaluate(renaming: Renaming, name: str) -> str:
    """The name that the advised code computes."""
    return str(eval(renaming.expression, {"re": re, "name": name}))


def follow(error: str) -> dict[str, Any]:
    """Run the scripts in an error, or return the key of a recipe's entry that it shows."""
    if "Rename them in the recipe's entry" in error:
        entry: dict[str, Any] = yaml.safe_load(error.split("\n\n")[1])
        return entry
    script = error.partition("\n\n")[2].partition("\n\nThe first difference: tensor ")[0]
    exec("\n".join(line[4:] for line in script.splitlines()), {})
    return {}


# ------------------------------------------------------------------------------------------------ other names


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


NAMINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "prefix": (lambda name: f"bert.{name}", "without prefix 'bert.'"),
    "two prefixes": (lambda name: f"0.auto_model.{name}", "without prefix '0.auto_model.'"),
    "gamma and beta": (old_norms, "with `weight` and `bias` instead of `gamma` and `beta`"),
    "both": (
        lambda name: f"bert.{old_norms(name)}",
        "without prefix 'bert.' and with `weight` and `bias` instead of `gamma` and `beta`",
    ),
}


@pytest.mark.parametrize(("rename", "words"), NAMINGS.values(), ids=NAMINGS)
def test_the_renaming_that_makes_the_names_equal_is_found(rename: Callable[[str], str], words: str) -> None:
    renaming = find_renaming([rename(name) for name in ENCODER], ENCODER)
    assert renaming is not None
    assert (str(renaming), renaming.matches, renaming.total) == (words, 104, 104)
    assert [evaluate(renaming, rename(name)) for name in ENCODER] == ENCODER


def test_a_prefix_that_replaces_another() -> None:
    renaming = find_renaming([f"transformer.{name}" for name in ENCODER], [f"bert.{name}" for name in ENCODER])
    assert renaming == Renaming((("transformer.", "bert."),), False, 104, 104)
    assert str(renaming) == "with prefix 'bert.' instead of 'transformer.'"


def test_names_without_the_prefix_are_not_changed() -> None:
    names = [*(f"transformer.{name}" for name in ENCODER), "head.weight", "extra.weight"]
    wanted = [*(f"bert.{name}" for name in ENCODER), "head.weight"]
    renaming = find_renaming(names, wanted)
    assert renaming is not None
    assert renaming.matches == 105
    assert [evaluate(renaming, name) for name in names] == [*wanted, "extra.weight"]
    assert list(map(renaming, names)) == [*wanted, "extra.weight"]


def test_names_that_are_equal_keep_their_names_when_all_others_get_a_prefix() -> None:
    names = [*ENCODER, "score.weight"]
    wanted = [*(f"bert.{name}" for name in ENCODER), "score.weight"]
    renaming = find_renaming(names, wanted)
    assert renaming == Renaming((("score.", "score."), ("", "bert.")), False, 105, 105)
    assert str(renaming) == "with prefix 'bert.' for all others"
    assert [evaluate(renaming, name) for name in names] == wanted


def test_equal_endings_of_a_few_names_are_not_the_same_tensors() -> None:
    names = [*(f"bert.{name}" for name in ENCODER), "cls.predictions.transform.dense.weight"]
    renaming = find_renaming(names, [*ENCODER, "head.dense.weight"])
    assert renaming == Renaming((("bert.", ""),), False, 104, 105)


def test_no_renaming_gives_two_tensors_the_same_name() -> None:
    assert find_renaming([*(f"bert.{name}" for name in ENCODER), ENCODER[0]], ENCODER) is None


@pytest.mark.parametrize(
    "names",
    [
        ENCODER,
        ENCODER[:-3],
        [*ENCODER, "bert.pooler.dense.weight"],
        [f"layer{number}" for number in range(100)],
        [],
        LLAMA.tensors,
    ],
)
def test_no_renaming_is_advised_where_none_helps(names: Iterable[str]) -> None:
    assert find_renaming(list(names), ENCODER) is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("rename", "words"), NAMINGS.values(), ids=NAMINGS)
def test_models_with_other_names_are_rejected_with_the_way_to_rename(
    rename: Callable[[str], str], words: str, order: tuple[int, int], tmp_path: Path
) -> None:
    values = small_encoder()
    config = {"model_type": "bert", "num_hidden_layers": 6}
    a = write_checkpoint(tmp_path / "a", values, config=config)
    b = write_checkpoint(tmp_path / "b", {rename(name): value for name, value in values.items()}, config=config)
    error = refused(linear(*((a, b)[index] for index in order)))
    equal = sum(rename(name) == name for name in ENCODER)
    assert error.startswith(
        f"{b} and {a} have different names for the same tensors: only {equal} of the 104 tensors of"
    )
    assert f"in {a}, but {words}, 104 would be." in error
    entry = follow(error)
    assert bool(entry) == ("gamma" not in words)
    model = {"model": str(b), **entry} if entry else {"model": str(tmp_path / "b-renamed")}
    merge({"merge_method": "passthrough", "models": [model]}, tmp_path / "out", CPU)
    assert same_tensors(read_model(tmp_path / "out"), values)


def averages(out: Path, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether a model has the means of two models' float32 tensors, by the first model's names, and no others."""
    means = {name: (first[name] + second[name]) / 2 for name in first}
    return same_tensors(read_model(out), means)


def old_llava(name: str) -> str:
    """The name of a tensor in LLaVA before transformers 4.52."""
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name.removeprefix("model.")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_advice_for_old_and_new_names_of_a_vision_language_model_works(
    order: tuple[int, int], tmp_path: Path
) -> None:
    shapes: dict[str, Shape] = {
        name if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}": shape
        for name, shape in LLAMA.tensors.items()
    }
    shapes |= {"model.multi_modal_projector.linear.weight": (8, 8), "model.vision_tower.patch.weight": (8, 4)}
    config = {"model_type": "llava", "text_config": LLAMA.config, "vision_config": {"hidden_size": 8}}
    new = write_checkpoint(tmp_path / "new", shapes, dtype="F32", config=config, shard_bytes=20_000)
    values = {name: value + 1 for name, value in read_model(new).items()}
    renamed = {old_llava(name): value for name, value in values.items()}
    old = write_checkpoint(tmp_path / "old", renamed, dtype="F32", config=config, shard_bytes=20_000)
    models = (new, old)
    error = refused(linear(*(models[index] for index in order)))
    assert "have different names for the same tensors: only 0 of the 23 tensors" in error
    assert ", 23 would be." in error
    assert "leave out" not in error
    entry = follow(error)
    source = old if f"recipe's entry of {old}:" in error else new
    first = new if source == old else old
    recipe = linear(first, source)
    recipe["models"][1] |= entry
    merge(recipe, tmp_path / "out", CPU)
    expected = [read_model(new), values]
    if first == old:
        expected = [{old_llava(name): value for name, value in each.items()} for each in expected]
    assert averages(tmp_path / "out", expected[0], expected[1])


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_advice_names_and_leaves_out_what_only_one_model_has(method: str, tmp_path: Path) -> None:
    """A masked language model and an embedding model have other names, one has a head, and the other a pooler."""
    values = {
        name: value.float()
        for name, value in small_encoder().items()
        if "pooler" not in name and "position_ids" not in name
    }
    size = values["embeddings.LayerNorm.weight"].shape[0]
    head = {"cls.predictions.bias": torch.ones(size), "cls.predictions.transform.dense.weight": torch.ones(size, size)}
    pooler = {"pooler.dense.weight": torch.ones(size, size), "pooler.dense.bias": torch.ones(size)}
    config = {"model_type": "bert", "num_hidden_layers": 6}
    masked = {f"bert.{name}": value * 3 for name, value in values.items()} | head
    a = write_checkpoint(tmp_path / "a", masked, dtype="F32", config=config)
    b = write_checkpoint(tmp_path / "b", values | pooler, dtype="F32", config=config)
    error = refused(linear(a, b))
    assert (
        f"{a} has 2 tensors that {b} lacks (cls.predictions.bias, cls.predictions.transform.dense.weight). "
        f"{b} has 2 tensors that {a} lacks (pooler.dense.bias, pooler.dense.weight). "
        "The scripts leave out what only one model has; use both new directories. Rename them in" in error
    )
    follow(error)
    pair = tmp_path / "a-renamed", tmp_path / "b-reduced"
    recipe = linear(*pair)
    if method == "slerp":
        models = [{"model": str(each)} for each in pair]
        recipe = {"merge_method": "slerp", "base_model": str(pair[0]), "models": models, "parameters": {"t": 0}}
    merge(recipe, tmp_path / "out", CPU)
    tripled = {name: value * 3 for name, value in values.items()}
    if method == "linear":
        assert averages(tmp_path / "out", tripled, values)
    else:
        assert same_tensors(read_model(tmp_path / "out"), tripled)


@pytest.mark.parametrize("extra", ["layers", "vision tower"])
def test_layers_and_vision_towers_are_not_left_out(extra: str, tmp_path: Path) -> None:
    values = read_model(encoder_dir())
    tower = {"vision_tower.patch_embedding.weight": torch.ones(8, 8)} if extra == "vision tower" else {}
    renamed = {f"bert.{name}": value for name, value in values.items()} | tower
    a = write_checkpoint(tmp_path / "a", renamed, config={"num_hidden_layers": 6})
    fewer = {name: value for name, value in values.items() if tower or ".layer.5." not in name}
    b = write_checkpoint(tmp_path / "b", fewer, config={"num_hidden_layers": 6 if tower else 5})
    error = refused(linear(a, b))
    assert "without prefix 'bert.'" in error
    assert "leave out" not in error
    assert "drop" not in error


@pytest.mark.parametrize(
    ("names", "kept", "prefixes"),
    [
        (["cls.a.weight", "cls.b.weight"], ["bert.x"], ("cls.",)),
        (["m.head.a", "m.head.b", "q"], ["m.x"], ("m.head.", "q")),
        (["m.a"], ["m.b"], ("m.a",)),
    ],
)
def test_the_prefixes_of_what_is_left_out(names: list[str], kept: list[str], prefixes: tuple[str, ...]) -> None:
    assert shortest_prefixes(names, kept) == prefixes


def test_a_single_missing_tensor_is_named_as_before(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", LLAMA)
    tensors = {name: shape for name, shape in LLAMA.tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    b = write_checkpoint(tmp_path / "b", tensors, config=LLAMA.config)
    assert refused(linear(a, b)).startswith(f"tensor model.layers.1.mlp.up_proj.weight is in {a} but not in {b}: ")


def test_a_text_model_and_one_with_a_vision_tower_are_not_advised_to_rename(tmp_path: Path) -> None:
    tower = {f"model.vision_tower.blocks.{number}.w.weight": (8, 8) for number in range(30)}
    names = {f"model.language_model.{name.removeprefix('model.')}": s for name, s in LLAMA.tensors.items()}
    config = {"text_config": LLAMA.config, "vision_config": {"depth": 30}}
    a = write_checkpoint(tmp_path / "a", LLAMA)
    b = write_checkpoint(tmp_path / "b", names | tower, config=config)
    assert "different names for the same tensors" not in refused(linear(a, b))
