"""The union of two vocabularies of 128,256 tokens at the shapes of Llama-3.1-405B: planned exactly, merged in 4 GiB."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import yaml

from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support import models
from tests.support.vocabularies.large import SIZE, base_tokens, other_tokens, write_tokenizer_json

HIDDEN = 16384
BF16 = 2
GIB = 1 << 30


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with true headers and holes for data: all layers, and one narrow layer."""
    root = tmp_path_factory.mktemp("sparse")
    one = models.llama(layers=1, hidden=HIDDEN, intermediate=2048, heads=128, kv_heads=8, vocabulary=SIZE)
    for kind, model in (("all", models.llama_3_1_405b()), ("one", one)):
        for name, tokens in (("a", base_tokens()), ("b", other_tokens())):
            written = models.write_checkpoint(root / kind / name, model, shard_bytes=4_500_000_000, fill=None)
            write_tokenizer_json(written, tokens)
    return root


def recipe(directory: Path, **tokenizer: object) -> dict[str, object]:
    entries = [{"model": str(directory / name), "parameters": {"weight": 0.5}} for name in "ab"]
    return {"merge_method": "linear", "models": entries, "base_model": str(directory / "a"), "tokenizer": tokenizer}


def rows_of_union() -> int:
    return SIZE + len(set(other_tokens()) - set(base_tokens()))


def test_the_plan_of_a_union_of_405b(sparse: Path) -> None:
    found = plan(recipe(sparse / "all", source="union"), Options(device="cpu", threads=2, max_ram=4 * GIB))
    shapes = models.llama_3_1_405b().tensors
    layers = sum(prod(shape) for name, shape in shapes.items() if shape[0] != SIZE)
    tokens = rows_of_union()
    # each model's own rows, and for the tokens that it lacks those of the other
    assert found.bytes_read == BF16 * (2 * layers + 2 * 2 * tokens * HIDDEN)
    assert found.output_dict()["bytes"] == BF16 * (layers + 2 * tokens * HIDDEN)
    vocabulary = found.built.vocabulary
    assert vocabulary is not None
    counts = [each.counts for each in vocabulary.models.values()]
    assert [(each.own, dict(each.others)) for each in counts] == [
        (SIZE, {1: tokens - SIZE}),
        (SIZE, {0: tokens - SIZE}),
    ]
    assert found.schedule.peak_ram <= 4 * GIB


@pytest.mark.parametrize("source", ["union", "base"])
def test_a_merge_of_405bs_embeddings_in_4_gib(source: str, sparse: Path, tmp_path: Path) -> None:
    file, report = tmp_path / "recipe.yml", tmp_path / "report.json"
    file.write_text(yaml.safe_dump(recipe(sparse / "one", source=source)))
    command = [sys.executable, "-m", "mergeloom", "merge", str(file), str(tmp_path / "out"), "--no-output"]
    options = ["--max-ram", "4GiB", "--device", "cpu", "--report", str(report)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(report.read_text())["measured"]
    found = json.loads(report.read_text())
    assert measured["bytes_read"] == found["bytes_read"]
    assert measured["peak_rss"] <= 4 * GIB
