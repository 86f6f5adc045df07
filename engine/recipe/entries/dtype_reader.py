"""Reads `out_dtype` of a recipe: a dtype, ``same``, FP8 blocks, or a filter list of these."""

from __future__ import annotations

from collections.abc import Mapping

from ..node_reader import DTYPES, NodeReader
from ..nodes import Keys, Node
from ..parameters import describe
from ..warnings import WarningKind
from .block_format import BLOCKS, SCALES, BlockFormat, scales_named
from .output_dtype import DtypeRule, OutputDtype, Stored, Wanted

SAME = "same"
"""Name of the dtype in which the base model, or else the first input, stores a tensor."""
_FORM = "`{format: fp8_blocks, block: [128, 128], scales: float32}`"


def read_output_dtype(reader: NodeReader, node: Node, path: Keys) -> OutputDtype:
    """Read the value of `out_dtype`.

    Raises:
        RecipeError: if it is neither a dtype, nor ``same``, nor a format, nor a list of conditions with these.
    """
    if isinstance(node.value, Mapping) and "format" not in node.value:
        return OutputDtype((_rule(reader, node, path),))
    if not isinstance(node.value, tuple):
        return OutputDtype((DtypeRule(None, _value(reader, node, path), path),))
    rules: list[DtypeRule] = []
    for index, child in enumerate(reader.entries(node, path, "conditions: `{filter: lm_head, value: float32}`")):
        here = (*path, index)
        if not isinstance(child.value, Mapping):
            advice = f"; for all other tensors, write `{{value: {child.value}}}`" if index else ""
            expected = "a condition, such as `{filter: lm_head, value: float32}`"
            raise reader.error(f"expected {expected}, got {describe(child.plain())}{advice}", here)
        if rules and rules[-1].is_final:
            message = "it is never reached: the condition before it matches every tensor"
            reader.warn(WarningKind.UNREACHABLE, message, here)
        rules.append(_rule(reader, child, here))
    _check_formats(reader, rules)
    return OutputDtype(tuple(rules))


def _check_formats(reader: NodeReader, rules: list[DtypeRule]) -> None:
    """Check that all rules ask for the same format."""
    formats = {rule.value: rule for rule in reversed(rules) if isinstance(rule.value, BlockFormat)}
    if len(formats) > 1:
        second, first = sorted(formats.values(), key=rules.index, reverse=True)[:2]
        message = "config.json describes one size of blocks and one dtype of scales for the model: use the same format"
        raise reader.error(message, second.place, first.place)


def _rule(reader: NodeReader, node: Node, path: Keys) -> DtypeRule:
    known = ("filter", "value")
    keys = reader.mapping(node, path, "a condition")
    value = reader.required(keys, path, "value", known)
    reader.check_keys(keys, path, known)
    text = reader.optional(keys, path, "filter", lambda n, p: reader.text(n, p, "a substring of tensor names"))
    return DtypeRule(text, _value(reader, value, (*path, "value")), (*path, "value" if text is None else "filter"))


def _value(reader: NodeReader, node: Node, path: Keys) -> Wanted:
    if node.value == SAME:
        return Stored.SAME
    if node.value == BLOCKS:
        return BlockFormat()
    if isinstance(node.value, Mapping):
        return _format(reader, node, path)
    return reader.dtype(node, path, (*DTYPES, SAME, BLOCKS))


def _format(reader: NodeReader, node: Node, path: Keys) -> BlockFormat:
    """Read a format with its parameters."""
    known = ("format", "block", "scales")
    keys = reader.mapping(node, path, f"a format, such as {_FORM}")
    name = reader.text(reader.required(keys, path, "format", known), (*path, "format"), "the name of a format")
    reader.check_keys(keys, path, known)
    if name != BLOCKS:
        raise reader.error(
            f"unknown format {describe(name)}; the only one is {BLOCKS}, as in {_FORM}", (*path, "format")
        )
    made = BlockFormat()
    rows, columns = reader.optional(keys, path, "block", lambda n, p: _block(reader, n, p)) or (made.rows, made.columns)
    scales = reader.optional(keys, path, "scales", lambda n, p: _scales(reader, n, p)) or "float32"
    return BlockFormat(rows, columns, scales_named(scales))


def _block(reader: NodeReader, node: Node, path: Keys) -> tuple[int, int]:
    """Read the rows and columns of a block."""
    value = node.plain()
    numbers = [each for each in value if type(each) is int and each > 0] if isinstance(value, list) else []
    if not isinstance(value, list) or not len(numbers) == len(value) == 2:
        raise reader.error(f"expected the rows and columns of a block, such as [128, 128], got {describe(value)}", path)
    return numbers[0], numbers[1]


def _scales(reader: NodeReader, node: Node, path: Keys) -> str:
    """Read the dtype of scales."""
    name = reader.text(node, path, f"one of {', '.join(SCALES)}").removeprefix("torch.")
    if name not in SCALES:
        raise reader.error(f"scales can be {', '.join(SCALES)}, not {describe(name)}", path)
    return name
