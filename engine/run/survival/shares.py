"""The share of each tensor's change that survives rounding: by tensor, and by group of tensors.

With b the base's values, v those that the merge computed and q the stored ones, it is the sum of (q - b)(v - b) divided
by the sum of (v - b)^2; see `methods.kernel.reduction.survival`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....io.tensors.dtypes import BF16, F32
from ...model.roles import is_embedding, is_head

if TYPE_CHECKING:
    from ...execute.survival import SurvivalSums
    from ...graph.graph import MergeGraph

_GROUPS: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("head", is_head),
    ("embeddings", is_embedding),
    ("experts", re.compile(r"(?:^|[._])experts?(?=[._]|$)").search),
    ("attention", re.compile(r"(?:^|[._])(?:\w*attn\w*|\w*attention\w*|[qkvo]_proj|qkv\w*)(?=\.|$)", re.I).search),
    (
        "MLP",
        re.compile(r"(?:^|\.)(?:\w*mlp|\w*ffn|feed_?forward|intermediate|output|fc[12]|w[123])(?=\.|$)", re.I).search,
    ),
)
"""Names of groups, and what their tensors have in their names. A tensor belongs to the first one that fits."""


def group_of(name: str) -> str:
    """The group of a tensor by its name: attention, MLP, experts, embeddings, head or other."""
    return next((group for group, fits in _GROUPS if fits(name)), "other")


@dataclass(frozen=True, slots=True)
class TensorShare:
    """What rounding keeps of the change of one tensor.

    Args:
        tensor: label of the output tensor.
        stored: name of the dtype that it is stored in.
        kept: sum of (q - b)(v - b).
        change: sum of (v - b)^2, more than 0.
        wider: torch's name of a dtype that keeps more.
        extra_bytes: bytes that the tensor would take in addition in that dtype.
    """

    tensor: str
    stored: str
    kept: float
    change: float
    wider: str
    extra_bytes: int

    @property
    def share(self) -> float:
        """The share of the change that is left: 1 if rounding is harmless."""
        return self.kept / self.change

    @property
    def group(self) -> str:
        """The group of the tensor."""
        return group_of(self.tensor.rpartition("/")[2])


def shares_of(graph: MergeGraph, sums: SurvivalSums) -> tuple[TensorShare, ...]:
    """Return the share of each output that was compared with the base, in the order of the output.

    Tensors that equal the base, and those with values that are not finite, have none.
    """
    found = []
    for output in graph.outputs:
        total = sums.total(output.node)
        if total is None or not (all(map(math.isfinite, total)) and total[1] > 0):
            continue
        dtype = graph.node_dtype[output.node]
        wider = BF16 if dtype.bits < BF16.bits else F32
        stored = sum(graph.nbytes(each) for each in graph.results_with(output.node))
        extra = wider.nbytes(graph.elements(output.node)) - stored
        name = "FP8" if dtype.bits < BF16.bits else dtype.torch_name or dtype.name
        kept, change = total
        found.append(TensorShare(output.label, name, kept, change, wider.torch_name or "", extra))
    return tuple(found)


def by_group(shares: Sequence[TensorShare]) -> dict[str, tuple[float, int]]:
    """Return for each group the share of the change of all its tensors, and their number."""
    groups: dict[str, list[TensorShare]] = {}
    for each in shares:
        groups.setdefault(each.group, []).append(each)
    return {
        group: (math.fsum(each.kept for each in found) / math.fsum(each.change for each in found), len(found))
        for group, found in groups.items()
    }


def shares_dict(shares: Sequence[TensorShare]) -> dict[str, dict[str, float]]:
    """Return shares as plain data, as ``--report`` writes them."""
    return {
        "groups": {group: share for group, (share, _) in by_group(shares).items()},
        "tensors": {each.tensor: each.share for each in shares},
    }


def manifest_shares(shares: Sequence[TensorShare]) -> dict[str, dict[str, float]]:
    """Return the entry of the manifest with the share of each tensor; empty if no tensor has one."""
    return {"survival": {each.tensor: each.share for each in shares}} if shares else {}
