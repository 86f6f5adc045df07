"""The dtype of each output tensor of a stage: what the recipe sets, or the promoted dtype of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ....io.tensors.dtypes import F32, F64, DType
from ..types import Stage
from .block_format import BlockFormat
from .output_dtype import DtypeRule, Wanted

Refuse = Callable[[str, tuple[int, ...], BlockFormat], str]
"""Function of a tensor's name and shape and of a format: why the tensor can't be stored in it; empty if it can."""


class OutputDtypes:
    """Looks up `out_dtype` and `dtype` of a stage for each output tensor.

    Args:
        stage: the stage.
        refuse: says which tensors can't be stored as blocks.

    Attributes:
        refuse: the argument.
        blocks: the format that the recipe asks for, for some of the tensors at least; None if it asks for none.
        encoded: the rules that ask for it and apply to at least one tensor.
        refused: for each rule that asks for it, why tensors can't be stored so, with the first such tensor.
    """

    def __init__(self, stage: Stage, refuse: Refuse) -> None:
        self._rules = stage.out_dtype
        self._otherwise = stage.dtype
        self._constant = stage.out_dtype is None or stage.out_dtype.is_constant
        self.refuse = refuse
        self.blocks = requested_blocks(stage)
        self.encoded: set[DtypeRule] = set()
        self.refused: dict[DtypeRule, dict[str, str]] = {}

    def key(self, name: str, shape: tuple[int, ...]) -> object:
        """What distinguishes output tensors for which `of` differs."""
        return None if self._constant else self.of(name, shape)

    def of(self, name: str, shape: tuple[int, ...]) -> Wanted | None:
        """The dtype or format of an output tensor; None if the recipe doesn't set it."""
        for rule in () if self._rules is None else self._rules.rules:
            if not rule.matches(name):
                continue
            if not isinstance(rule.value, BlockFormat):
                return rule.value
            reason = self.refuse(name, shape, rule.value)
            if not reason:
                self.encoded.add(rule)
                return rule.value
            self.refused.setdefault(rule, {}).setdefault(reason, name)
        return self._otherwise


def nominal_dtype(stage: Stage) -> DType | None:
    """The dtype that a stage sets for all of its tensors; None if it sets none, or several."""
    return stage.dtype if stage.out_dtype is None else stage.out_dtype.constant


def requested_blocks(stage: Stage) -> BlockFormat | None:
    """The format of blocks that a stage asks for, for some of its tensors at least; None if it asks for none."""
    rule = None if stage.out_dtype is None else stage.out_dtype.blocks
    return rule.value if rule is not None and isinstance(rule.value, BlockFormat) else None


def rounds(stage: Stage, name: str) -> bool:
    """Whether `out_dtype` of a stage sets the dtype of an output tensor, so other stages use its rounded values."""
    return stage.out_dtype is not None and stage.out_dtype.rule(name) is not None


def promote(dtypes: Iterable[DType]) -> DType:
    """Promote floating-point dtypes as torch does; different 8-bit dtypes give float32."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    wide = {dtype for dtype in distinct if dtype.bits >= 16}
    for candidate in (F64, F32):
        if candidate in wide:
            return candidate
    if len(wide) == 1:
        return wide.pop()
    return F32
