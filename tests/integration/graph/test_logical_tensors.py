"""Values that are computed from several stored tensors: their merge equals that of models that store the values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mergeloom
from mergeloom.engine.model.formats import registry
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.models import toy_format
from tests.support.outputs import read_model, same_tensors

Pair = tuple[Path, Path]

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.5}},
    "slerp": {"merge_method": "slerp", "base_model": 0, "parameters": {"t": 0.25}},
    "ties": {"merge_method": "ties", "base_model": 0, "parameters": {"weight": 0.5, "density": 0.5}},
    "della": {"merge_method": "della", "base_model": 0, "parameters": {"weight": 0.5, "density": 0.5, "epsilon": 0.1}},
    "karcher": {"merge_method": "karcher"},
}


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMATS, "toy", toy_format.find)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    root = tmp_path_factory.mktemp("toys")
    return [toy_format.write_pair(root, seed) for seed in (1, 2, 3)]


def recipe(method: str, models: list[Path], dtype: str | None = "float32") -> dict[str, Any]:
    """A recipe of a method over some models, the first of which is the base."""
    made = dict(RECIPES[method])
    if "base_model" in made:
        made["base_model"] = str(models[made["base_model"]])
    if dtype is not None:
        made["dtype"] = dtype
    return made | {"models": [{"model": str(model)} for model in models]}


def weights(out: Path) -> dict[str, bytes]:
    """The bytes of each tensor: their order in the file follows that of the inputs."""
    return {name: tensor.numpy().tobytes() for name, tensor in read_model(out).items()}


@pytest.mark.parametrize("method", RECIPES)
def test_a_merge_of_parts_equals_the_merge_of_their_values(tmp_path: Path, pairs: list[Pair], method: str) -> None:
    count = 2 if method == "slerp" else 3
    mergeloom.merge(recipe(method, [plain for _, plain in pairs[:count]]), tmp_path / "plain")
    mergeloom.merge(recipe(method, [toy for toy, _ in pairs[:count]]), tmp_path / "toy")
    mixed = [pair[place % 2] for place, pair in enumerate(pairs[:count])]
    mergeloom.merge(recipe(method, mixed), tmp_path / "mixed")
    assert weights(tmp_path / "toy") == weights(tmp_path / "plain")
    assert weights(tmp_path / "mixed") == weights(tmp_path / "plain")


def test_every_access_of_the_format_is_planned_exactly(tmp_path: Path, pairs: list[Pair]) -> None:
    planned = plan(recipe("ties", [toy for toy, _ in pairs]), Options(max_ram=8 << 30, device="cpu"))
    result = mergeloom.merge(recipe("ties", [toy for toy, _ in pairs]), tmp_path / "out", max_ram=8 << 30)
    assert result.measured.bytes_read == planned.schedule.bytes_read
    assert not planned.built.unused
    rows = sum(row >= 0 for row in toy_format.ORDER)
    for ref, name, nbytes in zip(
        planned.built.graph.reads, planned.built.graph.read_names, _reads(planned), strict=True
    ):
        times = nbytes / ref.nbytes
        if name.endswith(".rows"):
            assert nbytes == rows * toy_format.HIDDEN * 4
        elif name.endswith(".turned"):  # two values, each of which stages what lies between its own rows
            assert 1.9 < times <= 2
        else:
            assert times == 1


def _reads(planned: Any) -> list[int]:
    from mergeloom.engine.schedule.traffic import bytes_of_reads

    return bytes_of_reads(planned.built.graph, planned.schedule)


def test_the_output_has_the_values_of_the_toy_and_the_names_of_the_model(tmp_path: Path, pairs: list[Pair]) -> None:
    toy, plain = pairs[0]
    found = {"merge_method": "passthrough", "dtype": "float32", "models": [{"model": str(toy)}]}
    mergeloom.merge(found, tmp_path / "out")
    decoded, expected = read_model(tmp_path / "out"), read_model(plain)
    assert decoded.keys() == expected.keys()
    assert all((decoded[name] == expected[name]).all() for name in expected)


def test_the_stored_dtype_of_a_decoded_tensor_is_used_for_copies_only(tmp_path: Path, pairs: list[Pair]) -> None:
    toy, plain = pairs[0]
    copied = {"merge_method": "passthrough", "out_dtype": "same", "models": [{"model": str(toy)}]}
    mergeloom.merge(copied, tmp_path / "out")
    mergeloom.merge({**copied, "out_dtype": None}, tmp_path / "plain")
    assert same_tensors(read_model(tmp_path / "out"), read_model(tmp_path / "plain"))
    scaled = copied | {"parameters": {"scale": 2}}
    message = "is stored in the format .*, which mergeloom reads but does not write, and out_dtype `same` needs it"
    with pytest.raises(CheckpointError, match=message):
        mergeloom.plan(scaled)
    base = {"merge_method": "linear", "base_model": str(plain), "models": [{"model": str(toy)}, {"model": str(plain)}]}
    planned = mergeloom.plan(base | {"out_dtype": "same", "parameters": {"weight": 1}})
    assert planned.output_dict()["dtypes"] == ["F32"]


def test_a_copy_without_dtype_keeps_parts_and_their_names(tmp_path: Path, pairs: list[Pair]) -> None:
    toy, plain = pairs[0]
    slices = [
        {"sources": [{"model": str(toy), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(toy), "layer_range": [1, 2]}]},
    ]
    mergeloom.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    copied, stored, values = read_model(tmp_path / "out"), read_model(toy), read_model(plain)
    for name in ("mlp.up_proj.weight", "mlp.up_proj.weight.scales", "mlp.down_proj.weight.a"):
        assert (copied[f"model.layers.2.{name}"] == stored[f"model.layers.1.{name}"]).all()
    for name in ("q_proj", "o_proj", "gate"):  # slices have no form of their own to keep
        found = copied[f"model.layers.2.self_attn.{name}.weight"]
        assert (found == values[f"model.layers.1.self_attn.{name}.weight"]).all()
    assert not any(name.endswith((".qkv", ".turned", ".rows")) for name in copied)


def in_stages(directory: Path, first: str, other: Path, last: str = "") -> Path:
    """The recipe of two stages, the first of which copies a model."""
    last = (
        last or f"merge_method: linear\nmodels: [{{model: first}}, {{model: {other}}}]\nparameters: {{weight: 0.5}}\n"
    )
    file = directory / "recipe.yml"
    file.write_text(f"name: first\nmerge_method: passthrough\n{first}\n---\n{last}dtype: float32\n")
    return file


@pytest.mark.parametrize("keys", ["", "dtype: float32\n", "out_dtype: float32\n"])
@pytest.mark.parametrize("save", ["", "save: true\n"])
def test_a_stage_that_copies_parts_passes_on_their_values(
    tmp_path: Path, pairs: list[Pair], keys: str, save: str
) -> None:
    (toy, plain), (other, _) = pairs[0], pairs[1]
    first = in_stages(tmp_path, f"{keys}{save}models: [{{model: {toy}}}]", other)
    mergeloom.merge(recipe("linear", [plain, other]), tmp_path / "expected")
    mergeloom.merge(first, tmp_path / "out")
    expected = weights(tmp_path / "expected")
    assert weights(tmp_path / "out") == expected
    if save:  # what the stage writes: the values if it says a dtype, and otherwise the parts
        saved, stored = read_model(tmp_path / "out" / "first"), read_model(plain if keys else toy)
        for name in stored if keys else [name for name in stored if ".mlp." in name]:
            assert torch.equal(saved[name], stored[name])
            assert saved[name].dtype == stored[name].dtype


def test_a_stage_that_moves_layers_passes_on_their_values(tmp_path: Path, pairs: list[Pair]) -> None:
    made = []
    for toy in (pairs[0][0], pairs[0][1]):
        parts = ", ".join(f"{{sources: [{{model: {toy}, layer_range: {part}}}]}}" for part in ("[0, 2]", "[0, 1]"))
        last = "merge_method: passthrough\nslices: [{sources: [{model: first, layer_range: [1, 3]}]}]\n"
        planned = plan(in_stages(tmp_path, f"slices: [{parts}]", toy, last))
        mergeloom.merge(planned, out := tmp_path / toy.name)
        unused = [(each.reason, sorted(each.tensors)) for each in planned.built.unused]
        made.append((weights(out), unused))
    assert made[0] == made[1]


def test_layers_filters_and_reports_see_values_only(pairs: list[Pair], capsys: pytest.CaptureFixture[str]) -> None:
    toy, plain = pairs[0]
    inspected, twin = (mergeloom.inspect(model).to_dict(tensors=True) for model in (toy, plain))
    shapes, others = ({each["name"]: each["shape"] for each in found["tensor_list"]} for found in (inspected, twin))
    assert shapes == others
    up = next(each for each in inspected["tensor_list"] if each["name"].endswith("0.mlp.up_proj.weight"))
    assert (up["format"], [part["dtype"] for part in up["parts"]]) == ("toy scaled", ["BF16", "F32"])
    assert (inspected["tensors"], inspected["parameters"]) == (twin["tensors"], twin["parameters"])
    weight = [{"filter": "up_proj", "value": 0.25}, {"value": 0.75}]
    found = recipe("linear", [toy, pairs[1][0]]) | {"parameters": {"weight": weight, "normalize": False}}
    planned = plan(found)
    assert not planned.warnings
    values = {use.parameter: use for use in planned.built.parameters}
    assert "weight" in values
    assert json.dumps(planned.to_dict())


def test_parts_are_checked_for_nan(tmp_path: Path, pairs: list[Pair]) -> None:
    from safetensors.torch import load_file, save_file

    toy, _ = pairs[0]
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(toy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight.scales"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text((toy / "config.json").read_text())
    with pytest.raises(mergeloom.CheckpointError, match=r"up_proj.weight.scales of .*broken holds NaN"):
        mergeloom.merge(recipe("linear", [broken, pairs[1][0]]), tmp_path / "out")
