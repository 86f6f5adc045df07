"""Finds the tensors of a model in what ``torch.save`` saved, and where each lies in the file."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from sys import intern
from typing import Any

from ..open_source import quoted
from ..tensors.refs import TensorClass
from ..tensors.views import View
from .objects import StoredTensor, Unsupported, shown

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
"""Keys under which training programs save the tensors of a model, next to the state of the training."""

_PLAIN = (str, int, float, bytes, type(None))  # values that may be next to tensors; bool is an int
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The tensors of a file in columns, ordered by offset.

    Args:
        file: the file.
        names: the names, interned.
        classes: the class of each tensor; that of a view is one-dimensional.
        offsets: the position of each tensor's first byte in the file, in bytes.
        views: the tensors whose elements are in another order, by name.
        remarks: what else is in the file, one sentence for each.
        metadata: what a safetensors file with the same tensors would have for ``__metadata__``.
        kind: the format, for display.
        digest: digest of everything in the file that is not values of tensors.
    """

    file: Path
    names: Sequence[str]
    classes: Sequence[TensorClass]
    offsets: Sequence[int]
    views: Mapping[str, View]
    remarks: tuple[str, ...]
    metadata: Mapping[str, str]
    kind: str
    digest: bytes


def find_tensors(saved: object) -> tuple[dict[str, StoredTensor], str]:
    """Find the tensors of a model in a saved object.

    That is a dictionary of tensors, or one that has such a dictionary under one of the `WRAPPERS`. Numbers and texts
    next to tensors, and everything next to a wrapped dictionary, are not part of the model.

    Returns:
        The tensors by name, and a text that lists what else is in the object; empty if it has only tensors.

    Raises:
        Unsupported: the object is something else, or it is not clear which tensors are the model's.
    """
    if isinstance(saved, StoredTensor):
        raise Unsupported("is a single tensor without a name")
    if not isinstance(saved, dict):
        raise Unsupported(f"is {shown(saved)}, not a dictionary of tensors")
    wrapped = [key for key in WRAPPERS if _has_tensors(saved.get(key))]
    if _has_tensors(saved):
        if wrapped:
            raise Unsupported(f"has tensors both next to {quoted(wrapped[0])} and in it")
        state, others = saved, []
    elif len(wrapped) == 1:
        state = saved[wrapped[0]]
        others = [quoted(key) for key in saved if key != wrapped[0]]
    elif wrapped:
        raise Unsupported(f"has tensors in {' and '.join(map(quoted, wrapped))}: save only those of the model")
    else:
        raise Unsupported(
            f"has no tensors at its top, and none under {', '.join(map(quoted, WRAPPERS))} (its keys: {_listed(saved)})"
        )
    tensors: dict[str, StoredTensor] = {}
    for name, value in state.items():
        if isinstance(value, StoredTensor) and type(name) is str:
            tensors[intern(name)] = value
        elif isinstance(value, _PLAIN) and type(name) is str:
            others.append(quoted(name))
        else:
            raise Unsupported(f"has {shown(value)} under {quoted(name)}, next to tensors")
    return tensors, ", ".join(others[:_SHOWN]) + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(each, StoredTensor) for each in value.values())


def _listed(saved: Mapping[Any, Any]) -> str:
    keys = list(saved)[:_SHOWN]
    return (", ".join(map(quoted, keys)) or "none") + (", ..." if len(saved) > _SHOWN else "")


def describe(
    file: Path, tensors: Mapping[str, StoredTensor], others: str, starts: Mapping[str, int], kind: str, digest: bytes
) -> TorchFile:
    """Describe the tensors of a file.

    Args:
        file: the file.
        tensors: the tensors by name.
        others: what else is in the file, as `find_tensors` lists it.
        starts: position of each storage's first byte in the file, in bytes, by key.
        kind: the format, for display.
        digest: digest of the metadata.
    """
    rows = []
    classes: dict[TensorClass, TensorClass] = {}
    views: dict[str, View] = {}
    for name, tensor in tensors.items():
        width = tensor.dtype.bits // 8
        elements = prod(tensor.shape)
        shape = tensor.shape
        if elements and not _is_contiguous(tensor.shape, tensor.strides):
            views[name] = View(tensor.shape, tensor.strides)
            pairs = zip(tensor.shape, tensor.strides, strict=True)
            elements = 1 + sum((size - 1) * stride for size, stride in pairs)
            shape = (elements,)
        found = TensorClass(tensor.dtype, shape, elements * width)
        rows.append((starts[tensor.storage.key] + tensor.offset * width, name, classes.setdefault(found, found)))
    rows.sort(key=lambda row: (row[0], row[2].nbytes))
    return TorchFile(
        file=file,
        names=tuple([name for _, name, _ in rows]),
        classes=[found for _, _, found in rows],
        offsets=array("Q", [offset for offset, _, _ in rows]),
        views=views,
        remarks=(f"{file.name}: not used, because they are not tensors of the model: {others}",) if others else (),
        metadata={"format": "pt"},
        kind=kind,
        digest=digest,
    )


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements are in the order of the shape, without gaps."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
