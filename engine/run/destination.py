"""Whether OUT can take a merge: what it holds now, and how much room its disk has. Writes nothing.

`merge` and `plan` ask the same functions, in the same order, so what `plan` reports is what `merge` would end with.
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
    """OUT as `plan` found it.

    Args:
        path: the directory.
        needed: bytes of disk space that the shards still need; the other files are small.
        free: bytes that its disk has free for this user.
        problem: what keeps a merge from being written there; None where nothing does.
        content: what the directory holds.
    """

    path: Path
    needed: int
    free: int
    problem: MergeloomError | None
    content: Content = Content.NEW

    def to_dict(self) -> dict[str, Any]:
        """As ``plan --json`` prints it. Sizes are in bytes."""
        problem = None if self.problem is None else str(self.problem)
        return {
            "path": str(self.path),
            "content": self.content.value,
            "needed": self.needed,
            "free": self.free,
            "problem": problem,
        }


def look_at(planned: Plan, out: Path) -> Destination:
    """Whether a planned merge can be written to `out`.

    Reads samples of the source files where `out` holds a merge already, to compare the two.
    """
    free = shutil.disk_usage(_nearest(out)).free
    needed, content = planned.disk, Content.FOREIGN
    try:
        found = classify(out)
        content = found.content
        refuse_occupied(found)
        refuse_input(planned, out)
        if content is Content.FINISHED:
            needed = 0
            check_finished(planned, found)
        elif content is Content.UNFINISHED:
            refuse_other_unfinished(planned, found, facts_of(planned))
            needed = missing_space(out, shard_files(planned), planned.bytes_shared)
        if content is not Content.FINISHED:
            _refuse_unwritable(out, needed, free)
    except MergeloomError as error:
        return Destination(out, needed, free, error, content)
    return Destination(out, needed, free, None, content)


def refuse_input(planned: Plan, out: Path) -> None:
    """Raise UsageError if `out` is one of the merge's inputs, is in a directory of one, or contains one."""
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
    """Name and path of every model that the merge reads."""
    for model in planned.built.models:
        yield model.name, model.checkpoint.path
    for made in planned.made:
        yield made.files.config_from, made.files.others.path
        yield made.files.tokenizer_from, made.files.tokenizer.path


def refuse_other_unfinished(planned: Plan, found: DirectoryStatus, facts: Mapping[str, Any]) -> None:
    """Raise UsageError if an unfinished merge is not the planned one.

    Args:
        planned: the merge.
        found: a directory with an unfinished merge.
        facts: the facts of the planned merge.
    """
    if found.journal is None:
        return
    if not found.journal.facts:
        raise UsageError(f"{found} with a damaged journal: choose another OUT, or give --fresh to discard it")
    now = {**facts, "format": FORMAT}
    if versions := other_version(found.journal.facts, now, ("mergeloom", "arithmetic", "layout", "format")):
        raise UsageError(
            f"{found} started by {versions}: finish it with that version, choose another OUT, or give --fresh to "
            "discard it"
        )
    changes = differences(found.journal.facts, facts, model_names(planned))
    if changes:
        raise UsageError(
            f"{found}, and this one differs from it: {'; '.join(changes)}. Run it as it was, choose another OUT, or "
            "give --fresh to discard it"
        )


def shard_files(planned: Plan) -> list[ShardFile]:
    """The shards of the output, with the ranges that need disk space of their own."""
    layout = planned.layout
    ranges = written_ranges(planned.built.graph, layout, planned.transfers)
    return [
        ShardFile(shard.name, shard.header, shard.nbytes, tuple(written))
        for shard, written in zip(layout.shards, ranges, strict=True)
    ]


def _nearest(path: Path) -> Path:
    """The directory itself, or the one in which it would be made."""
    path = path.absolute()
    while not os.path.exists(path):  # noqa: PTH110  no name makes it fail
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
