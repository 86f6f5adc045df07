"""User mistakes: each ends with its exit code, one clear message, and no partial model."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mergeloom.__main__ import main
from tests.support import models

Prepare = Callable[[Path], object]
"""Makes a mistake in a directory with the models ``a`` and ``b``; returns the recipe, as data or as YAML."""


@dataclass(frozen=True)
class Mistake:
    """A mistake, and how mergeloom takes it.

    Args:
        code: the exit code.
        says: what the message must contain.
        make: makes it.
        found_by_plan: whether the dry run finds it, too.
    """

    code: int
    says: tuple[str, ...]
    make: Prepare
    found_by_plan: bool = True


def linear(*names: str) -> dict[str, object]:
    """A recipe for the mean of these models."""
    return {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}} for name in names]}


def stacked(*layer_range: object) -> dict[str, object]:
    """A recipe that passes layers of one model through."""
    return {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [*layer_range]}]}]}


def header_of(shard: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    """Return the header of a shard, and its data."""
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def misspelt_method(directory: Path) -> object:
    return {**linear("a", "b"), "merge_method": "liner"}


def misspelt_models(directory: Path) -> object:
    recipe = linear("a", "b")
    recipe["modells"] = recipe.pop("models")
    return recipe


def misspelt_slices(directory: Path) -> object:
    recipe = stacked(0, 2)
    recipe["slizes"] = recipe.pop("slices")
    return recipe


def other_shape(directory: Path) -> object:
    models.write_checkpoint(directory / "wide", models.tiny_llama(hidden=64))
    return linear("a", "wide")


def other_vocabulary(directory: Path) -> object:
    models.write_checkpoint(directory / "more", models.tiny_llama(vocabulary=72))
    return linear("a", "more")


def truncated_shard(directory: Path) -> object:
    shard = sorted((directory / "a").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return linear("a", "b")


def lying_header(directory: Path) -> object:
    shard = sorted((directory / "a").glob("*.safetensors"))[0]
    header, data = header_of(shard)
    entry = next(entry for name, entry in header.items() if name != "__metadata__")
    begin, end = entry["data_offsets"]  # type: ignore[misc]
    entry["data_offsets"] = [begin + 2, end + 2]
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return linear("a", "b")


def leaving_index(directory: Path) -> object:
    index = directory / "a" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../b/model-00001-of-00002.safetensors")
    index.write_text(json.dumps(content))
    return linear("a", "b")


def only_pickles(directory: Path) -> object:
    old = directory / "old"
    old.mkdir()
    (old / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": [1.0]}))
    shutil.copy(directory / "a" / "config.json", old)
    return linear("a", "old")


def alias_bomb(directory: Path) -> object:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join([*lines, "merge_method: linear", "models: *a11"])


def integers_that_differ(directory: Path) -> object:
    tensors = {"model.layers.0.count": (64,), "model.layers.0.w.weight": (64, 64)}
    dtypes = {"model.layers.0.count": "I32", "model.layers.0.w.weight": "BF16"}
    for number, name in enumerate(("one", "two")):
        models.write_checkpoint(directory / name, tensors, dtype=dtypes, fill=number)
    return linear("one", "two")


def not_a_number(directory: Path) -> object:
    def fill(name: str, start: int, count: int) -> models.Values:
        values = models.Random(0)(name, start, count).copy()
        values[0] = float("nan") if name == "model.norm.weight" else values[0]
        return values

    models.write_checkpoint(directory / "sick", models.tiny_llama(), fill=fill)
    return linear("a", "sick")


MISTAKES = {
    "a missing model": Mistake(4, ("nowhere", "no such directory"), lambda d: linear("a", "nowhere")),
    "a layer_range past the end": Mistake(2, ("slices[0]", "[2, 9]", "4 layers"), lambda d: stacked(2, 9)),
    "an empty layer_range": Mistake(2, ("layer_range", "[2, 2]", "empty"), lambda d: stacked(2, 2)),
    "a layer_range that is none": Mistake(2, ("layer_range", "'all'"), lambda d: stacked("all")),
    "a misspelt merge_method": Mistake(2, ("'liner'", "did you mean `linear`?"), misspelt_method),
    "a misspelt models": Mistake(2, ("modells", "did you mean `models`?"), misspelt_models),
    "a misspelt slices": Mistake(2, ("slizes", "did you mean `slices`?"), misspelt_slices),
    "a missing weight": Mistake(
        2, ("weight", "`parameters`"), lambda d: {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
    ),
    "inputs of different shape": Mistake(4, ("shape", "a", "wide"), other_shape),
    "vocabularies that differ": Mistake(4, ("vocabular", "64", "72"), other_vocabulary),
    "a truncated shard": Mistake(4, ("model-00002-of-00002.safetensors",), truncated_shard),
    "a header that lies about offsets": Mistake(4, ("model-00001-of-00002.safetensors",), lying_header),
    "an index that names ../x": Mistake(4, ("model.safetensors.index.json", "../b", "leads out of"), leaving_index),
    "a pickle of another program": Mistake(4, ("pytorch_model.bin", "was not written by torch.save"), only_pickles),
    "a YAML alias bomb": Mistake(2, ("recipe.yml", "aliases"), alias_bomb),
    "an empty recipe": Mistake(2, ("recipe.yml", "empty"), lambda d: ""),
    "no YAML": Mistake(2, ("recipe.yml:2",), lambda d: "merge_method: linear\nmodels: [\n"),
    "integers that differ": Mistake(4, ("model.layers.0.count", "I32", "one", "two"), integers_that_differ, False),
    "a NaN": Mistake(4, ("model.norm.weight", "sick", "allow_nonfinite"), not_a_number, False),
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the models a and b."""
    for seed, name in enumerate("ab"):
        model = models.tiny_llama()
        models.write_checkpoint(tmp_path / name, model, shard_bytes=model.parameters * 3 // 2, fill=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(directory: Path, recipe: object) -> None:
    """Write ``recipe.yml``."""
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
    (directory / "recipe.yml").write_text(text)


def check(code: int, mistake: Mistake, said: pytest.CaptureResult[str]) -> None:
    """The exit code, one message, and no traceback."""
    assert code == mistake.code, said.err
    assert "Traceback" not in said.err
    assert said.err.count("mergeloom: ") == 1
    message = said.err[said.err.index("mergeloom: ") :]
    for words in mistake.says:
        assert words in message


@pytest.mark.parametrize("mistake", [pytest.param(m, id=name) for name, m in MISTAKES.items() if m.found_by_plan])
def test_plan_says_so(mistake: Mistake, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(directory, mistake.make(directory))
    code = main(["plan", "recipe.yml"])
    said = capsys.readouterr()
    check(code, mistake, said)
    assert said.out == ""


@pytest.mark.parametrize("mistake", [pytest.param(m, id=name) for name, m in MISTAKES.items()])
def test_merge_says_so_and_leaves_nothing(
    mistake: Mistake, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(directory, mistake.make(directory))
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    code = main(["merge", "recipe.yml", "out", "--quiet"])
    check(code, mistake, capsys.readouterr())
    assert not (directory / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before


def foreign_directory(directory: Path) -> None:
    (directory / "out").mkdir()
    (directory / "out" / "thesis.tex").write_text("irreplaceable")


def foreign_file(directory: Path) -> None:
    (directory / "out").write_text("irreplaceable")


def foreign_model(directory: Path) -> None:
    shutil.copytree(directory / "b", directory / "out")


@pytest.mark.parametrize("command", ["plan", "merge"])
@pytest.mark.parametrize("occupy", [foreign_directory, foreign_file, foreign_model])
def test_an_out_that_holds_something_else(
    command: str, occupy: Callable[[Path], None], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(directory, linear("a", "b"))
    occupy(directory)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    code = main([command, "recipe.yml", "out", *(["--quiet"] if command == "merge" else [])])
    check(code, Mistake(2, ("out", "OUT must be a new or empty directory"), lambda d: None), capsys.readouterr())
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_an_out_that_is_an_input(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(directory, linear("a", "b"))
    assert main(["merge", "recipe.yml", "a", "--quiet"]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--max-ram", "10MB"], 3, ("smallest budget that works", "--max-ram")),
        (["--max-ram", "many"], 2, ("'many'", "32GiB")),
        (["--shard-size", "0"], 2, ("--shard-size", "more than 0")),
        (["--shard-size", "100"], 2, ("--shard-size", "too small")),
        (["--threads", "0"], 2, ("--threads",)),
        (["--device", "gpu"], 2, ("gpu", "cuda:0")),
        (["--device", "cuda:77"], 2, ("cuda:77", "--device cpu")),
        (["--devise", "cpu"], 2, ("--devise", "--device")),
    ],
)
def test_options_that_are_wrong(
    arguments: list[str], code: int, says: tuple[str, ...], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(directory, linear("a", "b"))
    assert main(["plan", "recipe.yml", *arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    for words in says:
        assert words in said.err


def test_strict_makes_an_unknown_parameter_an_error(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(directory, {**linear("a", "b"), "parameters": {"normalise": False}})
    assert main(["plan", "recipe.yml"]) == 0
    assert "did you mean `normalize`?" in capsys.readouterr().out
    assert main(["plan", "recipe.yml", "--strict"]) == 2
    assert "did you mean `normalize`?" in capsys.readouterr().err


def test_a_misspelt_parameter_that_is_required_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = linear("a", "b")
    for model in recipe["models"]:
        model["parameters"] = {"wieght": 1.0}
    write_recipe(directory, recipe)
    assert main(["plan", "recipe.yml"]) == 2
    said = capsys.readouterr().err
    assert "`weight` has no value" in said
    assert "is it misspelt? recipe.yml:5: models[0].parameters.wieght: linear has no such parameter\n" in said
    assert main(["plan", "recipe.yml", "--strict"]) == 2
    said = capsys.readouterr().err
    assert "linear has no such parameter; did you mean `weight`?" in said


def test_a_filter_that_fits_no_tensor_is_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = linear("a", "b")
    for model in recipe["models"]:
        model["parameters"] = {
            "weight": [{"filter": "self_attn", "value": 0.2}, {"filter": "mpl", "value": 0.5}, {"value": 0.3}]
        }
    write_recipe(directory, recipe)
    assert main(["plan", "recipe.yml"]) == 0
    said = capsys.readouterr().out
    assert "filter 'mpl' matches no tensor name: its value is not used" in " ".join(said.split())
    assert "'self_attn' fits" not in said
