"""Reads `out_dtype` of a recipe: a dtype, ``same``, or a filter list of these."""

from __future__ import annotations

from collections.abc import Mapping

from ....io.tensors.dtypes import DType
from ..node_reader import DTYPES, NodeReader
from ..nodes import Keys, Node
from ..parameters import describe
from ..warnings import WarningKind
from .output_dtype import DtypeRule, OutputDtype

SAME = "same"
"""Name of the dtype in which the base model, or else the first input, stores a tensor."""


def read_output_dtype(reader: NodeReader, node: Node, path: Keys) -> OutputDtype:
    """Read the value of `out_dtype`.

    Raises:
        RecipeError: if it is neither a dtype, nor ``same``, nor a list of conditions with these as values.
    """
    if isinstance(node.value, Mapping):
        return OutputDtype((_rule(reader, node, path),))
    if not isinstance(node.value, tuple):
        return OutputDtype((DtypeRule(None, _dtype(reader, node, path), path),))
    rules: list[DtypeRule] = []
    for index, child in enumerate(reader.entries(node, path, "conditions: `{filter: lm_head, value: float32}`")):
        here = (*path, index)
        if not isinstance(child.value, Mapping):
            advice = f"; for all other tensors, write `{{value: {child.value}}}`" if index else ""
            expected = "a condition, such as `{filter: lm_head, value: float32}`"
            raise reader.error(f"expected {expected}, got {describe(child.plain())}{advice}", here)
        if rules and rules[-1].matches(""):
            message = "it is never reached: the condition before it matches every tensor"
            reader.warn(WarningKind.UNREACHABLE, message, here)
        rules.append(_rule(reader, child, here))
    return OutputDtype(tuple(rules))


def _rule(reader: NodeReader, node: Node, path: Keys) -> DtypeRule:
    known = ("filter", "value")
    keys = reader.mapping(node, path, "a condition")
    value = reader.required(keys, path, "value", known)
    reader.check_keys(keys, path, known)
    text = reader.optional(keys, path, "filter", lambda n, p: reader.text(n, p, "a substring of tensor names"))
    return DtypeRule(text, _dtype(reader, value, (*path, "value")), (*path, "filter"))


def _dtype(reader: NodeReader, node: Node, path: Keys) -> DType | None:
    return None if node.value == SAME else reader.dtype(node, path, (*DTYPES, SAME))
