"""Pairs of models with different vocabularies: rows as the rules say, files that load, ids that are rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.outputs import config_of, read_model
from tests.support.vocabularies import encoders
from tests.support.vocabularies.encoders import NEW, write_encoders
from tests.support.vocabularies.expected import EMBEDDING, HEAD, Loaded, merged_rows
from tests.support.vocabularies.options import OPTIONS, recipe_of
from tests.support.vocabularies.pairs import PAIRS, TEXTS, write_pair

CPU = Options(device="cpu", threads=1, max_ram=4 << 30)
WEIGHTS = (0.25, 0.75)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models of every pair."""
    directory = tmp_path_factory.mktemp("pairs")
    for name, pair in PAIRS.items():
        write_pair(directory / name, pair)
    return directory


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_rows_and_files(name: str, option: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pairs / name)
    recipe = recipe_of(option, WEIGHTS)
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    result = merge(file, out, CPU)
    models = {side: Loaded.read(Path(side)) for side in ("a", "b")}
    made = read_model(out)
    vocabulary = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
    check_rows(recipe, models, made, vocabulary)
    check_files(out, vocabulary, len(made[EMBEDDING]))
    check_size(option, models, vocabulary, len(made[EMBEDDING]))
    assert result.measured.bytes_read == result.plan.bytes_read


def check_rows(
    recipe: dict[str, Any], models: dict[str, Loaded], made: dict[str, torch.Tensor], vocabulary: dict[str, int]
) -> None:
    """Every token's row is the merge of the models' rows of this token."""
    block = recipe["tokenizer"]
    chosen = block.get("tokens") or {}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    rows = torch.tensor([vocabulary[text] for text in tokens])
    tied = all(HEAD not in model.tensors for model in models.values())
    assert (HEAD in made) == (not tied)
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        wanted = merged_rows(lambda each: 0.25 * each[0] + 0.75 * each[1], name, tokens, models, "a", chosen)
        assert torch.allclose(made[name][rows].double(), wanted, rtol=1e-6, atol=1e-8), name


def check_files(out: Path, vocabulary: dict[str, int], rows: int) -> None:
    """The files load, and agree about every id."""
    assert config_of(out)["vocab_size"] == rows > max(vocabulary.values())
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == vocabulary
    fast = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in TEXTS:
        assert loaded.encode(text, add_special_tokens=False) == fast.encode(text, add_special_tokens=False).ids
    for file in ("config.json", "generation_config.json"):
        content = json.loads((out / file).read_text())
        assert content["bos_token_id"] == vocabulary["<s>"]
        assert content["eos_token_id"] == vocabulary["</s>"]


def check_size(option: str, models: dict[str, Loaded], vocabulary: dict[str, int], rows: int) -> None:
    """The output has a row for each token, rounded up if the recipe says so, or as much padding as a model."""
    needed = max(vocabulary.values()) + 1
    multiple = OPTIONS[option].get("pad_to_multiple_of")
    if multiple:
        assert rows == -(-needed // multiple) * multiple
    else:
        padded = max(len(model.tensors[EMBEDDING]) for model in models.values())
        assert needed <= rows <= max(needed, padded)


@pytest.mark.parametrize("source", ["base", "b"])
def test_the_files_of_one_models_tokenizer_are_copied_byte_for_byte(
    source: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pairs / "reordered")
    merge(recipe_of(f"source {source}", WEIGHTS), tmp_path / "out", CPU)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        own = Path("a" if source == "base" else source) / file
        assert (tmp_path / "out" / file).read_bytes() == own.read_bytes()


def test_a_union_keeps_all_of_the_bases_tokenizer_json_but_its_list(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pairs / "other flags")
    result = merge(recipe_of("union", WEIGHTS), tmp_path / "out", CPU)
    assert any("'<x>' is added with different flags" in warning for warning in result.plan.warnings)
    ours, base = (json.loads((path / "tokenizer.json").read_text()) for path in (tmp_path / "out", Path("a")))
    assert ours["added_tokens"][: len(base["added_tokens"])] == base["added_tokens"]
    new = ours["added_tokens"][len(base["added_tokens"]) :]
    assert [each["content"] for each in new] == ["<y>"]
    assert {**ours, "added_tokens": None} == {**base, "added_tokens": None}


def test_equal_vocabularies_cost_nothing(pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A union of models with one vocabulary has the graph of a merge without a tokenizer."""
    monkeypatch.chdir(pairs / "added tokens")
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "a2", "parameters": {"weight": 1}}]
    Path("a2").symlink_to("a")
    recipe = {"merge_method": "linear", "models": models, "base_model": "a"}
    plain, union = plan(recipe, CPU), plan({**recipe, "tokenizer": {"source": "union"}}, CPU)
    assert union.built.vocabulary is None
    for one, other in zip(plain.built.graph.operations, union.built.graph.operations, strict=True):
        assert (one.method, one.parameters, one.accesses) == (other.method, other.parameters, other.accesses)
    assert (plain.bytes_read, plain.bytes_written) == (union.bytes_read, union.bytes_written)


def test_a_union_of_real_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_encoders(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = merge(recipe_of("union", WEIGHTS), tmp_path / "out", CPU)
    assert not any("tokens of" in warning for warning in result.plan.warnings)
    vocabulary = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert set(tokens[-len(NEW) :]) == set(NEW)
    made = read_model(tmp_path / "out")[encoders.EMBEDDING]
    wanted = encoders.expected_rows(tmp_path, WEIGHTS, tokens)
    assert torch.allclose(made.double(), wanted, rtol=1e-6, atol=1e-8)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == vocabulary
