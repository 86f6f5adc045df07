"""The result of a comparison: distance, cosine and share of equal elements of tensors, layers and kinds of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ....methods.kernel.reduction.reductions import total
from ...schedule.traffic import pattern_of


@dataclass(frozen=True, slots=True)
class Similarity:
    """How similar the elements of two tensors, or of several pairs of tensors, are.

    Elements that are NaN or infinite in A or B are left out of the sums; `nonfinite` counts them.

    Args:
        elements: number of elements.
        equal: number of elements with equal values in A and B. Zeros are equal regardless of sign, and NaN equals NaN.
        nonfinite: number of elements that are NaN or infinite in A or B.
        a_squares: sum of the squares of A's elements.
        b_squares: sum of the squares of B's elements.
        products: sum of the products of A's and B's elements.
        difference_squares: sum of the squares of the differences.
    """

    elements: int
    equal: int
    nonfinite: int
    a_squares: float
    b_squares: float
    products: float
    difference_squares: float

    @classmethod
    def total(cls, parts: Iterable[Similarity]) -> Similarity:
        """The similarity of all elements of several pairs of tensors."""
        parts = tuple(parts)
        return cls(
            sum(part.elements for part in parts),
            sum(part.equal for part in parts),
            sum(part.nonfinite for part in parts),
            total(part.a_squares for part in parts),
            total(part.b_squares for part in parts),
            total(part.products for part in parts),
            total(part.difference_squares for part in parts),
        )

    @property
    def relative_distance(self) -> float | None:
        """``||A - B|| / ||A||``, and 0 if both are 0. None if only A is 0, or without finite elements and sums."""
        if self.elements == self.nonfinite:
            return None
        if self.difference_squares == 0:
            return 0.0
        if self.a_squares == 0:
            return None
        return _finite(math.sqrt(self.difference_squares) / math.sqrt(self.a_squares))

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between A and B, from -1 to 1. None if A or B is 0, or without finite sums."""
        if self.a_squares == 0 or self.b_squares == 0:
            return None
        if self.difference_squares == 0:
            return 1.0
        cosine = _finite(self.products / (math.sqrt(self.a_squares) * math.sqrt(self.b_squares)))
        return None if cosine is None else max(-1.0, min(1.0, cosine))

    @property
    def equal_share(self) -> float | None:
        """Share of the elements that are equal, from 0 to 1; None if there are no elements."""
        return self.equal / self.elements if self.elements else None

    def to_dict(self) -> dict[str, Any]:
        """The similarity as plain data; null for what is not defined."""
        return {
            "elements": self.elements,
            "relative_distance": self.relative_distance,
            "cosine": self.cosine,
            "equal": self.equal_share,
            "nonfinite": self.nonfinite,
        }

    def __repr__(self) -> str:
        """One line with the three measures."""
        measures = (("relative distance", self.relative_distance), ("cosine", self.cosine), ("equal", self.equal_share))
        shown = ", ".join(f"{name} {'undefined' if value is None else f'{value:.6g}'}" for name, value in measures)
        return f"<Similarity of {self.elements:,} elements: {shown}>"


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """The comparison of one tensor.

    Args:
        name: name of the tensor.
        stack: prefix of the layers that contain the tensor, such as ``model.layers``; empty outside of layers.
        layer: number of the layer; None outside of layers.
        shape: shape in both models.
        dtypes: names of the dtypes in A and B; of a tensor that is stored in a format of its own, the nominal one.
        similarity: similarity of the values.
        tied_to: for a head that one model lacks, name of the embedding that it is tied to there; otherwise empty.
        formats: formats that the values are stored in, in A and B; empty if they are stored as they are.
    """

    name: str
    stack: str
    layer: int | None
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    similarity: Similarity
    tied_to: str = ""
    formats: tuple[str, ...] = ("", "")

    @property
    def is_float(self) -> bool:
        """Whether both models store floating-point numbers."""
        return not any(dtype.startswith(("I", "U", "BOOL")) for dtype in self.dtypes)

    @property
    def kind(self) -> str:
        """Name with * for its numbers, such as ``model.layers.*.mlp.up_proj.weight``."""
        return pattern_of(self.name)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, as ``diff --json`` prints it."""
        return {
            "name": self.name,
            "stack": self.stack,
            "layer": self.layer,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtypes": list(self.dtypes),
            "formats": list(self.formats),
            "tied_to": self.tied_to,
            **self.similarity.to_dict(),
        }

    def __repr__(self) -> str:
        """One line with the name and the measures."""
        return f"<TensorDiff {self.name!r}: {self.similarity!r}>"


@dataclass(frozen=True, slots=True)
class NotCompared:
    """A tensor of both models that can't be compared.

    Args:
        name: name of the tensor.
        reason: reason, with the shapes or dtypes in A and B.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that are summarized together: those of one layer, or of one kind.

    Args:
        stack: prefix of the layers; empty outside of layers, or for a kind.
        layer: number of the layer; None outside of layers, or for a kind.
        kind: name of the tensors with * for numbers; empty for a layer.
        tensors: number of tensors.
        similarity: similarity of all their elements.
    """

    stack: str
    layer: int | None
    kind: str
    tensors: int
    similarity: Similarity

    def to_dict(self) -> dict[str, Any]:
        """The group as plain data."""
        place = {"kind": self.kind} if self.kind else {"stack": self.stack, "layer": self.layer}
        return {**place, "tensors": self.tensors, **self.similarity.to_dict()}


@dataclass(frozen=True, slots=True)
class Diff:
    """The comparison of two models, as `mergeloom.diff` returns it.

    Args:
        a: name of the first model.
        b: name of the second model.
        tensors: comparisons of the tensors that both models have, in the order of A's files.
        only_in_a: names of the tensors that only A has.
        only_in_b: names of the tensors that only B has.
        not_compared: tensors of both models whose shapes differ, or whose dtypes can't be compared.
        warnings: warnings for the user.
        bytes_read: bytes of tensors read from both models.
        max_ram: limit of the process's resident memory in bytes.
        peak_ram: planned peak of the process's resident memory in bytes.
        peak_rss: measured peak of the process's resident memory in bytes (VmHWM).
    """

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    not_compared: tuple[NotCompared, ...] = ()
    warnings: tuple[str, ...] = ()
    bytes_read: int = 0
    max_ram: int = 0
    peak_ram: int = 0
    peak_rss: int = 0

    @property
    def total(self) -> Similarity:
        """Similarity of all compared elements of floating-point tensors."""
        return _total(self.tensors)

    @property
    def equal(self) -> bool:
        """Whether both models have the same tensors with equal values; their dtypes may differ."""
        listed = self.only_in_a or self.only_in_b or self.not_compared
        return not listed and all(t.similarity.equal == t.similarity.elements for t in self.tensors)

    def by_layer(self) -> tuple[TensorGroup, ...]:
        """A group for each layer, in order, and a last one for the tensors outside of layers."""
        groups: dict[tuple[str, int | None], list[TensorDiff]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.stack, tensor.layer), []).append(tensor)
        stacks = {stack: number for number, stack in enumerate(dict.fromkeys(stack for stack, _ in groups))}
        order = sorted(groups, key=lambda key: (key[1] is None, stacks[key[0]], key[1] or 0))
        return tuple(TensorGroup(*key, "", len(groups[key]), _total(groups[key])) for key in order)

    def by_kind(self) -> tuple[TensorGroup, ...]:
        """A group for each kind of tensors, in the order of their first tensors."""
        groups: dict[str, list[TensorDiff]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.kind, []).append(tensor)
        return tuple(TensorGroup("", None, kind, len(group), _total(group)) for kind, group in groups.items())

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, as ``diff --json`` prints it. Sizes are in bytes."""
        return {
            "a": self.a,
            "b": self.b,
            "total": self.total.to_dict(),
            "layers": [group.to_dict() for group in self.by_layer()],
            "kinds": [group.to_dict() for group in self.by_kind()],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "not_compared": [{"name": each.name, "reason": each.reason} for each in self.not_compared],
            "warnings": list(self.warnings),
            "bytes_read": self.bytes_read,
            "max_ram": self.max_ram,
            "peak_ram": self.peak_ram,
            "peak_rss": self.peak_rss,
        }

    def __repr__(self) -> str:
        """One line with the models' names and the total."""
        return f"<Diff of {self.a!r} and {self.b!r}: {len(self.tensors):,} tensors, {self.total!r}>"


def _total(tensors: Iterable[TensorDiff]) -> Similarity:
    """The similarity of several tensors. Integers (position ids) would outweigh all weights, so they are left out.

    If there is nothing else, they count.
    """
    tensors = list(tensors)
    floats = [tensor for tensor in tensors if tensor.is_float]
    return Similarity.total(tensor.similarity for tensor in floats or tensors)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
