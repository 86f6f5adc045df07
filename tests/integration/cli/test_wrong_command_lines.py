"""Wrong command lines: the exit code, and a message that says what is wrong and what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cli.wrong import GOOD, Wrong, check, prepare

WRONG = {
    "a misspelt recipe": Wrong(
        "", ("recipe.yaml: no such file; did you mean `recipe.yml`?",), 2, ("plan", "recipe.yaml")
    ),
    "a misspelt model to inspect": Wrong(
        "", ("there is no directory modles/a here; did you mean `models/a`?",), 2, ("inspect", "modles/a")
    ),
    "a recipe that is a config.json": Wrong(
        "", ("models/a/config.json:1: this is a model's config.json, not a recipe\n",), 2,
        ("plan", "models/a/config.json"),
    ),
    "a recipe that is a shard": Wrong(
        "", ("models/a/model.safetensors: this is not a recipe: it is a binary file\n",), 2,
        ("plan", "models/a/model.safetensors"),
    ),
    "a recipe of other keys": Wrong("settings: {a: 1}\n", ("r.yml:1: this is not a recipe\n",)),
    "a model that is a recipe": Wrong(
        "merge_method: linear\n",
        ("r.yml: is not a model: a model is a directory, a .safetensors file, or an index of shards",), 4,
        ("inspect", "r.yml"),
    ),
    "a size with a blank": Wrong(
        GOOD, ("'--max-ram': invalid size '8': a number without a unit counts bytes; use, for example, 8GiB",), 2,
        ("merge", "r.yml", "out", "--max-ram", "8", "GB"),
    ),
    "a machine without a unit": Wrong(
        GOOD, ("--for ram=64: invalid size '64': a number without a unit counts bytes; use, for example, 64GiB",), 2,
        ("plan", "r.yml", "--for", "ram=64"),
    ),
    "--set without =": Wrong(
        GOOD, ("'--set': 'dtype' has no value: use KEY=VALUE, such as dtype=bfloat16",), 2,
        ("plan", "r.yml", "--set", "dtype", "bfloat16"),
    ),
    "--set of an unknown parameter": Wrong(
        GOOD, ("r.yml with --set parameters.normalise=false: parameters.normalise: linear has no such parameter",), 0,
        ("plan", "r.yml", "--set", "parameters.normalise=false"),
    ),
    "--set of an invalid list": Wrong(
        GOOD, ("r.yml with --set models=[{modl: models/a}]: models[0].modl: unknown key; did you mean `model`?",), 2,
        ("plan", "r.yml", "--set", "models=[{modl: models/a}]"),
    ),
    "a mistake in the file next to --set": Wrong(
        f"{GOOD}dtype: bf16\n", ("r.yml:5: dtype: unknown dtype 'bf16'; did you mean `bfloat16`?",), 2,
        ("plan", "r.yml", "--set", "parameters.normalize=false"),
    ),
    "no OUT": Wrong(
        GOOD, ("Missing argument 'OUT'. Name a new directory: mergeloom merge RECIPE OUT. Only --dry-run",), 2,
        ("merge", "r.yml"),
    ),
    "OUT before RECIPE": Wrong(
        GOOD, ("out does not exist, and r.yml is a file: RECIPE comes first, then OUT",), 2, ("merge", "out", "r.yml")
    ),
    "a misspelt option": Wrong(
        GOOD, ("No such option '--devise'. Did you mean '--device'?",), 2, ("plan", "r.yml", "--devise", "cpu")
    ),
    "an option that resembles none": Wrong(
        GOOD, ("No such option '--hurry'.\n",), 2, ("merge", "r.yml", "out", "--hurry")
    ),
    "an option of another command": Wrong(
        GOOD, ("--steps is not an option of merge, only of plan\n",), 2, ("merge", "r.yml", "out", "--steps")
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrong")
    prepare(path)
    return path


@pytest.mark.parametrize("wrong", [pytest.param(each, id=name) for name, each in WRONG.items()])
def test_what_is_wrong_and_what_to_write(
    wrong: Wrong, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(wrong, models, monkeypatch, capsys)
