"""Failures that other tools have had when they merged models with different vocabularies, one test each."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.methods.kernel.access.row_index import RowIndex
from tests.support.outputs import config_of, read_model
from tests.support.vocabularies.expected import EMBEDDING, HEAD
from tests.support.vocabularies.pairs import byte_level, reordered, with_tokens, write_model

CPU = Options(device="cpu", threads=1)


def linear(*models: Path, weights: tuple[float, ...] = (0.5, 0.5), **more: Any) -> dict[str, Any]:
    """A linear merge in float32."""
    entries = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    return {"merge_method": "linear", "models": entries, "base_model": str(models[0]), "dtype": "float32", **more}


def vocabulary(path: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab())


def test_a_dense_permutation_matrix() -> None:
    """A matrix of 64,000 x 64,000 numbers takes 16 GB. An index of all rows in random order takes 1 MB."""
    rows = list(range(64_000))
    random.Random(0).shuffle(rows)
    tracemalloc.start()
    index = RowIndex(rows)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == 64_000
    assert kept < 2 << 20
    assert peak < 8 << 20


@pytest.mark.parametrize("source", ["union", "base"])
def test_padding_rows_cut_off(source: str, tmp_path: Path) -> None:
    """The output has the base's 384 rows, so it merges with other models of the family without a tokenizer key."""
    a = write_model(tmp_path / "a", byte_level(), 1, rows=384)
    b = write_model(tmp_path / "b", with_tokens(byte_level(), "<y>"), 2)
    merge(linear(a, b, tokenizer={"source": source}), tmp_path / "out", CPU)
    made, base = read_model(tmp_path / "out"), read_model(a)
    assert len(made[EMBEDDING]) == config_of(tmp_path / "out")["vocab_size"] == 384
    assert torch.equal(made[EMBEDDING][310:], base[EMBEDDING][310:])  # padding in both models: a's
    if source == "base":
        assert plan(linear(a, tmp_path / "out"), CPU).warnings == ()


def test_nan_rows_for_tokens_that_no_model_has(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", byte_level(), 1)
    b = write_model(tmp_path / "b", with_tokens(reordered(byte_level(), 7), "<alone>"), 2, rows=300)
    result = merge(linear(a, b, tokenizer={"source": str(b)}), tmp_path / "out", CPU)
    (warning,) = (each for each in result.plan.warnings if "zeros" in each)
    assert warning.startswith("no model has an embedding for '<alone>': zeros are used")
    made = read_model(tmp_path / "out")
    row = vocabulary(tmp_path / "out")["<alone>"]
    for name in (EMBEDDING, HEAD):
        assert torch.equal(made[name][row], torch.zeros_like(made[name][row]))
        assert bool(made[name].isfinite().all())


def test_a_tokenizer_loaded_and_saved_again(tmp_path: Path) -> None:
    """The library gives this file's last token another id when it loads it; the copy keeps the file's bytes."""
    a = write_model(tmp_path / "a", byte_level(), 1, rows=320)
    content = json.loads((a / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 310, "content": "<late>"})
    (a / "tokenizer.json").write_text(json.dumps(content))
    b = write_model(tmp_path / "b", byte_level(), 2)
    assert vocabulary(a)["<late>"] != 310
    merge(linear(a, b, tokenizer_source="base"), tmp_path / "out", CPU)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    made = read_model(tmp_path / "out")[EMBEDDING]
    assert torch.equal(made[310], read_model(a)[EMBEDDING][310])


def test_different_added_tokens_in_the_same_rows_averaged(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", with_tokens(byte_level(), "<x>"), 1)
    b = write_model(tmp_path / "b", with_tokens(byte_level(), "<p>"), 2)
    assert vocabulary(a)["<x>"] == vocabulary(b)["<p>"] == 300
    merge(linear(a, b, tokenizer={"source": "union"}), tmp_path / "out", CPU)
    made, rows = read_model(tmp_path / "out")[EMBEDDING], vocabulary(tmp_path / "out")
    assert torch.equal(made[rows["<x>"]], read_model(a)[EMBEDDING][300])
    assert torch.equal(made[rows["<p>"]], read_model(b)[EMBEDDING][300])


def test_rows_of_common_tokens_that_are_not_the_merge_of_the_inputs_rows(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", byte_level(), 1)
    b = write_model(tmp_path / "b", reordered(with_tokens(byte_level(), "<y>"), 41), 2)
    merge(linear(a, b, weights=(0.25, 0.75), tokenizer={"source": "union"}), tmp_path / "out", CPU)
    made, one, other = (read_model(path)[EMBEDDING].double() for path in (tmp_path / "out", a, b))
    rows, ours, theirs = (vocabulary(path) for path in (tmp_path / "out", a, b))
    for text in ours.keys() & theirs.keys():
        wanted = 0.25 * one[ours[text]] + 0.75 * other[theirs[text]]
        assert torch.allclose(made[rows[text]], wanted, rtol=1e-6, atol=1e-9), text


def test_the_rows_of_the_embedding_used_for_the_head(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", byte_level(), 1)
    b = write_model(tmp_path / "b", with_tokens(byte_level(), "<y>"), 2)
    merge(linear(a, b, tokenizer={"source": "union"}), tmp_path / "out", CPU)
    made, other, row = read_model(tmp_path / "out"), read_model(b), vocabulary(tmp_path / "out")["<y>"]
    assert not torch.equal(other[EMBEDDING][300], other[HEAD][300])
    assert torch.equal(made[EMBEDDING][row], other[EMBEDDING][300])
    assert torch.equal(made[HEAD][row], other[HEAD][300])


def test_a_dummy_model_with_weight_0_to_have_another_tokenizer(tmp_path: Path) -> None:
    """One model is enough. Of a model that is the base only, the rows are read that the others lack."""
    a = write_model(tmp_path / "a", byte_level(), 1)
    b = write_model(tmp_path / "b", with_tokens(byte_level(), "<y>"), 2)
    single = {"merge_method": "passthrough", "models": [{"model": str(a)}]}
    merge({**single, "tokenizer": {"pad_to_multiple_of": 64}}, tmp_path / "padded", CPU)
    assert len(read_model(tmp_path / "padded")[EMBEDDING]) == 320
    with_base = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(a), "layer_range": [0, 1]}]}],
        "base_model": str(b),
    }
    result = merge({**with_base, "tokenizer": {"source": "union"}}, tmp_path / "out", CPU)
    made, lent = read_model(tmp_path / "out"), read_model(b)
    assert torch.equal(made[EMBEDDING], torch.cat([read_model(a)[EMBEDDING], lent[EMBEDDING][300:]]))
    own = sum(tensor.nbytes for tensor in read_model(a).values())
    assert result.plan.bytes_read == own + 2 * lent[EMBEDDING][300].nbytes
