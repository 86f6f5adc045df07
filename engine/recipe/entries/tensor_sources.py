"""Reads ``tensors_from``: the tensors that a stage copies from one model, by parts of their names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..node_reader import NodeReader
from ..nodes import Keys, Node
from ..types import TensorSource

_KNOWN = ("filter", "model")
_EXAMPLE = "`{filter: input_blocks.0.0.weight, model: MODEL}`"


def read_tensor_sources(reader: NodeReader, node: Node, path: Keys) -> tuple[TensorSource, ...]:
    """The entries of ``tensors_from``: a list, or a single entry. Errors are added to the reader's mistakes."""
    if isinstance(node.value, Mapping):
        single = reader.attempt(partial(_entry, reader, node, path), path)
        return () if single is None else (single,)
    entries = reader.entries(node, path, f"entries such as {_EXAMPLE}")
    found = [
        reader.attempt(partial(_entry, reader, child, (*path, index)), (*path, index))
        for index, child in enumerate(entries)
    ]
    return tuple(source for source in found if source is not None)


def _entry(reader: NodeReader, node: Node, path: Keys) -> TensorSource:
    keys = reader.mapping(node, path, f"an entry such as {_EXAMPLE}")
    values = [reader.required(keys, path, key, _KNOWN) for key in _KNOWN]
    reader.check_keys(keys, path, _KNOWN)
    substring = reader.text(values[0], (*path, "filter"), "a substring of tensor names")
    if not substring or substring == "*":
        message = "an entry of `tensors_from` needs a part of tensor names: to copy all tensors of a model, use "
        raise reader.error(f"{message}passthrough", (*path, "filter"))
    return TensorSource(substring, reader.reference(values[1], (*path, "model")), path)
