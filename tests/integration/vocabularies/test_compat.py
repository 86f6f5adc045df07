"""Pairs of models with different vocabularies: the same rows and the same tokenization as mergekit 0.1.5.

Run by `make compat`, or with MERGEKIT_ENV. mergekit numbers the tokens that a union adds in any order, so rows are
compared by token. Documented differences: padding rows, and, without `pad_to_multiple_of`, their number; and tokens
that are only under `tokens`, with the base's tokenizer: mergekit fails, or takes the base's padding rows for them.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from tests.support.mergekit.environment import MERGEKIT, RUN
from tests.support.outputs import read_model
from tests.support.vocabularies.encoders import write_encoders
from tests.support.vocabularies.options import OPTIONS, recipe_of
from tests.support.vocabularies.pairs import PAIRS, TEXTS, write_pair

CPU = Options(device="cpu", threads=1, max_ram=4 << 30)
NEW_WITH_BASE = "base, with tokens"
ROUNDING = 4e-6
"""How far results may lie apart, of the largest value of a tensor: some of float32's last bits."""


@dataclass(frozen=True)
class Theirs:
    """What mergekit made of every recipe.

    Args:
        pairs: directory with the models.
        errors: by pair and option, None where it made something.
        outputs: where that is.
    """

    pairs: Path
    errors: dict[str, str | None]
    outputs: dict[str, Path]


def mergekit(jobs: list[dict[str, str]], directory: Path) -> dict[str, str | None]:
    """Run mergekit on some recipes in a directory; returns what became of each: None, or the error."""
    python = MERGEKIT / "bin" / "python"
    if not python.exists():
        pytest.skip(f"mergekit 0.1.5 is not in {MERGEKIT.name}: `make compat` installs it, or set MERGEKIT_ENV")
    command = [str(python), "-I", str(RUN)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, cwd=directory, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("mergekit") == "0.1.5"
    return said


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """Run mergekit, once for all recipes."""
    directory = tmp_path_factory.mktemp("mergekit")
    jobs, outputs = [], {}
    for number, (name, pair) in enumerate(PAIRS.items()):
        write_pair(directory / "pairs" / name, pair)
        for place, option in enumerate(OPTIONS):
            key, out = f"{name} / {option}", directory / "out" / f"{number}-{place}"
            outputs[key] = out
            text = yaml.safe_dump(recipe_of(option, (0.25, 0.75), within=f"{name}/"))
            jobs.append({"name": key, "text": text, "out": str(out)})
    said = mergekit(jobs, directory / "pairs")
    return Theirs(directory / "pairs", said, outputs)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_rows_and_tokenization_are_mergekits(
    name: str, option: str, theirs: Theirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = theirs.errors[f"{name} / {option}"]
    if error is not None:
        assert option == NEW_WITH_BASE
        assert error.startswith("KeyError: ")
        return
    other = theirs.outputs[f"{name} / {option}"]
    monkeypatch.chdir(theirs.pairs)
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe_of(option, (0.25, 0.75), within=f"{name}/")))
    merge(file, tmp_path / "out", CPU)
    tokenizers = [Tokenizer.from_file(str(out / "tokenizer.json")) for out in (tmp_path / "out", other)]
    ours, rows = (tokenizer.get_vocab() for tokenizer in tokenizers)
    assert ours.keys() == rows.keys()
    for text in TEXTS:
        one, two = (tokenizer.encode(text, add_special_tokens=False).tokens for tokenizer in tokenizers)
        assert one == two
    made, found = read_model(tmp_path / "out"), read_model(other)
    assert made.keys() == found.keys()
    new = OPTIONS[option].get("tokens", {}).keys() if option == NEW_WITH_BASE else ()
    base = Tokenizer.from_file(f"{name}/a/tokenizer.json").get_vocab()
    tokens = [text for text in ours if text not in new or text in base]
    for tensor in made:
        mine, other_rows = made[tensor], found[tensor]
        if len(made[tensor]) >= len(ours) and tensor in ("model.embed_tokens.weight", "lm_head.weight"):
            mine = mine[torch.tensor([ours[text] for text in tokens])]
            other_rows = other_rows[torch.tensor([rows[text] for text in tokens])]
        assert torch.allclose(mine, other_rows, rtol=0, atol=ROUNDING * float(other_rows.abs().max())), tensor


def test_mergekit_has_no_union_for_encoders(tmp_path: Path) -> None:
    """It fails on tensors with several names, as BERT's embedding; test_pairs.py has the values."""
    write_encoders(tmp_path)
    recipe = yaml.safe_dump(recipe_of("union", (0.25, 0.75)))
    (failed,) = mergekit([{"name": "union", "text": recipe, "out": "theirs"}], tmp_path).values()
    assert failed == 'TypeError: can only concatenate list (not "tuple") to list'
