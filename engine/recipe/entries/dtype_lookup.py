"""The dtype of each output tensor of a stage: what the recipe sets, or the promoted dtype of the inputs."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from ....io.tensors.dtypes import F32, F64, DType
from ..types import Stage


class Stored(Enum):
    """Stands for the dtype in which the base model, or else the first input, stores a tensor."""

    SAME = "same"


class OutputDtypes:
    """Looks up `out_dtype` and `dtype` of a stage for each output tensor.

    Args:
        stage: the stage.
    """

    def __init__(self, stage: Stage) -> None:
        self._rules = stage.out_dtype
        self._otherwise = stage.dtype
        self._constant = stage.out_dtype is None or stage.out_dtype.is_constant

    def key(self, name: str) -> object:
        """What distinguishes output tensors for which `of` differs."""
        return None if self._constant else self.of(name)

    def of(self, name: str) -> DType | Stored | None:
        """The dtype of an output tensor; None if the recipe doesn't set it."""
        rule = None if self._rules is None else self._rules.rule(name)
        if rule is None:
            return self._otherwise
        return rule.dtype or Stored.SAME


def nominal_dtype(stage: Stage) -> DType | None:
    """The dtype that a stage sets for all of its tensors; None if it sets none, or several."""
    return stage.dtype if stage.out_dtype is None else stage.out_dtype.constant


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
