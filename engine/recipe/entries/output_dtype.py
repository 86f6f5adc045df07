"""The dtypes of a stage's output: `out_dtype` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from ....io.tensors.dtypes import DType
from ..nodes import Keys


@dataclass(frozen=True, slots=True)
class DtypeRule:
    """The dtype of the tensors whose name in the output contains `filter`; of all if that is ``*`` or None.

    Args:
        filter: substring of tensor names, or None.
        dtype: the dtype; None for the stored one (``same``).
        place: key path of the filter in the recipe.
    """

    filter: str | None
    dtype: DType | None
    place: Keys = field(default=(), compare=False)

    def matches(self, name: str) -> bool:
        """Whether the rule is for the output tensor `name`."""
        return self.filter in (None, "", "*") or str(self.filter) in name


@dataclass(frozen=True, slots=True)
class OutputDtype:
    """The dtypes of a stage's output.

    Args:
        rules: the rules; the first that matches a tensor's name applies. Without one, the tensor's dtype is that of a
            stage without `out_dtype`.
    """

    rules: tuple[DtypeRule, ...]

    @classmethod
    def of(cls, dtype: DType | None) -> OutputDtype:
        """The same dtype for all tensors; None for ``same``."""
        return cls((DtypeRule(None, dtype),))

    def rule(self, name: str) -> DtypeRule | None:
        """The rule for an output tensor, or None."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    @property
    def is_constant(self) -> bool:
        """Whether one rule applies to all tensors."""
        return self.rules[0].matches("")

    @property
    def constant(self) -> DType | None:
        """The dtype of all tensors; None if it depends on the tensor."""
        return self.rules[0].dtype if self.is_constant else None
