"""A small merge with several shards, chunks and blocks, for tests that interrupt it at every point."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.graph.graph import Kind
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from tests.support.models import FineTune, Random, write_checkpoint

OPTIONS = Options(max_ram=4 << 30, device="cpu", threads=1, shard_size=150_000)
GROUP = 16 << 10
SHAPES = {
    "model.embed_tokens.weight": (100, 64),
    **{f"model.layers.{layer}.w.weight": (96, 64) for layer in range(4)},
    "model.norm.weight": (64,),
}


def make_plan(directory: Path) -> Plan:
    """Plan a merge with computed and copied tensors. Its models are written to a directory."""
    models = [
        write_checkpoint(directory / name, SHAPES, dtype="F32", fill=FineTune(Random(0), seed))
        for seed, name in enumerate("ab")
    ]
    (models[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    (models[0] / "chat_templates").mkdir()
    (models[0] / "chat_templates" / "tool.jinja").write_text("{{ messages }}")
    slices = [
        {"sources": [{"model": str(model), "layer_range": [0, 3]} for model in models]},
        {"sources": [{"model": str(models[0]), "layer_range": [1, 4]}]},
    ]
    planned = plan({"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}, OPTIONS)
    assert {operation.kind for operation in planned.built.graph.operations} == {Kind.COPY, Kind.MERGE}
    assert planned.layout.shards[1:]
    return planned


def make_blocks_small(patch: pytest.MonkeyPatch) -> None:
    """Make digest blocks and minimum chunks small, so small tensors have several of each."""
    for module in (
        "io.output.digests",
        "engine.run.manifest",
        "engine.run.recovery.records",
        "engine.run.recovery.recover",
        "engine.run.shard_writer",
    ):
        patch.setattr(f"mergeloom.{module}.BLOCK_BYTES", 16 << 10)
    for module in ("bulk_copy", "shard_writer"):
        patch.setattr(f"mergeloom.engine.run.{module}._MIN_CHUNK_BYTES", 4 << 10)
