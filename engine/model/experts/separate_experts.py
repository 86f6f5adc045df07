"""Presents fused experts as separate ones: each is a range of the fused tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ....errors import CheckpointError
from ....io.tensors.refs import TensorRef
from ....methods.kernel.access import TransposedSlice
from ..logical import LogicalTensor, Part
from .layouts import ExpertLayout
from .sizes import ExpertSizes, check_tensor
from .storage import owner_of

Tensors = tuple[dict[str, TensorRef], list[LogicalTensor]]
"""Stored tensors by name, and the values that are computed from them."""


def separate_tensors(
    model: str, tensors: Mapping[str, TensorRef], owners: Collection[str], layout: ExpertLayout, sizes: ExpertSizes
) -> Tensors:
    """Return the tensors of a model with the fused experts of some owners as separate ones.

    Args:
        model: name of the model, for errors.
        tensors: the stored tensors by name.
        owners: owners of the experts, such as ``model.layers.3.``.
        layout: layout of the model's architecture.
        sizes: sizes of the experts.

    Raises:
        CheckpointError: a fused tensor is missing, or doesn't have the shape that config.json gives.
    """
    fused = {f"{layout.fused}.{role}_proj{bias}": (role, bool(bias)) for role, bias in _fused_roles(layout)}
    _check_known(model, tensors, owners, layout, fused)
    _check_complete(model, tensors, owners, fused)
    renamed = {new: old for old, new in layout.renamed}
    stored: dict[str, TensorRef] = {}
    values: list[LogicalTensor] = []
    for name, ref in tensors.items():
        owner = owner_of(name)
        rest = name[len(owner) :]
        if owner not in owners or (rest not in fused and rest not in renamed):
            stored[name] = ref
        elif rest in renamed:
            stored[owner + renamed[rest]] = ref
        else:
            role, bias = fused[rest]
            first = tensors[f"{owner}{layout.fused}.gate_up_proj"]
            check_tensor(model, name, ref, sizes.fused(layout, role, bias=bias), first.dtype)
            for expert in range(sizes.experts):
                whole, prefix = _expert(ref, expert), f"{owner}{layout.separate}.{expert}."
                if (layout.interleaved and role == "gate_up") if bias else layout.transposed:
                    part = Part(f"{name}[{expert}]", whole)
                    stored[part.name] = whole
                    values += _turned(prefix, part, role, layout, sizes)
                    continue
                for projection, view in _rows(whole, role, layout, sizes):
                    stored[f"{prefix}{projection}.{'bias' if bias else 'weight'}"] = view
    return stored, values


def _fused_roles(layout: ExpertLayout) -> Iterator[tuple[str, str]]:
    """Yield the role and the ending of each fused tensor."""
    for bias in ("", "_bias") if layout.bias else ("",):
        yield from (("gate_up", bias), ("down", bias))


def _check_known(
    model: str,
    tensors: Mapping[str, TensorRef],
    owners: Collection[str],
    layout: ExpertLayout,
    fused: Collection[str],
) -> None:
    """Raise CheckpointError if the module of the fused experts has other tensors."""
    for name in tensors:
        owner = owner_of(name)
        rest = name[len(owner) :]
        if owner in owners and rest not in fused and rest.startswith(f"{layout.fused}."):
            raise CheckpointError(
                f"tensor {name} of {model} belongs to fused experts, but its architecture has no place for it in "
                f"separate ones (quantized experts have such tensors): use {model} as base_model, or its bfloat16 "
                "version"
            )


def _check_complete(
    model: str, tensors: Mapping[str, TensorRef], owners: Collection[str], fused: Collection[str]
) -> None:
    """Raise CheckpointError unless each owner has all fused tensors."""
    for owner in sorted(owners):
        missing = [owner + rest for rest in fused if owner + rest not in tensors]
        if missing:
            raise CheckpointError(
                f"{model} has fused experts in {owner.rstrip('.') or 'the model'} without {' and '.join(missing)}, "
                "which its architecture has: the experts can't be separated; download the model again"
            )


def _expert(ref: TensorRef, expert: int) -> TensorRef:
    """Return the range of one expert in a fused tensor."""
    nbytes = ref.nbytes // ref.shape[0]
    return TensorRef(ref.file, ref.offset + expert * nbytes, nbytes, ref.dtype, ref.shape[1:])


def _rows(whole: TensorRef, role: str, layout: ExpertLayout, sizes: ExpertSizes) -> Iterator[tuple[str, TensorRef]]:
    """Yield the projections whose rows follow each other, with their names."""
    if role == "down":
        yield layout.down, whole
        return
    nbytes = whole.nbytes // 2
    shape = (sizes.rows, *whole.shape[1:])
    yield layout.gate, TensorRef(whole.file, whole.offset, nbytes, whole.dtype, shape)
    yield layout.up, TensorRef(whole.file, whole.offset + nbytes, nbytes, whole.dtype, shape)


def _turned(prefix: str, part: Part, role: str, layout: ExpertLayout, sizes: ExpertSizes) -> Iterator[LogicalTensor]:
    """Yield the projections of one expert whose rows are columns of the stored tensor, or its interleaved biases."""
    ref = part.ref
    bias = len(ref.shape) == 1
    ending = "bias" if bias else "weight"
    if role == "down":
        access = TransposedSlice(0, sizes.hidden)
        yield LogicalTensor(
            f"{prefix}{layout.down}.{ending}", (sizes.hidden, sizes.rows), ref.dtype, (Part(part.name, ref, access),)
        )
        return
    step, distance = (2, 1) if layout.interleaved else (1, sizes.rows)
    for number, projection in enumerate((layout.gate, layout.up)):
        # a bias is one row, whose elements are columns
        access = TransposedSlice(number * distance, step if bias else 2 * sizes.rows, 1 if bias else step)
        shape = (sizes.rows,) if bias else (sizes.rows, sizes.hidden)
        yield LogicalTensor(f"{prefix}{projection}.{ending}", shape, ref.dtype, (Part(part.name, ref, access),))
