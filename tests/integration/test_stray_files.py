"""Weight files next to those that are used: `plan` and `merge` list them, and warn where other programs load them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from mergeloom import __main__
from tests.support.models import tiny_llama, write_checkpoint


def run(*arguments: object) -> tuple[int, str, str]:
    """Run mergeloom; returns exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = __main__.main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def write_recipe(directory: Path, model: Path) -> Path:
    path = directory / "recipe.yml"
    path.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    return path


def not_used(text: str) -> list[str]:
    """The lines of the section with input that is not used."""
    return [line.strip() for line in text.partition("Not used\n")[2].partition("\n\n")[0].splitlines()]


LAYOUTS: Mapping[str, tuple[int | None, str, str]] = {
    "stale shard": (20_000, "model-00009-of-00009", "is not in model.safetensors.index.json"),
    "single file": (20_000, "model", "is not in model.safetensors.index.json"),
    "no index": (None, "old", "is not read: the weights are in model.safetensors"),
    "no index, copy": (None, "consolidated", "is not read: the weights are in model.safetensors"),
}


@pytest.mark.parametrize(("shard_bytes", "stray", "reason"), LAYOUTS.values(), ids=LAYOUTS)
def test_plan_and_merge_list_them(shard_bytes: int | None, stray: str, reason: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "a", tiny_llama(layers=2), shard_bytes=shard_bytes)
    file = model / f"{stray}.safetensors"
    shutil.copy(next(model.glob("model*.safetensors")), file)
    recipe = write_recipe(tmp_path, model)
    line = f"{model}: {file.name} {reason}"
    for command in (("plan", recipe), ("merge", recipe, tmp_path / "out")):
        code, out, err = run(*command)
        assert (code, not_used(f"{out}\n\n{err}")) == (0, [line]), out + err
        assert ("index" in out + err) == (shard_bytes is not None)
        assert ("transformers loads it instead" in out + err) == (stray == "model")


def test_strict_rejects_a_file_that_transformers_loads_instead(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "a", tiny_llama(layers=2), shard_bytes=20_000)
    shutil.copy(next(model.glob("model*.safetensors")), model / "model.safetensors")
    code, _, err = run("plan", write_recipe(tmp_path, model), "--strict")
    assert code == 4
    assert "model.safetensors is not in model.safetensors.index.json and is not used, but transformers loads it" in err


def test_an_index_without_the_last_shard_is_a_warning_and_an_error_in_strict_mode(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "a", tiny_llama(layers=2), shard_bytes=20_000)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = max(content["weight_map"].values())
    total = len(set(content["weight_map"].values()))
    content["weight_map"] = {name: shard for name, shard in content["weight_map"].items() if shard != last}
    index.write_text(json.dumps(content))
    recipe = write_recipe(tmp_path, model)
    problem = f"{index.name} lists only {total - 1} of {total} files"
    for command in (("plan", recipe), ("merge", recipe, tmp_path / "out")):
        code, out, err = run(*command)
        assert code == 0
        assert problem in out + err
    code, _, err = run("plan", recipe, "--strict")
    assert code == 4
    assert problem in err
