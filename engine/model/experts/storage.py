"""Finds how a checkpoint stores its experts, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....io.tensors.refs import TensorRef
from ....io.tensors.table import TensorTable, class_of, components
from ....io.units import plural

_NAME = re.compile(
    r"(?:^|(?<=\.))experts\.(?:(?P<number>[0-9]{1,6})\.|(?P<fused>(?:gate_up_proj|down_proj)(?:_bias)?)$)"
)
_OWNER = re.compile(r"(?:.*\.)?[0-9]+\.")


@dataclass(slots=True)
class ExpertStorage:
    """How a checkpoint stores its experts.

    The owner of an expert is its layer, as the beginning of the names of all its tensors, such as ``model.layers.3.``.

    Args:
        fused: one name of a fused tensor for each owner of fused experts.
        separate: one name of a tensor of one expert for each owner of separate experts.
        most: number of experts of an owner; the largest one.
    """

    fused: dict[str, str] = field(default_factory=dict)
    separate: dict[str, str] = field(default_factory=dict)
    most: int = 0

    def __str__(self) -> str:
        """How experts are stored, such as ``8 per layer, fused in 4 layers``; empty without experts."""
        forms = ("fused", self.fused), ("separate", self.separate)
        layers = [f"{form} in {plural(len(owners), 'layer')}" for form, owners in forms if owners]
        return f"{self.most:,} per layer, {' and '.join(layers)}" if layers else ""

    def to_dict(self) -> dict[str, int]:
        """The storage as plain data, for ``inspect --json``."""
        return {"per_layer": self.most, "fused_layers": len(self.fused), "separate_layers": len(self.separate)}


def storage_of(tensors: Mapping[str, TensorRef]) -> ExpertStorage:
    """Find how a checkpoint stores its experts; without experts, the result has no owners."""
    found = ExpertStorage()
    if "experts" not in components(tensors):
        return found
    for name in tensors:
        match = _NAME.search(name)
        if match is None:
            continue
        owner = owner_of(name)
        number = match["number"]
        if number is not None:
            found.separate.setdefault(owner, name)
            found.most = max(found.most, int(number) + 1)
        else:
            found.fused.setdefault(owner, name)
            shape = class_of(tensors, name).shape
            found.most = max(found.most, shape[0] if shape else 0)
    return found


def owner_of(name: str) -> str:
    """Return the beginning of a name up to its layer's number and the dot after it; empty outside of layers."""
    match = _NAME.search(name)
    owner = _OWNER.match(name if match is None else name[: match.start()])
    return "" if owner is None else owner.group()


def share_names(tensors: Mapping[str, TensorRef], other: Mapping[str, TensorRef]) -> bool:
    """Return whether two checkpoints are known to have the same names, so they store experts alike."""
    return isinstance(tensors, TensorTable) and isinstance(other, TensorTable) and tensors.shares_names(other)
