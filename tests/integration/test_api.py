"""The public Python API."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergeloom
from mergeloom.engine.execute.tasks import Progress
from mergeloom.engine.run.plan import Options


@pytest.fixture
def recipe(llamas: dict[str, Path]) -> dict[str, Any]:
    """Make a recipe for the mean of two models."""
    models = [{"model": str(llamas[name]), "parameters": {"weight": 0.5}} for name in "ab"]
    return {"merge_method": "linear", "models": models}


def test_every_public_name_exists() -> None:
    for name in mergeloom.__all__:
        assert getattr(mergeloom, name) is not None
        assert name in dir(mergeloom)
    with pytest.raises(AttributeError, match="no attribute 'plane'"):
        mergeloom.plane  # noqa: B018


def test_plan_takes_sizes_as_numbers_or_text(recipe: dict[str, Any]) -> None:
    as_text = mergeloom.plan(recipe, max_ram="2GiB", shard_size="40KB", threads=1, device="cpu")
    as_numbers = mergeloom.plan(recipe, max_ram=2 << 30, shard_size=40_000, threads=1, device="cpu")
    assert as_text.options == as_numbers.options
    assert as_text.schedule.budget.ram == 2 << 30
    assert len(as_text.layout.shards) > 1


def test_the_defaults_match_the_options() -> None:
    plan = inspect.signature(mergeloom.plan).parameters
    merge = inspect.signature(mergeloom.merge).parameters
    for name in Options.__dataclass_fields__:
        if name == "overrides":
            continue  # Python code changes the recipe itself
        assert name == "machine" or plan[name].default == merge[name].default  # only plans are made for other machines
        default = 5 * 10**9 if plan[name].default == "5GB" else plan[name].default
        assert default == getattr(Options(), name)


def test_a_recipe_is_a_path_a_dict_or_a_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    plans = [mergeloom.plan(path), mergeloom.plan(str(path)), mergeloom.plan(recipe)]
    plans.append(mergeloom.plan(plans[0].recipe))
    outputs = [plan.to_dict()["output"] for plan in plans]
    assert all(output == outputs[0] for output in outputs)


def test_merge_a_plan(recipe: dict[str, Any], tmp_path: Path) -> None:
    plan = mergeloom.plan(recipe, max_ram="2GiB")
    calls: list[Progress] = []
    result = mergeloom.merge(plan, tmp_path / "out", notify=calls.append)
    assert result.plan.built is plan.built
    assert result.measured.bytes_written == plan.schedule.bytes_written
    assert calls[-1].bytes_written == plan.schedule.bytes_written
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_plan_keeps_its_options(recipe: dict[str, Any], tmp_path: Path) -> None:
    plan = mergeloom.plan(recipe, seed=1)
    with pytest.raises(mergeloom.UsageError, match="pass these to `plan`"):
        mergeloom.merge(plan, tmp_path / "out", seed=2)
    assert not (tmp_path / "out").exists()


def test_a_rehearsal(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = mergeloom.merge(recipe, None)
    assert result.out is None
    assert result.measured.bytes_read == result.plan.schedule.bytes_read
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keyword", ["restart", "fresh"])
def test_restart_and_its_former_name(
    keyword: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}
    monkeypatch.setattr("mergeloom.engine.run.merge.merge", lambda *arguments, **options: received.update(options))
    mergeloom.merge(recipe, tmp_path / "out", **{keyword: True})
    assert received["fresh"] is True


@pytest.mark.parametrize("wrong", [{"max_ram": 0}, {"max_ram": "lots"}, {"shard_size": -1}, {"threads": 0}])
def test_invalid_options(wrong: dict[str, Any], recipe: dict[str, Any]) -> None:
    with pytest.raises(mergeloom.UsageError):
        mergeloom.plan(recipe, **wrong)
