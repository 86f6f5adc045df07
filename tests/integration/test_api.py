"""The public Python API."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import mergeloom
from mergeloom.__main__ import main
from mergeloom.engine.execute.measurements import Progress
from mergeloom.engine.run.merge import Result, merge
from mergeloom.engine.run.plan import Options
from mergeloom.methods import merge_methods
from tests.conftest import MakeModel
from tests.support import models


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
        of_one = {"machine": plan, "keep_paths": merge}  # a plan for another machine, the files that a merge writes
        for parameters in [of_one[name]] if name in of_one else [plan, merge]:
            default = {"5GB": 5 * 10**9}.get(str(parameters[name].default), parameters[name].default)
            assert default == ({} if name == "overrides" else getattr(Options(), name))


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
    assert (calls[-1].bytes_read, calls[-1].bytes_written) == (plan.bytes_read, plan.bytes_written)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_plan_keeps_its_options(recipe: dict[str, Any], tmp_path: Path) -> None:
    plan = mergeloom.plan(recipe, seed=1)
    with pytest.raises(mergeloom.UsageError, match="pass these to `plan`"):
        mergeloom.merge(plan, tmp_path / "out", seed=2)
    assert not (tmp_path / "out").exists()


def test_a_rehearsal(recipe: dict[str, Any], tmp_path: Path) -> None:
    calls: list[Progress] = []
    result = mergeloom.merge(recipe, None, notify=calls.append)
    assert (calls[-1].bytes_read, calls[-1].bytes_written) == (result.plan.bytes_read, result.plan.bytes_written)
    assert result.out is None
    assert result.measured.bytes_read == result.plan.schedule.bytes_read
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keyword", ["restart", "fresh"])
def test_restart_and_its_former_name(
    keyword: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}

    def run_merge(*arguments: Any, **options: Any) -> Result:
        received.update(options)
        return merge(*arguments, **options)

    monkeypatch.setattr("mergeloom.engine.run.merge.merge", run_merge)
    mergeloom.merge(recipe, tmp_path / "out", **{keyword: True})
    assert received["fresh"] is True


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_ram": 0}, "invalid max_ram 0: use a positive number of bytes"),
        ({"max_ram": "lots"}, "invalid size 'lots'"),
        ({"max_ram": 8e9}, "invalid max_ram 8000000000.0: use a positive number of bytes, or a string such as '32GiB'"),
        ({"max_vram": [1]}, r"invalid max_vram \[1\]"),
        ({"shard_size": -1}, "invalid shard_size -1"),
        ({"shard_size": None}, "invalid shard_size None"),
        ({"threads": 0}, "invalid threads 0: use 1 or more"),
        ({"threads": "two"}, "invalid threads 'two': use a whole number"),
        ({"seed": "x"}, "invalid seed 'x': use a whole number"),
        ({"device": 0}, "invalid device 0: use a string"),
        ({"machine": 64}, "invalid machine 64: use a string"),
        ({"overrides": ["dtype=float32"]}, r"invalid overrides \['dtype=float32'\]: use a dict of values by key"),
        ({"overrides": {"a=b": 1}}, "invalid key 'a=b' of overrides: expected a path of keys and indices"),
        ({"overrides": {0: 1}}, "invalid key 0 of overrides"),
        ({"overrides": {"dtype": {1, 2}}}, r"invalid value of overrides\['dtype'\]: a recipe can't contain a set"),
        (
            {"overrides": {"models.7.model": "x"}},
            "--set models.7.model=x: `models` is a list, whose indices are 0 to 1",
        ),
        ({"methods": [3]}, "invalid methods 3: use a string or a path"),
        ({"methods": 3}, "invalid methods 3: use paths of Python files"),
        ({"methods": "own\0.py"}, "--methods 'own.x00.py': invalid path"),
        ({"methods": ["x" * 5000]}, "cannot read the file: File name too long"),
    ],
)
def test_invalid_options(wrong: dict[str, Any], says: str, recipe: dict[str, Any]) -> None:
    with pytest.raises(mergeloom.UsageError, match=says):
        mergeloom.plan(recipe, **wrong)


def test_overrides_change_the_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    text = "a: b # c\n'd', [e]"
    overrides = {
        "models.0.parameters": {"weight": [0.25, 1e-7, 1e20]},
        "models[1].parameters.weight": np.float32(0.75),
        "chat_template": text + "{{ x }}",
        "out_dtype": None,
        "dtype": "float32",
    }
    plan = mergeloom.plan(recipe, device="cpu", overrides=overrides)
    changed = yaml.safe_load(plan.recipe.text)
    assert changed == {
        **recipe,
        "models": [
            {"model": recipe["models"][0]["model"], "parameters": {"weight": [0.25, 1e-7, 1e20]}},
            {"model": recipe["models"][1]["model"], "parameters": {"weight": 0.75}},
        ],
        "chat_template": text + "{{ x }}",
        "out_dtype": None,
        "dtype": "float32",
    }
    result = mergeloom.merge(recipe, tmp_path / "out", device="cpu", overrides=overrides)
    assert result.plan.recipe.text == plan.recipe.text
    with pytest.raises(mergeloom.UsageError, match="pass these to `plan`"):
        mergeloom.merge(mergeloom.plan(recipe), None, overrides=overrides)


def test_overrides_of_a_loaded_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(recipe))
    loaded = mergeloom.plan(path, overrides={"models.0.parameters.weight": 0.25}).recipe
    again = mergeloom.plan(loaded, overrides={"models.1.parameters.weight": 0.75}).recipe
    assert [model["parameters"]["weight"] for model in yaml.safe_load(again.text)["models"]] == [0.25, 0.75]
    with pytest.raises(mergeloom.RecipeError) as raised:
        mergeloom.plan(loaded, overrides={"models.1.parameters.weight": "heavy"})
    assert str(raised.value).startswith(
        f"{path} with --set models.1.parameters.weight=heavy: models[1].parameters.weight: linear, model "
    )
    assert (raised.value.line, raised.value.override) == (None, "--set models.1.parameters.weight=heavy")


@pytest.mark.parametrize("path", [3, None, b"model"])
def test_paths_are_strings_or_pathlike(path: Any, llamas: dict[str, Path], recipe: dict[str, Any]) -> None:
    says = f"invalid {{}} {path!r}: use a string or a path"
    with pytest.raises(mergeloom.UsageError, match=says.format("model")):
        mergeloom.inspect(path)
    with pytest.raises(mergeloom.UsageError, match=says.format("model")):
        mergeloom.stack(path, window=2)
    with pytest.raises(mergeloom.UsageError, match=says.format("out")):
        mergeloom.verify(path)
    with pytest.raises(mergeloom.UsageError, match=says.format("b")):
        mergeloom.diff(llamas["a"], path)
    if path is not None:  # a rehearsal
        with pytest.raises(mergeloom.UsageError, match=says.format("out")):
            mergeloom.merge(recipe, path)


class Named(os.PathLike[str]):
    """A path that is not a Path, with a text that is not the path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_every_path_may_be_any_pathlike(llamas: dict[str, Path], recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    model, out = Named(llamas["a"]), Named(tmp_path / "out")
    merged = mergeloom.merge(Named(tmp_path / "recipe.yml"), out)
    assert merged.out == tmp_path / "out"
    assert mergeloom.verify(out).whole
    assert len(mergeloom.inspect(model).tensors) == len(mergeloom.diff(model, out).tensors) == 38
    assert mergeloom.plan(mergeloom.stack(model, window=2)).to_dict()["output"]["layers"] == 6


def test_verify_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(mergeloom.UsageError, match="invalid threads 0"):
        mergeloom.verify(tmp_path, threads=0)


# ------------------------------------------------------------------------------------------------ other functions


def test_inspect_is_what_the_command_prints(llamas: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(llamas["a"]), "--json"])
    assert json.loads(capsys.readouterr().out) == mergeloom.inspect(llamas["a"]).to_dict()


def test_stack_is_what_the_command_prints(llamas: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["stack", str(llamas["a"]), "--window", "3", "--step", "2"])
    warnings: list[str] = []
    recipe = mergeloom.stack(llamas["a"], window=3, step=2, warn=warnings.append)
    assert capsys.readouterr().out == recipe.text
    assert warnings == [
        f"layer 3 of {llamas['a']} is unused: the last window ends before it (--exact extends it to the last layer)"
    ]
    assert mergeloom.stack(llamas["a"], window=3, step=2, exact=True).text != recipe.text
    assert mergeloom.plan(recipe).to_dict()["output"]["layers"] == 3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"window": "2"}, "invalid window '2': use a whole number"),
        ({"window": [2, None]}, "invalid window None: use a whole number"),
        ({"window": 9}, "window 9 is invalid for 4 layers: use 1 to 4"),
        ({"window": 2, "step": 1.5}, "invalid step 1.5"),
        ({"window": 2, "repeat": "x"}, "invalid repeat 'x'"),
        ({"window": 2, "dtype": 16}, "invalid dtype 16: use a string"),
        ({"window": 2, "dtype": "int3"}, "unknown dtype 'int3'"),
    ],
)
def test_invalid_stacks(wrong: dict[str, Any], says: str, llamas: dict[str, Path]) -> None:
    with pytest.raises(mergeloom.UsageError, match=says):
        mergeloom.stack(llamas["a"], **wrong)


METHOD = """from mergeloom.methods import merge_method

@merge_method("{name}", maximum=1)
def copy(t):
    \"\"\"Do nothing.\"\"\"
    return t.other
"""


@pytest.mark.usefixtures("forget_methods")
@pytest.mark.parametrize("several", [False, True])
def test_methods_lists_those_of_files_too(several: bool, tmp_path: Path) -> None:
    name = f"own_{several}"
    file = tmp_path / "own.py"
    file.write_text(METHOD.format(name=name))
    found = mergeloom.methods([file] if several else file)  # a single path is one file, not its characters
    assert list(found) == sorted(found)
    assert found[name].summary == "Do nothing."
    assert found["ties"] == merge_methods()["ties"]
    with pytest.raises(mergeloom.UsageError, match="file not found"):
        mergeloom.methods([tmp_path / "missing.py"])


def test_methods_is_a_package_and_a_function() -> None:
    """Importing the package sets the attribute: both orders must work."""
    for first in ("import mergeloom.methods.kernel.method", "import mergeloom; mergeloom.methods()"):
        code = f"{first}\nimport mergeloom, mergeloom.methods.kernel.method\nprint('ties' in mergeloom.methods())"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ended.stdout == "True\n"


# ------------------------------------------------------------------------------------------------ one line


def test_every_result_is_one_line(llamas: dict[str, Path], recipe: dict[str, Any], tmp_path: Path) -> None:
    plan = mergeloom.plan(recipe, device="cpu", max_ram="4GiB")
    assert repr(plan).startswith("<Plan of linear of 2 models: 38 tensors of 82.5KB, peak RAM ")
    assert repr(plan).endswith(" of 4GiB>")
    result = mergeloom.merge(plan, tmp_path / "out")
    assert repr(result).startswith(f"<Result: merged into '{tmp_path / 'out'}', 78.4KB written in ")
    assert str(result).startswith(f"Merged into {tmp_path / 'out'}\n")
    assert str(mergeloom.merge(plan, tmp_path / "out")) == repr(mergeloom.merge(plan, tmp_path / "out"))  # complete
    assert repr(mergeloom.merge(plan, None)).startswith("<Result: rehearsal, 78.4KB written in ")
    assert repr(plan.recipe) == "<Recipe: linear of 2 models>"
    assert repr(plan.stage) == "<Stage: linear of 2 models>"
    verdict = mergeloom.verify(tmp_path / "out")
    assert repr(verdict) == f"<Verdict OK: 38 tensors of 78.4KB and {verdict.files} files match>"
    (tmp_path / "out" / "chat_template.jinja").write_text("x")
    assert repr(mergeloom.verify(tmp_path / "out")).endswith(" match, 1 added>")
    assert repr(mergeloom.inspect(llamas["a"])) == (
        f"<Inspection of '{llamas['a']}': 38 tensors, 4 layers, 39.2K parameters, 78.4KB>"
    )
    assert repr(mergeloom.methods()["linear"]).startswith("<Method linear: ")
    assert repr(mergeloom.methods()["linear"].parameters[0]).startswith("<Parameter weight for each model: float, ")


def test_the_recipe_of_a_file_with_stages(llamas: dict[str, Path], tmp_path: Path) -> None:
    text = yaml.safe_dump_all(
        [
            {"name": "half", "merge_method": "passthrough", "models": [{"model": str(llamas["a"])}]},
            {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": "half"}], "speed": 9},
        ]
    )
    (tmp_path / "stages.yml").write_text(text)
    plan = mergeloom.plan(tmp_path / "stages.yml")
    assert repr(plan.recipe) == (
        f"<Recipe '{tmp_path / 'stages.yml'}': 2 stages, the last one linear of 1 model, 1 warning>"
    )
    assert repr(plan.recipe.stages[0]) == "<Stage 'half': passthrough of 1 model>"
    assert repr(plan).endswith(", 1 warning>")


def test_nothing_in_a_plan_of_many_tensors_has_a_long_repr(make_model: MakeModel) -> None:
    model = make_model("many", models.tiny_llama(layers=200), fill=None)
    plan = mergeloom.plan({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    assert len(plan.built.graph.outputs) > 1800
    parts = [getattr(plan, field.name) for field in fields(plan)]
    for value in (plan, *parts, plan.layout.shards, plan.built.models[0].checkpoint, mergeloom.inspect(model)):
        assert len(repr(value)) < 1000, type(value)
        assert "\n" not in repr(value)


def test_a_merge_returns_a_plan_that_prints_as_the_dry_run(recipe: dict[str, Any]) -> None:
    result = mergeloom.merge(recipe, None)
    assert isinstance(result, mergeloom.Result)
    assert isinstance(result.plan, mergeloom.Plan)
    assert str(result.plan) == str(mergeloom.plan(recipe))
