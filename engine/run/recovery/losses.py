"""Warnings about data of an unfinished merge that was lost or changed since it was written."""

from __future__ import annotations

from collections.abc import Iterator

from ....io.units import data_size, plural
from .recover import RecoveredState


def losses(recovered: RecoveredState) -> Iterator[str]:
    """Yield a text for each kind of data that is made again."""
    if recovered.damaged:
        differ, are = ("differs", "it is") if recovered.damaged == 1 else ("differ", "they are")
        yield (
            f"{plural(recovered.damaged, 'block')} of the unfinished merge {differ} from the journal: the "
            f"disk has lost data, or the files were changed; {are} made again"
        )
    if recovered.differing:
        yield (
            f"{data_size(recovered.differing)} of copied tensors differ from their sources: the disk has "
            "lost data, or a file was changed; they are copied again"
        )
