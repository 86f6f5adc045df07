"""Finds the PyTorch checkpoint files of a model by their names, in a directory without safetensors files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of PyTorch checkpoint files."""
TORCH_SINGLE = "pytorch_model.bin"
"""The weights of a model that is not sharded."""
TORCH_INDEX_SUFFIX = ".bin.index.json"
TORCH_INDEX = TORCH_SINGLE + ".index.json"
"""The file that maps each tensor to its shard."""

_SHARD = re.compile(r"pytorch_model[-_]\d+[-_]of[-_]\d+\.bin")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")


def choose_torch_files(names: Sequence[str]) -> tuple[str | None, list[str]]:
    """Choose the files of a model as transformers does: its index, or else its only file, or else its shards.

    Other files of ``torch.save`` are never chosen: their names don't say what they are.

    Args:
        names: all names in the model's directory.

    Returns:
        The index; or None and the names of the files, which are empty if there are none.
    """
    if TORCH_INDEX in names:
        return TORCH_INDEX, []
    if TORCH_SINGLE in names:
        return None, [TORCH_SINGLE]
    return None, torch_files(names)


def torch_files(names: Sequence[str]) -> list[str]:
    """Return the names that PyTorch checkpoint files of a model have."""
    return [name for name in names if name == TORCH_SINGLE or _SHARD.fullmatch(name)]


def is_training_state(name: str) -> bool:
    """Return whether a file is a part of the state of a training run, by its name."""
    return name.startswith(_NOT_WEIGHTS)


def is_torch_name(name: str) -> bool:
    """Return whether a file may be a PyTorch checkpoint, by its name."""
    return os.path.splitext(name)[1] in SUFFIXES  # noqa: PTH122  a name, not a path
