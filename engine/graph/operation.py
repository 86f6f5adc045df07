"""What the nodes of a task graph do with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ...methods.kernel.access import Access
from ...methods.kernel.kernel import Kernel


class Kind(Enum):
    """How an operation computes its output."""

    COPY = "copy"  # the source's bytes, unchanged
    REQUIRE_EQUAL = "same"  # the sources' bytes, which must be equal (integer tensors)
    MERGE = "merge"  # a kernel: a method, a decoder, or several of them in one
    RESULT = "result"  # another tensor that the node before it computes


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation on the sources of a node, shared by all nodes with equal operations.

    Args:
        kind: how the output is computed.
        method: name of the merge method, for display.
        parameters: the resolved parameters as (name, value); a per-input value is a tuple.
        base: index of the base model among the sources, or None.
        positions: for each source, the index of its model in the recipe, for random keys.
        kernel: the method bound to inputs and parameters; None if the source is copied.
        copied: for each source, how the output uses its elements if nothing is computed; all `ALIGNED` if empty.
    """

    kind: Kind
    method: str
    parameters: tuple[tuple[str, Any], ...] = ()
    base: int | None = None
    positions: tuple[int, ...] = ()
    kernel: Kernel | None = None
    copied: tuple[Access, ...] = ()

    @property
    def copies_tensor(self) -> bool:
        """Whether the output is all bytes of a stored tensor, which a file system can share or copy itself."""
        return self.kind is Kind.COPY and not self.copied

    @property
    def accesses(self) -> tuple[Access, ...]:
        """For each source, how the output uses its elements; empty if all are `ALIGNED`."""
        return self.copied if self.kernel is None else self.kernel.inputs.accesses

    @property
    def passes(self) -> int:
        """Number of passes over the sources: the reductions, and the pass that computes the output."""
        return 1 if self.kernel is None else self.kernel.reductions + 1
