"""The warnings about models, as data: what is suspicious, in which tensors or keys, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from ...errors import CheckpointError, Location
from ...io.units import plural


class ModelWarningKind(Enum):
    """The kinds of warnings about models."""

    ADAPTER = "adapter"
    BUFFER = "buffer"
    CONFIG_DIFFERS = "config differs"
    CONFIG_CHANGED = "config changed"
    DTYPE = "dtype"
    DUPLICATE_MODEL = "duplicate model"
    FILES = "files"
    FILTER = "filter"
    HEAD = "head"
    LAYER_RULE = "layer rule"
    LAYER_TENSORS = "layer tensors"
    MACHINE = "machine"
    OPTIONAL_TENSOR = "optional tensor"
    PREDICTION_LAYERS = "prediction layers"
    QUANTIZATION = "quantization"
    TEMPLATE = "template"
    TOKENS = "tokens"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True, slots=True)
class ModelWarning:
    """Something suspicious in a model, or between models, that does not prevent the merge.

    Args:
        kind: kind of the problem.
        problem: description of the problem, which names the models.
        advice: what to do about it, or empty.
        names: tensors or keys concerned.
        location: location of the entry in the recipe that causes the problem, or None.
    """

    kind: ModelWarningKind
    problem: str
    advice: str = ""
    names: tuple[str, ...] = field(default=(), repr=False)
    location: Location | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Location, problem and advice in one line."""
        return self.text if self.location is None else f"{self.location}: {self.text}"

    @property
    def text(self) -> str:
        """Problem and advice, without the location."""
        return f"{self.problem}; {self.advice}" if self.advice else self.problem


def strict_error(warnings: Sequence[ModelWarning]) -> CheckpointError:
    """The error to raise instead of warnings in strict mode.

    Args:
        warnings: the warnings, at least one.
    """
    lines = "".join(f"\n  {warning}" for warning in warnings)
    return CheckpointError(f"{plural(len(warnings), 'warning')}, which strict mode treats as errors:{lines}")
