"""A wrong recipe or command line, and the comparison of what mergeloom prints with what it should say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mergeloom.__main__ import main
from tests.support import models


@dataclass(frozen=True)
class Wrong:
    """A wrong recipe or command line.

    Args:
        recipe: text of ``r.yml``.
        says: parts of what `plan` prints, in their order.
        code: the exit code; 0 if it is a warning.
        arguments: the command line.
    """

    recipe: str
    says: tuple[str, ...]
    code: int = 2
    arguments: tuple[str, ...] = ("plan", "r.yml")


A = "- {model: models/a, parameters: {weight: 1}}\n"
B = "- {model: models/base, parameters: {weight: 1}}\n"
SOURCES = "merge_method: passthrough\nslices:\n- sources:\n"
GOOD = f"merge_method: linear\nmodels:\n{A}{B}"
TIES = "merge_method: ties\nbase_model: models/base\nmodels:\n- {model: models/a, parameters: {weight: 1}}\n"


def prepare(directory: Path) -> None:
    """Write the models that the recipes name, and a recipe with another name."""
    for seed, name in enumerate(("a", "base")):
        model = models.tiny_llama()
        models.write_checkpoint(directory / "models" / name, model, fill=seed)
    (directory / "models" / "gguf").mkdir()
    (directory / "models" / "gguf" / "q4.gguf").write_bytes(b"GGUF")
    (directory / "recipe.yml").write_text("merge_method: linear\nmodels: [{model: models/a}]\n")


def check(wrong: Wrong, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the command line in the directory of the models, and compare what it prints."""
    monkeypatch.chdir(directory)
    (directory / "r.yml").write_text(wrong.recipe)
    code = main([*wrong.arguments])
    printed = capsys.readouterr()
    said = printed.err if wrong.code else printed.out
    assert code == wrong.code, printed.err
    assert "Traceback" not in said
    position = 0
    for part in wrong.says:
        assert part in said[position:], said
        position = said.index(part, position)
