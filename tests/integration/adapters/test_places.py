"""Models with adapters wherever a recipe or a command can name a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergeloom
from mergeloom.engine.model.inspect import inspect_model
from mergeloom.errors import CheckpointError
from tests.support import models
from tests.support.adapters.files import PREFIX, product, write_lora
from tests.support.adapters.kinds import KINDS, write_kind
from tests.support.command_line import run
from tests.support.outputs import read_model, same_tensors

LLAMA = models.tiny_llama(layers=3)
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``other``, and adapters ``a`` and ``b`` of base."""
    root = tmp_path_factory.mktemp("places")
    for seed, name in enumerate(("base", "other")):
        models.write_tokenizer(models.write_checkpoint(root / name, LLAMA, fill=seed))
    write_lora(root / "a", LLAMA.tensors, seed=1, more={f"{PREFIX}lm_head.weight": torch.ones(64, 32)})
    write_lora(root / "b", LLAMA.tensors, targets=MLP, seed=2, rank=2)
    return root


@pytest.fixture(scope="module")
def values(root: Path) -> dict[str, Tensor]:
    """The tensors of base with adapter b, in float64."""
    return adapted(root, "b")


def adapted(root: Path, adapter: str) -> dict[str, Tensor]:
    found = {name: tensor.double() for name, tensor in read_model(root / "base").items()}
    for name in found:
        if name.removesuffix(".weight").endswith(MLP):
            found[name] += product(root / adapter, name.removesuffix(".weight"))
    return found


def merged(tmp_path: Path, recipe: Any, **options: Any) -> dict[str, Tensor]:
    mergeloom.merge(recipe, tmp_path / "out", **options)
    return read_model(tmp_path / "out")


def is_close(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected).abs().max() <= 1e-6 * expected.abs().max())


FORMS = {
    "text": "{root}/base+{root}/b",
    "mapping": "{{model: {{path: {root}/base}}, lora: {{path: {root}/b}}}}",
    "mapping with a list": "{{model: {root}/base, lora: [{root}/b]}}",
    "file": "{root}/base+{root}/b/adapter_model.safetensors",
    "slash at the end": "{root}/base/+{root}/b/",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_reference(tmp_path: Path, root: Path, values: dict[str, Tensor], form: str) -> None:
    recipe = tmp_path / "r.yml"
    text = FORMS[form].format(root=root)
    recipe.write_text(f"merge_method: passthrough\nmodels:\n- model: {text}\nout_dtype: float32\n")
    found = merged(tmp_path, recipe)
    assert all(is_close(found[name], expected) for name, expected in values.items())


def test_layer_ranges(tmp_path: Path, root: Path, values: dict[str, Tensor]) -> None:
    reference = f"{root}/base+{root}/b"
    parts = [(reference, 0, 2), (str(root / "other"), 2, 3), (reference, 1, 3)]
    slices = [{"sources": [{"model": model, "layer_range": [low, high]}]} for model, low, high in parts]
    found = merged(tmp_path, {"merge_method": "passthrough", "slices": slices, "out_dtype": "float32"})
    other = read_model(root / "other")
    name = "model.layers.{}.mlp.up_proj.weight"
    for layer, source in enumerate((0, 1, None, 1, 2)):
        expected = other[name.format(2)].double() if source is None else values[name.format(source)]
        assert is_close(found[name.format(layer)], expected)


def test_base_model_tensors_from_and_non_layer(tmp_path: Path, root: Path, values: dict[str, Tensor]) -> None:
    reference, other = f"{root}/base+{root}/b", str(root / "other")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": reference,
        "models": [{"model": other}],
        "parameters": {"weight": 0.5},
        "tensors_from": [{"filter": "layers.1.mlp", "model": reference}],
        "non_layer": {"head": f"{root}/base+{root}/a"},
        "out_dtype": "float32",
    }
    found, theirs = merged(tmp_path, recipe), read_model(root / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    assert is_close(found[name], values[name] + 0.5 * (theirs[name].double() - values[name]))
    copied = "model.layers.1.mlp.up_proj.weight"
    assert is_close(found[copied], values[copied])
    assert torch.equal(found["lm_head.weight"], torch.ones(64, 32))


def two_stages(tmp_path: Path, first: list[str], second: list[str]) -> Path:
    """A recipe of the mean of some models as stage `mean`, and the mean of others."""
    file = tmp_path / "r.yml"
    linear = "merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{}]\n"
    stages = (linear.format(", ".join(f"{{model: {model}}}" for model in models)) for models in (first, second))
    file.write_text("name: mean\n" + "---\n".join(stages) + "out_dtype: float32\n")
    return file


def test_an_adapter_of_a_stage(tmp_path: Path, root: Path) -> None:
    recipe = two_stages(tmp_path, [str(root / "base"), str(root / "other")], [f"mean+{root}/b"])
    found = merged(tmp_path, recipe)
    ours, theirs = read_model(root / "base"), read_model(root / "other")
    for name, tensor in found.items():
        expected = (ours[name].double() + theirs[name].double()) / 2
        module = name.removesuffix(".weight")
        assert is_close(tensor, expected + (product(root / "b", module) if module.endswith(MLP) else 0))


def test_adapters_in_several_stages(tmp_path: Path, root: Path) -> None:
    reference = f"{root}/base+{root}/b"
    recipe = two_stages(tmp_path, [reference, str(root / "other")], ["mean", reference])
    planned = mergeloom.plan(recipe)
    read = {entry["model"] for entry in planned.to_dict()["bytes_by_model"]}
    assert read == {str(root / name) for name in ("base", "other", "b")}
    assert not planned.built.unused
    found, theirs = merged(tmp_path, recipe), read_model(root / "other")
    for name, expected in adapted(root, "b").items():
        assert is_close(found[name], 0.75 * expected + 0.25 * theirs[name].double())


def test_a_directory_with_a_plus_is_a_directory(tmp_path: Path, root: Path) -> None:
    path = models.write_checkpoint(tmp_path / "base+b", LLAMA, fill=7)
    found = merged(tmp_path, {"merge_method": "passthrough", "models": [{"model": str(path)}]})
    assert same_tensors(found, read_model(path))


def test_inspect_shows_the_values_and_the_adapter(root: Path) -> None:
    found = inspect_model(f"{root}/base+{root}/a").to_dict()
    assert found["tensors"] == len(LLAMA.tensors)
    assert found["adapters"] == [
        {"name": f"{root}/a", "kind": "LoRA", "ranks": [4], "modules": 21, "replaced": 1, "base": None}
    ]
    done = run("inspect", f"{root}/base+{root}/a")
    assert f"{root}/a: LoRA of rank 4, 21 modules" in done.stdout
    assert "BF16 (LoRA)" in done.stdout


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("fused experts of Qwen", "LoRA of rank 4, 8 modules"),
        ("tied embedding", "LoRA of rank 4, 1 module"),
        ("trained tokens", "LoRA of rank 4, 5 modules"),
        ("DoRA", "DoRA of rank 4, 6 modules"),
        ("ranks and alphas by pattern", "LoRA of ranks 2 to 4, 6 modules"),
    ],
)
def test_the_kind_and_the_rank_of_an_adapter(tmp_path: Path, name: str, title: str) -> None:
    base, adapter = write_kind(KINDS[name], tmp_path)
    (found,) = inspect_model(f"{base}+{adapter}").adapters
    assert found.title == title
    with pytest.raises(CheckpointError, match=f"{adapter} is a .*LoRA.* adapter.*, not a model"):
        mergeloom.plan({"merge_method": "passthrough", "models": [{"model": str(adapter)}]})
    assert "content     adapter: " in run("inspect", adapter).stdout


def test_a_packed_factor_is_counted_once_for_all_experts(tmp_path: Path) -> None:
    base, adapter = write_kind(KINDS["one parameter of the experts"], tmp_path)
    found = inspect_model(f"{base}+{adapter}").to_dict()
    assert sum(group["bytes"] for group in found["dtypes"].values()) == found["bytes"]


def test_diff_computes_the_values(root: Path, values: dict[str, Tensor]) -> None:
    found = mergeloom.diff(root / "base", f"{root}/base+{root}/b")
    own = {name: tensor.double() for name, tensor in read_model(root / "base").items()}
    distance = sum(float(((values[name] - own[name]) ** 2).sum()) for name in own) ** 0.5
    size = sum(float((tensor**2).sum()) for tensor in own.values()) ** 0.5
    assert found.total.relative_distance == pytest.approx(distance / size, rel=1e-5)
    same = mergeloom.diff(f"{root}/base+{root}/b", f"{root}/base+{root}/b")
    assert same.total.relative_distance == 0


def test_explain_page_and_graph_name_base_and_adapter(tmp_path: Path, root: Path) -> None:
    recipe = tmp_path / "r.yml"
    base = root / "base"
    models_ = f"[{{model: {base}+{root}/a}}, {{model: {base}+{root}/b}}]"
    recipe.write_text(f"merge_method: linear\nmodels: {models_}\nparameters: {{weight: 0.5}}\n")
    name = "model.layers.1.mlp.up_proj.weight"
    done = run("plan", recipe, "--explain", name)
    assert done.returncode == 0
    for text in (f"{base}+{root}/a", f"{base}+{root}/b", f"from {PREFIX}{name[:-7]}.lora_A.weight", "BF16 (LoRA)"):
        assert text in done.stdout
    assert not mergeloom.plan(recipe).warnings
    done = run("plan", recipe, "--html", tmp_path / "plan.html", "--graph", tmp_path / "plan.json")
    assert done.returncode == 0
    assert f"{root}/b (adapter)" in done.stdout
    assert f"{root}/b" in (tmp_path / "plan.html").read_text()


def test_the_mergekit_command_is_accepted(tmp_path: Path, root: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {root}/base+{root}/b}}]\n")
    done = run(
        "merge", recipe, tmp_path / "out", "--lora-merge-cache", tmp_path / "cache", "--lora-merge-dtype=float16"
    )
    assert done.returncode == 0
    assert "--lora-merge-cache has no effect: adapters are applied while merging" in done.stderr
    assert not (tmp_path / "cache").exists()
