"""Prediction layers (MTP) are merged if all models have them, copied if the base has them, and kept after a stack."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergeloom
from mergeloom.engine.model.warnings import ModelWarningKind
from tests.support.command_line import run
from tests.support.models import write_checkpoint
from tests.support.outputs import read_model

LAYERS, HIDDEN, VOCABULARY = 3, 8, 16
PREFIXES = ["model.layers.3", "mtp.0", "model.mtp.layers.0", "mtp.layers.0"]
"""Where published models have them: DeepSeek-V3 and GLM; DeepSeek-V4; LongCat and MiMo; Qwen3.5."""
OWN = ("mlp.up_proj.weight", "eh_proj.weight", "enorm.weight")


def write(directory: Path, prefix: str | None, seed: int, *, stated: int | None = 1, dtype: str = "float32") -> Path:
    """Write a small model, with a prediction layer if there is a prefix for it."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    tensors = {"model.embed_tokens.weight": values(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = values(HIDDEN, HIDDEN)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = values(HIDDEN)
    shapes = ((HIDDEN, HIDDEN), (HIDDEN, 2 * HIDDEN), (HIDDEN,))
    if prefix is not None:
        tensors |= {f"{prefix}.{name}": values(*shape) for name, shape in zip(OWN, shapes, strict=True)}
    tensors |= {"model.norm.weight": values(HIDDEN), "lm_head.weight": values(VOCABULARY, HIDDEN)}
    config = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    config |= {} if stated is None else {"num_nextn_predict_layers": stated}
    return write_checkpoint(directory / f"model{seed}", tensors, config=config)


def linear(*models: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models]}


def task_arithmetic(base: Path, *models: Path) -> dict[str, Any]:
    return linear(*models) | {"merge_method": "task_arithmetic", "base_model": str(base)}


def stack(*slices: tuple[Path, int, int]) -> dict[str, Any]:
    sources = [{"sources": [{"model": str(model), "layer_range": [first, end]}]} for model, first, end in slices]
    return {"merge_method": "passthrough", "slices": sources}


class Merged:
    """The output of a recipe: its tensors, config.json, and the warnings about prediction layers."""

    def __init__(self, recipe: dict[str, Any], out: Path) -> None:
        plan = mergeloom.plan(recipe, device="cpu")
        self.warnings = [str(each) for each in plan.findings if each.kind is ModelWarningKind.PREDICTION_LAYERS]
        mergeloom.merge(plan, out, device="cpu")
        self.tensors = read_model(out)
        config = json.loads((out / "config.json").read_text())
        self.layers, self.stated = config["num_hidden_layers"], config.get("num_nextn_predict_layers")

    def prediction(self, prefix: str) -> list[Tensor]:
        """The tensors of the prediction layer, in the order of `OWN`; none if there are none."""
        found = [self.tensors.get(f"{prefix}.{name}") for name in OWN]
        assert all(each is None for each in found) or None not in found
        return [each for each in found if each is not None]


def own(model: Path, prefix: str) -> list[Tensor]:
    tensors = read_model(model)
    return [tensors[f"{prefix}.{name}"] for name in OWN]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_they_are_merged_if_all_models_have_them(prefix: str, tmp_path: Path) -> None:
    a, b = (write(tmp_path, prefix, seed) for seed in (1, 2))
    merged = Merged(linear(a, b), tmp_path / "out")
    mean = [(x + y) / 2 for x, y in zip(own(a, prefix), own(b, prefix), strict=True)]
    assert_equal(merged.prediction(prefix), mean)
    assert merged.stated == 1
    extra = ["kept as layer 3" in text for text in merged.warnings]
    assert extra == ([True] if prefix.startswith("model.layers") else [])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "one has them"])
def test_they_are_copied_from_the_base_if_others_lack_them(prefix: str, method: str, tmp_path: Path) -> None:
    base, tuned = write(tmp_path, prefix, 1), write(tmp_path, None, 2, stated=0)
    other = write(tmp_path, prefix if method == "one has them" else None, 3)
    recipe = linear(base, tuned) if method == "linear" else task_arithmetic(base, tuned, other)
    merged = Merged(recipe, tmp_path / "out")
    assert all(map(torch.equal, merged.prediction(prefix), own(base, prefix)))
    assert len(merged.prediction(prefix)) == len(OWN)
    assert merged.stated == 1
    (text,) = merged.warnings
    lacking = f"{tuned}, {other} lack them" if method == "task_arithmetic" else f"{tuned} lacks them"
    assert text.startswith(f"{base}: ")
    assert f"copied without merging: {lacking}" in text
    assert ("layer 3" if prefix.startswith("model.layers") else prefix.removesuffix(".0").split(".layers")[0]) in text


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_they_are_left_out_if_the_base_lacks_them(prefix: str, method: str, tmp_path: Path) -> None:
    base, tuned = write(tmp_path, None, 1), write(tmp_path, prefix, 2)
    merged = Merged(linear(base, tuned) if method == "linear" else task_arithmetic(base, tuned), tmp_path / "out")
    assert merged.prediction(prefix) == []
    assert merged.stated == 0
    texts = [text for text in merged.warnings if "is set to" not in text]
    assert len(texts) == 1
    assert texts[0].startswith(f"{tuned}: ")
    assert f"not part of the output: {base} lacks them" in texts[0]
    planned = mergeloom.plan(linear(base, tuned), device="cpu")
    (unused,) = (each for each in planned.built.unused if each.model == str(tuned))
    assert unused.reason == f"{base} has no prediction layers"
    assert set(unused.tensors) == {f"{prefix}.{name}" for name in OWN}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("first_has", [True, False])
def test_a_stack_keeps_those_of_its_last_slice(prefix: str, first_has: bool, tmp_path: Path) -> None:
    first, last = write(tmp_path, prefix if first_has else None, 1, stated=int(first_has)), write(tmp_path, prefix, 2)
    merged = Merged(stack((first, 0, 2), (last, 1, 3)), tmp_path / "out")
    target = prefix.replace("model.layers.3", "model.layers.4")
    assert merged.layers == 4
    assert all(map(torch.equal, merged.prediction(target), own(last, prefix)))
    assert len(merged.prediction(target)) == len(OWN)
    assert merged.stated == 1


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_stack_whose_last_model_lacks_them_has_none(prefix: str, tmp_path: Path) -> None:
    first, last = write(tmp_path, prefix, 1), write(tmp_path, None, 2)
    merged = Merged(stack((first, 0, 2), (last, 1, 3)), tmp_path / "out")
    assert merged.prediction(prefix.replace("model.layers.3", "model.layers.4")) == []
    assert merged.layers == 4
    assert merged.stated == 0
    assert [text for text in merged.warnings if "not part of the output" in text]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_tensor_that_only_one_prediction_layer_lacks_is_an_error(prefix: str, tmp_path: Path) -> None:
    a, b = (write(tmp_path, prefix, seed) for seed in (1, 2))
    tensors = read_model(b)
    del tensors[f"{prefix}.enorm.weight"]
    damaged = write_checkpoint(tmp_path / "damaged", tensors, config=json.loads((b / "config.json").read_text()))
    with pytest.raises(mergeloom.CheckpointError, match=r"enorm\.weight is in .* but not in .*damaged"):
        mergeloom.plan(linear(a, damaged))


def test_copied_layers_are_stored_in_the_dtype_of_the_recipe(tmp_path: Path) -> None:
    base, tuned = write(tmp_path, "mtp.0", 1), write(tmp_path, None, 2)
    merged = Merged(linear(base, tuned) | {"dtype": "bfloat16"}, tmp_path / "out")
    expected = [each.to(torch.bfloat16) for each in own(base, "mtp.0")]
    assert all(map(torch.equal, merged.prediction("mtp.0"), expected))


def test_plan_says_so_in_one_line(tmp_path: Path) -> None:
    base, tuned = write(tmp_path, "mtp.0", 1), write(tmp_path, None, 2)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(linear(base, tuned)))
    done = run("plan", recipe)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "prediction layers in mtp" in line]
    assert done.returncode == 0
    assert len(said) == 1
