"""Presents separate experts as fused ones: the fused tensor is assembled from them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod

from ....errors import CheckpointError
from ....io.tensors.assembled import AssembledRef
from ....io.tensors.refs import TensorRef
from ....io.units import listed
from ....methods.kernel.access import ALIGNED, TransposedSlice
from ..logical import LogicalTensor, Part
from .layouts import ExpertLayout
from .separate_experts import Tensors
from .sizes import ExpertSizes, check_tensor
from .storage import owner_of


def fused_tensors(
    model: str, tensors: Mapping[str, TensorRef], owners: Collection[str], layout: ExpertLayout, sizes: ExpertSizes
) -> Tensors:
    """Return the tensors of a model with the separate experts of some owners as fused ones; see `separate_tensors`.

    Raises:
        CheckpointError: a projection is missing, unknown, quantized, or doesn't have the shape that config.json gives.
    """
    renamed = dict(layout.renamed)
    expected = _Projections(model, layout, sizes)
    stored: dict[str, TensorRef] = {}
    values: list[LogicalTensor] = []
    done: set[str] = set()
    for name, ref in tensors.items():
        owner = owner_of(name)
        rest = name[len(owner) :]
        if owner in owners and rest in renamed:
            stored[owner + renamed[rest]] = ref
        elif owner not in owners or not rest.startswith(f"{layout.separate}."):
            stored[name] = ref
        else:
            expected.check_name(name, rest)
            if owner not in done:
                done.add(owner)
                for value in expected.fused(owner, tensors):
                    stored[value.name] = value.parts[0].ref
                    values.append(value)
    if done != set(owners):
        missing = sorted(set(owners) - done)[0]
        raise CheckpointError(
            f"{model} has separate experts in {missing.rstrip('.') or 'the model'}, but not under the name "
            f"{layout.separate} that its architecture has: rename them, or use {model} as base_model"
        )
    return stored, values


class _Projections:
    """The projections of separate experts.

    Args:
        model: name of the model, for errors.
        layout: layout of the model's architecture.
        sizes: sizes of the experts.
    """

    def __init__(self, model: str, layout: ExpertLayout, sizes: ExpertSizes) -> None:
        self._model, self._layout, self._sizes = model, layout, sizes
        names = "|".join(map(re.escape, (layout.gate, layout.up, layout.down)))
        endings = "weight|bias" if layout.bias else "weight"
        self._known = re.compile(rf"{re.escape(layout.separate)}\.([0-9]{{1,6}})\.(?:{names})\.(?:{endings})")

    def check_name(self, name: str, rest: str) -> None:
        """Raise CheckpointError unless a tensor below the module of the experts is a projection of one of them."""
        match = self._known.fullmatch(rest)
        if match is None:
            raise CheckpointError(
                f"tensor {name} of {self._model} belongs to separate experts, but its architecture has no place for it "
                f"in fused ones (quantized experts have such tensors): use {self._model} as base_model, or its "
                "bfloat16 version"
            )
        if int(match[1]) >= self._sizes.experts:
            raise CheckpointError(
                f"tensor {name} of {self._model} belongs to expert {match[1]}, but config.json counts "
                f"{self._sizes.experts} experts: correct config.json"
            )

    def fused(self, owner: str, tensors: Mapping[str, TensorRef]) -> Iterator[LogicalTensor]:
        """Yield the fused tensors of one owner."""
        layout = self._layout
        roles = {"gate_up": (("gate", layout.gate), ("up", layout.up)), "down": (("down", layout.down),)}
        for bias in (False, True) if layout.bias else (False,):
            ending = "bias" if bias else "weight"
            for role, projections in roles.items():
                names = [
                    (single, f"{owner}{layout.separate}.{expert}.{projection}.{ending}")
                    for expert in range(self._sizes.experts)
                    for single, projection in projections
                ]
                refs = self._checked(owner, names, tensors, bias=bias)
                name = f"{owner}{layout.fused}.{role}_proj{'_bias' if bias else ''}"
                yield self._assembled(name, role, refs, bias=bias)

    def _checked(
        self, owner: str, names: Sequence[tuple[str, str]], tensors: Mapping[str, TensorRef], *, bias: bool
    ) -> list[TensorRef]:
        """Return the projections with these roles and names. Raises CheckpointError."""
        missing = [name for _, name in names if name not in tensors]
        if missing:
            raise CheckpointError(
                f"{self._model} lacks {listed(missing)}: fused experts need all of the {self._sizes.experts} experts "
                f"that config.json counts; {owner.rstrip('.') or 'the model'} has {len(names) - len(missing)} of "
                f"{len(names)} such tensors. Download the model again, or use models with the same experts"
            )
        refs = [tensors[name] for _, name in names]
        for (single, name), ref in zip(names, refs, strict=True):
            check_tensor(self._model, name, ref, self._sizes.separate(single, bias=bias), refs[0].dtype)
        return refs

    def _assembled(self, name: str, role: str, refs: Sequence[TensorRef], *, bias: bool) -> LogicalTensor:
        """Return a fused tensor whose bytes are those of some projections."""
        layout, sizes, first = self._layout, self._sizes, refs[0]
        group = 2 if role == "gate_up" else 1
        rows = group * refs[0].shape[0]
        shape = (sizes.experts, rows, *first.shape[1:])
        row = first.dtype.nbytes(prod(first.shape[1:]))
        ref = AssembledRef(
            first.file,
            first.offset,
            first.nbytes * len(refs),
            first.dtype,
            shape,
            tuple(each.file for each in refs),
            tuple(each.offset for each in refs),
            group,
            row if layout.interleaved and group > 1 else first.nbytes,
        )
        if bias or not layout.transposed:
            return LogicalTensor(name, shape, first.dtype, (Part(name, ref, ALIGNED),))
        _, _, columns = shape
        access = TransposedSlice(0, columns, 1, rows * columns)
        return LogicalTensor(name, (sizes.experts, columns, rows), first.dtype, (Part(name, ref, access),))
