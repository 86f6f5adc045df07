"""Says what a checkpoint is, for `inspect`: where it is from, and what kind of model, adapter or other file it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ....io.checkpoint.checkpoint import Checkpoint
from ....io.output.lock import MANIFEST
from ....io.units import plural
from .adapters import Adapter, find_adapter, is_textual_inversion
from .diffusion import DiffusionModel, find_diffusion_model


@dataclass(frozen=True, slots=True)
class Description:
    """What a checkpoint is.

    Args:
        kind: ``model``, ``diffusion model``, ``adapter``, ``textual inversion`` or ``state dict`` (no config.json).
        title: the kind in more words, such as ``SDXL checkpoint: UNet, VAE, text encoder 0, text encoder 1``.
        source: ``directory``, ``file``, ``index`` or ``hub``.
        source_text: the source in more words.
        diffusion: parts of a diffusion model, or None.
        adapter: kind, ranks and targets of an adapter, or None.
    """

    kind: str
    title: str
    source: str
    source_text: str
    diffusion: DiffusionModel | None = None
    adapter: Adapter | None = None

    def to_dict(self) -> dict[str, Any]:
        """The description as plain data. Sizes are in bytes."""
        data: dict[str, Any] = {"kind": self.kind, "title": self.title, "source": self.source}
        if self.diffusion is not None:
            data["family"] = self.diffusion.family or None
            data["input_channels"] = self.diffusion.input_channels
            data["parts"] = [
                {"name": part.name, "prefix": part.prefix, "tensors": part.tensors, "parameters": part.elements}
                | {"bytes": part.nbytes}
                for part in self.diffusion.parts
            ]
        if self.adapter is not None:
            shown = asdict(self.adapter)
            data["adapter"] = {key: shown[key] for key in ("kind", "ranks", "targets", "diffusion")}
        return data


def describe_checkpoint(checkpoint: Checkpoint) -> Description:
    """Say what a checkpoint is, from its files, config.json and tensor names."""
    source, source_text = _source(checkpoint)
    if is_textual_inversion(checkpoint.tensors):
        title = f"embeddings of a textual inversion: {plural(len(checkpoint.tensors), 'tensor')}"
        return Description("textual inversion", title, source, source_text)
    adapter = find_adapter(checkpoint.tensors)
    if adapter is not None:
        title = f"adapter: {adapter.title}" + (f", for {adapter.target}" if adapter.targets else "")
        return Description("adapter", title, source, source_text, adapter=adapter)
    diffusion = find_diffusion_model(checkpoint.tensors, checkpoint.config)
    if diffusion is not None:
        parts = ", ".join(part.name for part in diffusion.parts)
        title = f"{diffusion.title}: {parts}" if len(diffusion.parts) > 1 else diffusion.title
        return Description("diffusion model", title, source, source_text, diffusion)
    if checkpoint.config is None:
        return Description("state dict", "state dict of an unknown architecture", source, source_text)
    return Description("model", _model_title(checkpoint.config), source, source_text)


def _model_title(config: Mapping[str, Any]) -> str:
    architectures, kind = config.get("architectures"), config.get("model_type")
    if isinstance(config.get("_class_name"), str):
        return f"{config['_class_name']} of diffusers"
    if isinstance(architectures, list) and architectures:
        return ", ".join(map(str, architectures))
    return f"model of type {kind}" if isinstance(kind, str) else "model of an unknown architecture"


def _source(checkpoint: Checkpoint) -> tuple[str, str]:
    """The source of a checkpoint for programs, and for people."""
    files = plural(len(checkpoint.files), "file")
    if hasattr(checkpoint, "repository"):
        repository = checkpoint.repository
        return "hub", f"repository {repository.repo} on the Hub, commit {repository.commit[:12]}, {files}"
    path = checkpoint.path
    if checkpoint.standalone:
        return "file", "single file, no config.json"
    directory = path if path.is_dir() else path.parent
    config = "config.json" if checkpoint.config is not None else "no config.json"
    origin = ""
    if (directory / MANIFEST).is_file():
        origin = ", made by mergeloom"
    elif (directory.parent / MANIFEST).is_file() and directory.resolve().parent != directory.resolve():
        origin = f", a stage that was saved with the merge in {directory.parent}"
    if path.is_dir():
        return "directory", f"directory, {config}, {files}{origin}"
    kind = "index" if checkpoint.index is not None else "file"
    return kind, f"{kind}, {config} next to it, {files}{origin}"
