"""Writes small checkpoints for tests and opens damaged ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergeloom.io.safetensors.header import build_header
from mergeloom.io.tensors.dtypes import F32

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(file: Path, *names: str, metadata: Mapping[str, str] | None = None) -> Path:
    """A file whose tensors are float32 vectors of two elements."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(build_header([(name, F32, (2,)) for name in names], metadata or {}) + bytes(8 * len(names)))
    return file


def write_index(directory: Path, weight_map: Any, name: str = INDEX) -> Path:
    """An index as transformers writes it."""
    index = directory / name
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A directory with an index and two shards: c and a in the first, b in the second."""
    write(tmp_path / SHARDS[0], "c", "a")
    write(tmp_path / SHARDS[1], "b")
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]})
    return tmp_path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def file_names(checkpoint: Checkpoint) -> list[str]:
    return [file.name for file in checkpoint.files]
