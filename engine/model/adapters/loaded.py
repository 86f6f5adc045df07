"""Opens adapters: their tensors, and what adapter_config.json says of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.checkpoint.file_sets import ADAPTER
from ....io.open_source import quoted
from ....io.small_files import read_json
from ....io.units import plural
from ...recipe.local import is_local
from ...recipe.types import ModelReference
from ..checks.names import directory_of
from ..contents.adapters import find_adapter
from .changes import EMBEDDING_A, WRAPPED, A, AdapterTensors, sort_tensors
from .config import CONFIG, AdapterConfig

_FILES = (f"{ADAPTER}.safetensors.index.json", f"{ADAPTER}.safetensors", f"{ADAPTER}.bin")
"""The files of an adapter in a directory, the first ones first."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that a recipe applies to a model.

    Args:
        reference: where it is.
        checkpoint: its files.
        config: the content of adapter_config.json.
    """

    reference: ModelReference
    checkpoint: Checkpoint
    config: AdapterConfig

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.reference.text

    @property
    def title(self) -> str:
        """What it is, such as ``LoRA of rank 8, 224 modules``."""
        ranks = [str(rank) for rank in self.ranks]
        rank = f" of rank{'s' * (len(ranks) > 1)} {' to '.join(dict.fromkeys((ranks[0], ranks[-1])))}" if ranks else ""
        return f"{self.kind}{rank}, {plural(len(self.changes.modules), 'module')}"

    @property
    def kind(self) -> str:
        """LoRA or DoRA."""
        return "DoRA" if self.config.dora else "LoRA"

    @property
    def ranks(self) -> list[int]:
        """The ranks of its factors, from the lowest one on. Raises CheckpointError if the config has none."""
        with_factors = (module for module, stored in self.changes.modules.items() if {A, EMBEDDING_A} & stored.keys())
        return sorted({self.config.rank(module.replace(WRAPPED, "")) for module in with_factors})

    def to_dict(self) -> dict[str, Any]:
        """The adapter as plain data, for ``inspect --json``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "ranks": self.ranks,
            "modules": len(self.changes.modules),
            "replaced": len(self.changes.replaced),
            "base": self.config.base or None,
        }

    def remark(self, base: str, checkpoint: Checkpoint) -> str:
        """Say that it was trained on another model than the one it is applied to; empty if it wasn't.

        Args:
            base: name of the model that it is applied to.
            checkpoint: that model.
        """
        known = (str((checkpoint.config or {}).get("_name_or_path") or ""), str(directory_of(checkpoint)))
        return self.config.other_base(base, known)

    @cached_property
    def changes(self) -> AdapterTensors:
        """What it changes. Raises CheckpointError."""
        return sort_tensors(self.name, self.checkpoint.tensors)


def open_adapter(reference: ModelReference, open_model: Callable[[ModelReference], Checkpoint]) -> Adapter:
    """Open an adapter: a directory, a file, or a Hub repository.

    Raises:
        CheckpointError: it is missing or damaged, not a LoRA adapter in PEFT's format, or of a kind that can't be
            applied.
    """
    reference = adapter_location(reference)
    checkpoint = open_model(reference)
    content = adapter_config(checkpoint)
    if "peft_type" not in content:
        raise CheckpointError(_not_in_peft_format(reference.text, checkpoint))
    config = AdapterConfig(reference.text, content)
    if checkpoint.views:
        raise CheckpointError(
            f"{reference.text}: tensor {next(iter(checkpoint.views))} is not contiguous: call .contiguous() on it and "
            "save the adapter again"
        )
    return Adapter(reference, checkpoint, config)


def adapter_location(reference: ModelReference) -> ModelReference:
    """Return the file of an adapter, if its directory alone does not say which files are the adapter's."""
    if not is_local(reference.path):
        return reference
    directory = Path(os.path.expanduser(reference.path))  # noqa: PTH111  expanduser of Path fails for "~nobody"
    file = next((name for name in _FILES if (directory / name).is_file()), None)
    if file is None:
        return reference
    others = [each.name for each in directory.iterdir() if not each.name.startswith(ADAPTER)]
    has_model = any(name.endswith(".safetensors") or name.startswith("pytorch_model") for name in others)
    if not has_model and not file.endswith(".bin"):
        return reference
    return replace(reference, path=str(Path(reference.path) / file))


def _not_in_peft_format(name: str, checkpoint: Checkpoint) -> str:
    """Say why a checkpoint that is applied to a model is not an adapter in PEFT's format."""
    found = find_adapter(checkpoint.tensors)
    if found is None:
        example = quoted(next(iter(checkpoint.tensors)))
        return (
            f"{name} is applied to a model as an adapter, but it is not one (it has a tensor {example} and no {CONFIG} "
            "with a `peft_type`): write `base+adapter`; to merge two models, list both under `models`"
        )
    if found.diffusion or not found.ranks:
        return (
            f"{name} is a {found.title} adapter (it has a tensor {quoted(found.example)}): only LoRA adapters in "
            "PEFT's format can be applied. Merge it into its base with the program that it is for, and use the result"
        )
    return (
        f"{name} is a {found.title}, but there is no {CONFIG} with a `peft_type` next to it, which has its scale: "
        "download it, too"
    )


def adapter_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the content of adapter_config.json next to an adapter; empty without one."""
    if hasattr(checkpoint, "repository"):
        from ....io.hub.checkpoint import HubCheckpoint
        from ....io.hub.download import download

        assert isinstance(checkpoint, HubCheckpoint)
        download(file for file in checkpoint.repository.files.values() if file.name == CONFIG)
        directory = checkpoint.path
    else:
        directory = Path(directory_of(checkpoint))
    config = read_json(directory / CONFIG)
    return config if isinstance(config, dict) else {}
