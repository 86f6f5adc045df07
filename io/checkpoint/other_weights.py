"""Describes directories whose weights mergeloom doesn't read: adapters, unknown pickles, files of other programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..open_source import quoted
from .file_sets import ADAPTER
from .torch_names import is_training_state

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of files that are or may be Python pickles."""


def describe_no_weights(path: Path, names: Sequence[str]) -> str:
    """Describe what a directory without safetensors files contains instead, as an error."""
    pickles = [name for name in names if name.endswith(PICKLES) and not is_training_state(name)]
    if pickles and all(name.startswith(ADAPTER) for name in pickles):
        return (
            f"{path}: is an adapter ({listed_names(pickles)}), not a model: merge it into its base model with PEFT's "
            "merge_and_unload, save the result with save_pretrained, and use that"
        )
    if pickles:
        return describe_pickles(path, pickles)
    if "model_index.json" in names:
        return (
            f"{path}: is a pipeline of diffusers, whose parts are models of their own: merge them one by one "
            f"({listed_names(name for name in names if '.' not in name)}), or use single files"
        )
    if (path / "snapshots").is_dir():
        return f"{path}: is a model's folder in the Hub's cache: use one of the directories in {path / 'snapshots'}"
    others = [name for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".npz"))]
    if others:
        return f"{path}: has {listed_names(others)}, which mergeloom can't read: download the model's safetensors files"
    content = f"it contains {listed_names(names)}" if names else "it is empty"
    return f"{path}: has no weights ({content}): a model needs *.safetensors files; download the model again"


def describe_pickles(directory: Path, names: Sequence[str]) -> str:
    return (
        f"{directory}: has {listed_names(names)}, whose names don't say whether they are the weights of the model: use "
        "the path of the right file (.bin, .pt, .pth or .ckpt), or name it pytorch_model.bin. Files that torch.save "
        "didn't write can't be read: save the model as safetensors (`save_pretrained`)"
    )


def describe_training_state(file: Path) -> str:
    """Describe a file of a training run that was given as a model, as an error."""
    return (
        f"{file}: is a part of the state of a training run, not the weights of a model, and is never opened: use the "
        "path of the model's directory or of its weights"
    )


def listed_names(names: Iterable[str]) -> str:
    """The first four names, quoted, and the number of the others."""
    shown = [quoted(name) for name in names]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + more
