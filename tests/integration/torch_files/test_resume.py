"""Merges of PyTorch checkpoints that are killed and resumed have the bytes of those that are not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeloom.errors import UsageError
from mergeloom.io.torch_files.reader import read_torch_file
from tests.support.faults import Kill, Stopped, watching
from tests.support.merges.resumable import SHAPES, interrupt, recipe, run
from tests.support.merges.small import make_blocks_small
from tests.support.models import FineTune, Random, write_checkpoint
from tests.support.models.torch_files import write_torch_model
from tests.support.outputs import digests, read_model


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        make_blocks_small(patch)
        yield


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base model and two fine-tunes: with tensors that share bytes, a transposed one, and one per file format."""
    found = []
    options: list[dict[str, Any]] = [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4, "shards": 2}]
    for seed, name in enumerate(("base", "a", "b")):
        plain = write_checkpoint(tmp_path / f"plain-{name}", SHAPES, dtype="F32", fill=FineTune(Random(0), seed))
        state = read_model(plain)
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].t().contiguous().t()
        joined = torch.cat([state[f"model.layers.{layer}.w.weight"] for layer in (0, 1)])
        for layer in (0, 1):
            state[f"model.layers.{layer}.w.weight"] = joined[96 * layer : 96 * layer + 96]
        state["model.layers.2.w.weight"] = joined[40:136]  # shares some bytes with each of the two
        state["lm_head.weight"] = joined[:96]
        found.append(write_torch_model(tmp_path / name, state, **options[seed]))
    return found


@pytest.mark.parametrize("method", ["dare_ties", "passthrough"])
def test_killed_at_any_call_the_bytes_are_the_same(method: str, models: list[Path], tmp_path: Path) -> None:
    what = recipe(models)
    if method == "passthrough":
        what = {"merge_method": method, "models": [{"model": str(models[1])}]}
    run(what, tmp_path / "whole")
    restarts = 0
    while True:
        try:
            with watching(Kill(34 + 3 * restarts)):
                run(what, tmp_path / "out")
        except Stopped:
            restarts += 1
        else:
            break
    assert restarts > 1
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_touched_files_are_compared_with_what_was_read(models: list[Path], tmp_path: Path) -> None:
    run(recipe(models), tmp_path / "whole")
    interrupt(recipe(models), tmp_path / "out", 10)
    for model in models:
        for file in model.glob("*.bin"):
            os.utime(file, (1, 1))
    said: list[str] = []
    run(recipe(models), tmp_path / "out", say=said.append)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_changed_file_is_refused(models: list[Path], tmp_path: Path) -> None:
    interrupt(recipe(models), tmp_path / "out", 10)
    file = models[1] / "pytorch_model.bin"
    data, found = bytearray(file.read_bytes()), read_torch_file(file)
    for offset, kind in zip(
        found.offsets, found.classes, strict=True
    ):  # values only: a legacy file has sizes between them
        data[offset : offset + kind.nbytes] = bytes(kind.nbytes)
    file.write_bytes(data)
    with pytest.raises(UsageError, match=r"the source file pytorch_model\.bin of .*/a\."):
        run(recipe(models), tmp_path / "out")
