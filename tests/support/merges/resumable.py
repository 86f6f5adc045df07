"""A merge that is interrupted after a number of commits, for tests of resuming it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.merge import Result, merge
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.io.output.journal import Journal, read_journal
from mergeloom.io.output.lock import WORK
from tests.support.faults import Stopped
from tests.support.models import FineTune, Random, write_checkpoint

OPTIONS = Options(max_ram=4 << 30, device="cpu", threads=1, shard_size=400_000, keep_paths=True)
GROUP = 40 << 10
SHAPES = {
    "model.embed_tokens.weight": (400, 128),
    **{f"model.layers.{layer}.w.weight": (96, 128) for layer in range(4)},
    "model.norm.weight": (128,),
}


def write_models(directory: Path) -> list[Path]:
    """Write a base model and two fine-tunes to a directory."""
    models = [
        write_checkpoint(directory / name, SHAPES, dtype="F32", fill=FineTune(Random(0), seed))
        for seed, name in enumerate(("base", "a", "b"))
    ]
    (models[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    return models


def recipe(models: list[Path], method: str = "dare_ties", **more: object) -> dict[str, Any]:
    """A recipe with a method that samples and has several passes."""
    named = [{"model": str(model), "parameters": {"weight": 0.5, "density": 0.5}} for model in models[1:]]
    return {"merge_method": method, "base_model": str(models[0]), "models": named, **more}


def run(what: Any, out: Path, options: Options = OPTIONS, **more: Any) -> Result:
    """Merge with small groups."""
    return merge(what, out, None if isinstance(what, Plan) else options, group_bytes=GROUP, **more)


def interrupt(
    what: Any, out: Path, commits: int = 3, options: Options = OPTIONS, *, may_finish: bool = False
) -> list[dict[str, Any]]:
    """Merge until this many commits are made. Return the records in the journal.

    Args:
        what: the recipe or plan.
        out: the output directory.
        commits: number of commits after which the merge is stopped.
        options: options of the merge.
        may_finish: whether a merge with fewer commits may finish; it has no records then.
    """
    appended = 0
    append = Journal.append

    def count(self: Journal, records: Any) -> None:
        nonlocal appended
        append(self, records)
        appended += 1
        if appended == commits + 1:  # the first call writes the facts
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", count)
        try:
            run(what, out, options)
        except Stopped:
            pass
        else:
            assert may_finish, f"the merge finished with fewer than {commits} commits"
            return []
    journal = read_journal(out / WORK / "journal")
    assert journal is not None
    return [dict(record) for record in journal.records]
