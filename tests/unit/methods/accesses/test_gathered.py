"""Rows of several tables: the bits of a row of one table stay, and means are sums in order, divided by the count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from tests.support import models
from tests.support.models.tokenizers import write_vocabulary
from tests.support.outputs import read_model

CPU = Options(device="cpu", threads=1)
EMBEDDING = "model.embed_tokens.weight"


def write(path: Path, tokens: list[str], table: torch.Tensor, seed: int) -> str:
    """A tiny tied Llama with this embedding."""
    shape = models.tiny_llama(tied=True, vocabulary=len(table))
    filled = dict(models.tiny_llama(tied=True, vocabulary=len(table)).tensors)
    written = models.write_checkpoint(path, models.Model({**filled, EMBEDDING: table}, shape.config), fill=seed)
    write_vocabulary(written, tokens)
    return str(written)


def table_of(rows: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, 32, generator=generator).to(dtype)
    table[:, 0] = -0.0
    table[:, 1] = 0.0
    return table


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_of_another_model_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """`passthrough` of the first model in a union: own rows, and the other's rows, zeros with their signs included."""
    one, other = table_of(3, 1, dtype), table_of(4, 2, dtype)
    a = write(tmp_path / "a", ["x", "y", "z"], one, 1)
    b = write(tmp_path / "b", ["y", "q", "r", "x"], other, 2)
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": a, "layer_range": [0, 4]}]}],
        "base_model": b,
        "tokenizer": {"source": "union"},
    }
    merge(recipe, tmp_path / "out", CPU)
    found = read_model(tmp_path / "out")[EMBEDDING]
    wanted = torch.stack([one[1], other[1], other[2], one[0], one[2]])
    width = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(found.view(width), wanted.view(width))


def test_a_mean_is_the_sum_in_order_divided_by_the_count(tmp_path: Path) -> None:
    tables = [table_of(rows, seed, torch.float32) for seed, rows in enumerate((1, 2, 2, 3))]
    texts = (["x"], ["x", "m"], ["m", "x"], ["n", "m", "x"])
    named = zip("abcd", texts, tables, strict=True)
    names = [write(tmp_path / name, text, table, 1) for name, text, table in named]
    weights = (1.0, 0.0, 0.0, 0.0)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": n, "parameters": {"weight": w}} for n, w in zip(names, weights, strict=True)],
        "tokenizer": {"source": "union"},
    }
    merge(recipe, tmp_path / "out", CPU)
    found = read_model(tmp_path / "out")[EMBEDDING].numpy()
    arrays = [table.numpy() for table in tables]
    mean = ((arrays[1][1] + arrays[2][0]) + arrays[3][1]) / np.float32(3)
    assert found.shape[0] == 3
    np.testing.assert_array_equal(found[0], arrays[0][0])
    np.testing.assert_array_equal(found[1], mean)
    np.testing.assert_array_equal(found[2], arrays[3][0])
