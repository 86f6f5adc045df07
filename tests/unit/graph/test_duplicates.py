"""One model that a recipe lists under two names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.model.warnings import ModelWarningKind
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, RecipeError
from tests.support.models import tiny_llama, write_checkpoint

CPU = Options(device="cpu", threads=1)


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with models a and b."""
    for number, name in enumerate("ab"):
        write_checkpoint(tmp_path / name, tiny_llama(), fill=number)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def linear(*models: str, **more: Any) -> dict[str, Any]:
    """A mean of models."""
    return {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}, **more}


def duplicates(recipe: dict[str, Any]) -> list[str]:
    """The warnings of the plan, all of which are about duplicates."""
    findings = plan(recipe, CPU).findings
    assert all(finding.kind is ModelWarningKind.DUPLICATE_MODEL for finding in findings)
    return [str(finding) for finding in findings]


@pytest.mark.parametrize("second", ["./a", "b/../a", "a/", "link", "a/model.safetensors", "absolute"])
def test_two_names_of_one_directory(models: Path, second: str) -> None:
    (models / "link").symlink_to("a")
    second = str(models / "a") if second == "absolute" else second
    expected = f"a and {second} are the same model, {models.resolve() / 'a' / 'model.safetensors'}, which therefore "
    assert duplicates(linear("a", second, "b")) == [f"recipe: models[1]: {expected}counts twice; use one name for it"]
    with pytest.raises(CheckpointError, match="counts twice"):
        plan(linear("a", second), Options(device="cpu", strict=True))


def test_different_models_are_no_duplicates(models: Path) -> None:
    write_checkpoint(models / "copy", tiny_llama(), fill=0)
    assert duplicates(linear("a", "copy", "b")) == []
    ranges = [[0, 2], [2, 4]]
    sources = [{"model": model, "layer_range": r} for model, r in zip(("a", "./a"), ranges, strict=True)]
    slices = [{"sources": sources}]
    assert duplicates({"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}) == []


def test_two_names_of_the_base(models: Path) -> None:
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": "./a",
        "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 1, "density": 0.5}}],
        "parameters": {"density": 0.5},
    }
    with pytest.raises(RecipeError) as caught:
        plan(recipe, CPU)
    message = str(caught.value)
    assert "models[0]: ties, model a, tensor" in message
    assert "`weight` has no value" in message
    assert message.endswith("; a and ./a are the same model: use one name for it")
    recipe["models"][0]["parameters"] = {"weight": 1}
    file = models.resolve() / "a" / "model.safetensors"
    assert duplicates(recipe) == [
        f"recipe: base_model: a and ./a are the same model, {file}: the difference between a and the base model, ./a, "
        "is zero; use one name for it"
    ]
    recipe["base_model"] = "a"
    assert duplicates({**recipe, "models": recipe["models"][1:]}) == []
