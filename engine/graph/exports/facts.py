"""What determines the values of a node, as plain data: a merge is the same merge as long as this is the same.

The data has keys and values of its own. It must not contain the name of a class, enum member or attribute: renaming one
would make every unfinished merge a different merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from ....methods.kernel.access import (
    Access,
    Aligned,
    BlockRows,
    ColumnFactor,
    GatheredRows,
    Nibbles,
    RowFactor,
    SameRows,
    Slice,
    TransposedSlice,
    Whole,
)
from ....methods.kernel.composition import Composition, Part
from ....methods.kernel.spec import InputSpec
from ..graph import Kind, Operation

_ACCESSES: dict[type[Access], str] = {
    Aligned: "aligned",
    BlockRows: "block rows",
    Nibbles: "nibbles",
    SameRows: "same rows",
    Whole: "whole",
    RowFactor: "factor by row",
    ColumnFactor: "factor by column",
    GatheredRows: "gathered rows",
    Slice: "slice",
    TransposedSlice: "transposed slice",
}
_OPERATIONS = {Kind.COPY: "copy", Kind.REQUIRE_EQUAL: "same", Kind.MERGE: "merge"}


def operation_facts(operation: Operation) -> dict[str, Any]:
    """Return everything that determines the values of an operation, apart from its sources."""
    facts: dict[str, Any] = {
        "operation": _OPERATIONS[operation.kind],
        "base": operation.base,
        "positions": operation.positions,
    }
    if operation.accesses:
        facts["accesses"] = [_access_facts(access) for access in operation.accesses]
    if not isinstance(operation.kernel, Composition):
        return {**facts, "method": operation.method, "parameters": dict(operation.parameters)}
    stages = zip(operation.kernel.parts, operation.parameters, strict=True)
    return {**facts, "stages": [{"method": name, **_stage_facts(part, own)} for part, (name, own) in stages]}


def _access_facts(access: Access) -> list[Any]:
    """Return everything that determines an access; of the 10^5 rows of a vocabulary, a digest."""
    if isinstance(access, GatheredRows):
        return [_ACCESSES[GatheredRows], len(access.index), access.index.digest]
    return [_ACCESSES[type(access)], *astuple(access)]


def _stage_facts(part: Part, parameters: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return everything that determines the values of one stage of a fused operation."""
    return {
        "parameters": dict(parameters),
        "sources": part.sources,
        "key": part.key,
        "positions": part.positions,
        "round_to": part.round_to,
        "inputs": _inputs_facts(part.kernel.inputs),
    }


def _inputs_facts(inputs: InputSpec) -> dict[str, Any]:
    return {"count": inputs.count, "base": inputs.base, "shape": inputs.shape}
