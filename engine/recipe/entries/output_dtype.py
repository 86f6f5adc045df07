"""The dtypes of a stage's output: `out_dtype` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ....io.tensors.dtypes import DType
from ..nodes import Keys
from .block_format import BlockFormat


class Stored(Enum):
    """Stands for the dtype in which the base model, or else the first input, stores a tensor."""

    SAME = "same"


Wanted = DType | Stored | BlockFormat
"""What a recipe can ask for: a dtype, that of the donor, or blocks of 8-bit codes."""


@dataclass(frozen=True, slots=True)
class DtypeRule:
    """The dtype of the tensors whose name in the output contains `filter`; of all if that is ``*`` or None.

    Args:
        filter: substring of tensor names, or None.
        value: the dtype or format. Blocks are only for weights that can be stored so; all others have the dtype of the
            next rule that matches.
        place: key path of the filter in the recipe.
    """

    filter: str | None
    value: Wanted
    place: Keys = field(default=(), compare=False)

    def matches(self, name: str) -> bool:
        """Whether the rule is for the output tensor `name`."""
        return self.filter in (None, "", "*") or str(self.filter) in name

    @property
    def is_final(self) -> bool:
        """Whether the rule applies to all tensors, so none after it is reached."""
        return self.matches("") and not isinstance(self.value, BlockFormat)


@dataclass(frozen=True, slots=True)
class OutputDtype:
    """The dtypes of a stage's output.

    Args:
        rules: the rules; the first that matches a tensor's name applies. Without one, the tensor's dtype is that of a
            stage without `out_dtype`.
    """

    rules: tuple[DtypeRule, ...]

    @classmethod
    def of(cls, value: Wanted) -> OutputDtype:
        """The same dtype or format for all tensors."""
        return cls((DtypeRule(None, value),))

    def rule(self, name: str) -> DtypeRule | None:
        """The rule for an output tensor, or None."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    @property
    def is_constant(self) -> bool:
        """Whether one rule applies to all tensors."""
        return self.rules[0].is_final

    @property
    def constant(self) -> DType | None:
        """The dtype of all tensors; None if it depends on the tensor."""
        value = self.rules[0].value
        return value if self.is_constant and isinstance(value, DType) else None

    @property
    def blocks(self) -> DtypeRule | None:
        """The first rule that asks for blocks; None without one."""
        return next((rule for rule in self.rules if isinstance(rule.value, BlockFormat)), None)
