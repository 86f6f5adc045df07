"""Describes directories whose weights mergeloom doesn't read: pickles, adapters, files of other programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..open_source import quoted
from .file_sets import ADAPTER

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of files that are or may be Python pickles."""
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # pickles of a training run


def describe_no_weights(path: Path, names: Sequence[str]) -> str:
    """Describe what a directory without safetensors files contains instead, as an error."""
    pickles = [name for name in names if name.endswith(PICKLES) and not name.startswith(_NOT_WEIGHTS)]
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
        f"{directory}: its weights are Python pickles ({listed_names(names)}), which can run any code when they are "
        "loaded: mergeloom never opens them. If you trust them, convert them once:\n\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"    source, target = {str(directory)!r}, {str(directory) + '-safetensors'!r}\n"
        '    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto")\n'
        "    model.save_pretrained(target, safe_serialization=True)\n"
        "    AutoTokenizer.from_pretrained(source).save_pretrained(target)\n\n"
        "(with the model's own class if it is not a causal language model), and use the new directory"
    )


def listed_names(names: Iterable[str]) -> str:
    """The first four names, quoted, and the number of the others."""
    shown = [quoted(name) for name in names]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + more
