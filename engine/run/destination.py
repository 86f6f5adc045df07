"""Checks whether a merge can be written to OUT: its current content, and the free space of its disk. Writes nothing.

`merge` and `plan` call the same functions in the same order, so `plan` reports the error that `merge` would raise.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DiskSpaceError, EnvironmentFailure, MergeloomError, UsageError
from ...io.output.journal import FORMAT
from ...io.output.lock import Content, DirectoryStatus, classify, refuse_occupied
from ...io.output.shards import ShardFile, missing_space
from ...io.units import data_size
from .finished import check_finished
from .manifest import differences, facts_of, model_names, other_version
from .transfers import written_ranges

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True, slots=True)
class Destination:
    """The state of OUT when a merge is planned.

    Args:
        path: output directory.
        needed: disk space in bytes that the shards still need; the other files are small.
        free: free disk space in bytes.
        problem: error that `merge` would raise; None if there is none.
        content: current content of the directory.
    """

    path: Path
    needed: int
    free: int
    problem: MergeloomError | None
    content: Content = Content.NEW

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain data, as ``plan --json`` prints it. Sizes are in bytes."""
        problem = None if self.problem is None else str(self.problem)
        return {
            "path": str(self.path),
            "content": self.content.value,
            "needed": self.needed,
            "free": self.free,
            "problem": problem,
        }


def look_at(planned: Plan, out: Path) -> Destination:
    """Check whether a planned merge can be written to `out`.

    If `out` already holds a merge, samples of the source files are read to compare the two.
    """
    free = shutil.disk_usage(_nearest(out)).free
    needed, content = planned.disk, Content.FOREIGN
    try:
        status = classify(out)
        content = status.content
        refuse_occupied(status)
        refuse_input(planned, out)
        if content is Content.FINISHED:
            needed = 0
            check_finished(planned, status)
        elif content is Content.UNFINISHED:
            refuse_other_unfinished(planned, status, facts_of(planned))
            needed = missing_space(out, shard_files(planned), planned.bytes_shared)
        if content is not Content.FINISHED:
            _refuse_unwritable(out, needed, free)
    except MergeloomError as error:
        return Destination(out, needed, free, error, content)
    return Destination(out, needed, free, None, content)


def refuse_input(planned: Plan, out: Path) -> None:
    """Raise UsageError if `out` is one of the merge's inputs, is in a directory of one, contains one, or is a file."""
    if out.suffix == ".safetensors" and not out.is_dir():
        raise UsageError(
            f"{out}: OUT is a directory, not a file: use {out.with_suffix('')}, in which files are written"
        )
    target = out.resolve()
    for name, path in _inputs(planned):
        source = path.resolve()
        if target == source:
            relation = "is"
        elif source.is_dir() and target.is_relative_to(source):
            relation = "is inside"
        elif source.is_relative_to(target):
            relation = "contains"
        else:
            continue
        raise UsageError(f"{out}: {relation} the input model {name}; choose an OUT apart from all inputs")


def _inputs(planned: Plan) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of every model that the merge reads."""
    for model in planned.built.files:
        yield model.name, model.checkpoint.path
    for made in planned.made:
        yield made.files.config_from, made.files.others.path
        yield made.files.tokenizer_from, made.files.tokenizer.path


def refuse_other_unfinished(planned: Plan, status: DirectoryStatus, facts: Mapping[str, Any]) -> None:
    """Raise UsageError if an unfinished merge is not the planned one.

    Args:
        planned: plan of the merge.
        status: status of a directory with an unfinished merge.
        facts: facts of the planned merge.
    """
    if status.journal is None:
        return
    if not status.journal.facts:
        raise UsageError(f"{status} with a damaged journal: choose another OUT, or use --restart to discard it")
    if "extract" in status.journal.facts:
        raise UsageError(f"{status}, not a merge: choose another OUT, or use --restart to discard it")
    now = {**facts, "format": FORMAT}
    if versions := other_version(status.journal.facts, now, ("mergeloom", "arithmetic", "layout", "format")):
        raise UsageError(
            f"{status} started by {versions}: finish it with that version, choose another OUT, or use --restart to "
            "discard it"
        )
    changes = differences(status.journal.facts, facts, model_names(planned))
    if changes:
        raise UsageError(
            f"{status}, and this one differs from it: {'; '.join(changes)}. Run it as it was, choose another OUT, or "
            "use --restart to discard it"
        )


def shard_files(planned: Plan) -> list[ShardFile]:
    """Return the shards of the output, with the ranges that need disk space of their own."""
    layout = planned.layout
    ranges = written_ranges(planned.built.graph, layout, planned.transfers)
    return [
        ShardFile(shard.name, shard.header, shard.nbytes, tuple(written))
        for shard, written in zip(layout.shards, ranges, strict=True)
    ]


def _nearest(path: Path) -> Path:
    """Return the path itself if it exists, or else its nearest existing parent."""
    path = path.absolute()
    while not os.path.exists(path):  # noqa: PTH110  accepts any name
        path = path.parent
    return path


def _refuse_unwritable(out: Path, needed: int, free: int) -> None:
    parent = _nearest(out)
    if not parent.is_dir():
        raise EnvironmentFailure(f"{out}: can't be made, since {parent} is a file; choose another OUT")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EnvironmentFailure(f"{parent}: can't be written to; choose another OUT, or ask its owner")
    if free < needed:
        raise DiskSpaceError(
            f"{out}: the output takes {data_size(needed)} and {data_size(free)} are free; make room, or choose "
            "another OUT"
        )
