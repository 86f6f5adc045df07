"""Published recipes that name a tokenizer, on models whose vocabularies differ: values against the float64 reference.

The reference evaluates the recipe on models whose embeddings are rearranged beforehand, by an independent program.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from tests.support.outputs import read_model
from tests.support.published.compare import compare
from tests.support.published.evaluate import evaluate
from tests.support.published.library import Library
from tests.support.published.other_families import FAMILIES
from tests.support.published.table import CASES, Case
from tests.support.vocabularies.expected import EMBEDDING, HEAD, Loaded, rows_of

CPU = Options(device="cpu", threads=1, max_ram=4 << 30)
ADDED = ((), ("<one>",), ("<two>", "<both>"), ("<both>", "<one>", "<three>"))
"""Tokens that are added to the first models; those of later ones are the first's."""


def named(case: Case) -> bool:
    """Whether a recipe that merges names a tokenizer."""
    documents = [] if case.rejected else yaml.safe_load_all(case.text)
    return any(key.startswith("tokenizer") for document in documents for key in document)


NAMED = [case for case in CASES if named(case)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The models that the recipes name."""
    return Library(tmp_path_factory.mktemp("published"))


def with_other_vocabulary(model: Path, path: Path, number: int) -> Path:
    """Write a copy of a model whose embeddings have a row for each token, some of which are new."""
    shutil.copytree(model, path)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    added = ADDED[number] if number < len(ADDED) else ()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in added])
    tokenizer.save(str(path / "tokenizer.json"))
    rows = max(tokenizer.get_vocab().values()) + 1
    tensors = read_model(model)
    generator = torch.Generator().manual_seed(number)
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            table = tensors[name][:rows]
            new = torch.randn(rows - len(table), table.shape[1], generator=generator) * 0.02
            tensors[name] = torch.cat([table, new.to(table.dtype)]).contiguous()
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"vocab_size": rows}
    (path / "config.json").write_text(json.dumps(config))
    return path


def rearranged(name: str, paths: dict[str, Path], out: Path, base: str | None) -> dict[str, Tensor]:
    """A model's tensors, with the rows of the output's tokens in their order."""
    models = {each: Loaded.read(path) for each, path in paths.items()}
    vocabulary = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert [vocabulary[text] for text in tokens] == list(range(len(tokens)))
    tensors = read_model(paths[name])
    for tensor in (EMBEDDING, HEAD):
        if tensor in tensors:
            tensors[tensor] = rows_of(name, tensor, tokens, models, base, {})
    return tensors


def test_all_of_them_are_here() -> None:
    assert {case.recipe for case in NAMED} == {
        *("001", "002", "004", "005", "008", "010", "017", "020", "029", "071", "092", "104", "107")
    }


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_values_of_a_published_recipe_with_different_vocabularies(
    case: Case, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    linked = library.link(case, tmp_path / "library")
    paths = {
        name: with_other_vocabulary(path, tmp_path / "models" / name, number)
        for number, (name, path) in enumerate(linked.items())
    }
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(case.text)
    result = merge(recipe, tmp_path / "out", CPU)
    assert result.plan.built.vocabulary is not None
    base = yaml.safe_load(case.text).get("base_model")
    stored = {name: rearranged(name, paths, tmp_path / "out", base) for name in paths}
    compare(read_model(tmp_path / "out"), evaluate(case.text, stored.__getitem__, FAMILIES[case.family].stack))
