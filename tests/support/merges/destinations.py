"""Small merges into OUT in every state: finished, unfinished, and in use by another merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeloom import __main__
from mergeloom.engine.run import planning
from mergeloom.engine.run.merge import merge
from mergeloom.io.output.directory import OutputDirectory
from mergeloom.io.output.journal import Journal
from mergeloom.io.output.lock import MANIFEST, Content, classify
from tests.support.faults import Stopped
from tests.support.models import write_checkpoint

OPTIONS = planning.Options(max_ram=4 << 30, device="cpu", threads=1)
SHAPES = {f"model.layers.{layer}.w.weight": (64, 50) for layer in range(2)} | {"model.norm.weight": (50,)}


def write_models(directory: Path) -> list[Path]:
    """Write two models to a directory."""
    return [write_checkpoint(directory / name, SHAPES, dtype="F32", fill=seed) for seed, name in enumerate("ab")]


def recipe_of(models: list[Path], weight: float = 1.0, method: str = "linear") -> dict[str, Any]:
    named = [{"model": str(model), "parameters": {"weight": weight}} for model in models]
    return {"merge_method": method, "models": named}


def write_recipe(models: list[Path], directory: Path) -> Path:
    """Write a recipe for the mean of two models."""
    path = directory / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe_of(models)))
    return path


def interrupted(recipe: Any, out: Path) -> None:
    """Merge until the first group of bytes is durable."""
    append = Journal.append

    def stop(self: Journal, records: Any) -> None:
        append(self, records)
        if self.records > 1:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(Stopped):
            merge(recipe, out, OPTIONS, group_bytes=1)
    assert classify(out).content is Content.UNFINISHED


@contextmanager
def in_use(out: Path) -> Iterator[None]:
    """Another merge at work in OUT."""
    held = OutputDirectory.open(out, MANIFEST)
    try:
        yield
    finally:
        held.close()


def run(command: str, recipe: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """A command's exit code and what it says on stderr."""
    capsys.readouterr()
    merges = command in ("merge", "plan")
    code = __main__.main(
        [command, *([str(recipe)] if merges else []), str(out), *(["--quiet"] if command == "merge" else [])]
    )
    return code, capsys.readouterr().err


def make(content: str, recipe: Any, out: Path) -> None:
    """Make a directory of a kind."""
    if content == "finished":
        merge(recipe, out, OPTIONS)
    elif content in ("unfinished", "in use"):
        interrupted(recipe, out)
    elif content == "foreign":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    elif content == "a file":
        out.write_text("mine")
    elif content == "empty":
        out.mkdir()
