"""Errors about tokenizers and vocabularies begin with the line that names the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command_line import run
from tests.support.vocabularies.pairs import OTHER, byte_level, reordered, with_tokens, write_model


def _broken(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


def _without(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()


def _gap(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    late = {**content["added_tokens"][0], "id": 330, "content": "<late>"}
    (model / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], late]}))


def _none(model: Path) -> None:
    """Nothing is wrong with the files."""


CASES: dict[str, tuple[Callable[[Path], None], int, str, int, str]] = {
    "broken, union": (_broken, 320, "tokenizer_source: union", 5, "models[1].model: {b}/tokenizer.json: is not valid"),
    "broken": (_broken, 300, "", 5, "models[1].model: {b}/tokenizer.json: is not valid JSON"),
    "no tokenizer": (_without, 320, "tokenizer_source: base", 5, "models[1].model: {b} has no tokenizer files"),
    "no tokenizer, union": (_without, 320, "tokenizer_source: union", 5, "models[1].model: tensor model.embed_tokens"),
    "gaps": (_gap, 320, "tokenizer_source: union", 2, "base_model: {b}: tokenizer.json numbers 301 tokens up to 330"),
    "unrelated": (_none, 300, "", 5, "models[1].model: the vocabularies of {a} and {b} are unrelated"),
}
"""By case: what is done to the second model, its rows, the recipe's key, and the line and the text of the error."""


@pytest.mark.parametrize("case", CASES)
def test_errors_have_the_line_of_the_model(case: str, tmp_path: Path) -> None:
    change, rows, key, line, message = CASES[case]
    tokens = with_tokens(reordered(byte_level(), 7), "<y>") if rows > 300 else byte_level(OTHER, 300, ("<q>", "<r>"))
    a = write_model(tmp_path / "a", byte_level(), 1)
    b = write_model(tmp_path / "b", byte_level() if case == "gaps" else tokens, 2, rows=rows)
    change(b)
    base = b if case == "gaps" else a
    recipe = tmp_path / "r.yml"
    head = f"merge_method: linear\nbase_model: {base}\nmodels:\n"
    entries = "".join(f"- {{model: {each}, parameters: {{weight: 0.5}}}}\n" for each in (a, b))
    recipe.write_text(f"{head}{entries}{key}\n")
    if case == "gaps":  # the other model has tokens to add
        write_model(a, tokens, 1, rows=rows)
    ended = run("plan", recipe)
    assert ended.returncode == 4, ended.stderr
    assert f"mergeloom: {recipe}:{line}: {message.format(a=a, b=b)}" in ended.stderr, ended.stderr
