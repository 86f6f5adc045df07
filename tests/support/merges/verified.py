"""A small finished merge, for tests of verifying it and of merging into it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeloom.engine.run.manifest import MANIFEST
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.verify import Verdict
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.output.manifest_file import _pieces as pieces
from mergeloom.io.output.manifest_file import _self_digest as self_digest
from tests.support.models import write_checkpoint

SHAPES = {f"model.layers.{layer}.w.weight": (64, 50) for layer in range(4)} | {"model.norm.weight": (50,)}


@dataclass(frozen=True)
class Merge:
    """A merge of two models, layer by layer in the lower half, in the upper half copied from the first."""

    models: list[Path]
    recipe: dict[str, Any]

    def run(self, out: Path, *, digests: bool = False, say: Callable[[str], None] | None = None) -> Path:
        """Merge into OUT, in two shards."""
        options = Options(device="cpu", threads=1, max_ram=4 << 30, shard_size=30_000, keep_paths=True)
        merge(self.recipe, out, options, digests=digests, say=say)
        return out


def make_merge(directory: Path) -> Merge:
    """Two models, and the recipe."""
    models = [write_checkpoint(directory / name, SHAPES, dtype="F32", fill=seed) for seed, name in enumerate("ab")]
    (models[0] / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "model_type": "llama"}))
    (models[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    slices = [
        {"sources": [{"model": str(model), "layer_range": [0, 2]} for model in models]},
        {"sources": [{"model": str(models[0]), "layer_range": [2, 4]}]},
    ]
    return Merge(models, {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}})


def problems(verdict: Verdict) -> list[str]:
    """Everything that is wrong."""
    return [*verdict.damaged, *verdict.added]


def append_byte(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


def flip(file: Path, place: int) -> None:
    """Flip one bit."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def position_of(out: Path, tensor: str) -> tuple[Path, int]:
    """The shard and offset of a tensor's first byte."""
    ref = open_checkpoint(out).tensors[tensor]
    return ref.file, ref.offset


def forge(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and make it look untouched."""
    content = json.loads((out / MANIFEST).read_text())
    change(content)
    content["digest"] = self_digest(content)
    (out / MANIFEST).write_bytes(b"".join(pieces(content)))
