"""The buffers of a merge, which are copied from one model: what has to be compared with the other models.

Names, shapes and dtypes are compared here. The values are compared when the merge reads data (`execute.check_buffers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ....io.tensors.refs import TensorRef
from ....io.units import listed
from ...model.warnings import ModelWarning, ModelWarningKind

_COUNTERS = ("num_batches_tracked", "version", "_float_tensor")
"""Last components of the names of buffers that differ between any two training runs, or have no effect."""


class StoredBuffer(NamedTuple):
    """A buffer of an input model: the model's number, the tensor's name there, and its place in a file."""

    model: int
    name: str
    ref: TensorRef


@dataclass(frozen=True, slots=True)
class BufferCheck:
    """A buffer of the output.

    Args:
        name: name of the output tensor.
        chosen: the buffer that is copied.
        others: the buffers of the other models with the same shape, which should be equal.
    """

    name: str
    chosen: StoredBuffer
    others: tuple[StoredBuffer, ...]

    @property
    def is_sequence(self) -> bool:
        """Whether the buffer must contain 0, 1, 2 and so on."""
        shape = self.chosen.ref.shape
        return self.name.rpartition(".")[2] == "position_ids" and self.chosen.ref.elements == (shape or (1,))[-1]


class BufferChecks:
    """Collects the buffers of a stage.

    Args:
        models: names of the models, by number.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self.checks: list[BufferCheck] = []
        self._models = models
        self._shapes: dict[tuple[int, int], list[tuple[StoredBuffer, StoredBuffer]]] = {}

    def add(self, name: str, chosen: StoredBuffer, inputs: Iterable[StoredBuffer]) -> None:
        """Add a buffer that is copied from `chosen`, one of the `inputs`."""
        if name.rpartition(".")[2] in _COUNTERS:
            return
        others = []
        for other in inputs:
            if other.ref.shape != chosen.ref.shape:
                self._shapes.setdefault((chosen.model, other.model), []).append((chosen, other))
            elif other != chosen:
                others.append(other)
        check = BufferCheck(name, chosen, tuple(others))
        if others or check.is_sequence:
            self.checks.append(check)

    def warnings(self) -> Iterator[ModelWarning]:
        """The warnings about buffers with different shapes, one for each two models."""
        for (chosen, other), pairs in self._shapes.items():
            first, second = pairs[0]
            yield buffer_warning(
                [pair[0].name for pair in pairs],
                f"has shape {list(first.ref.shape)} in {self._models[chosen]} and {list(second.ref.shape)} in "
                f"{self._models[other]}",
                self._models[chosen],
            )


def buffer_warning(names: Sequence[str], difference: str, chosen: str) -> ModelWarning:
    """The warning about buffers that differ in the same way.

    Args:
        names: names of the buffers.
        difference: description of the difference of the first.
        chosen: name of the model whose buffers are used.
    """
    more = f" ({listed(names[1:])} too)" if len(names) > 1 else ""
    return ModelWarning(
        ModelWarningKind.BUFFER,
        f"buffer {names[0]} {difference}{more}: that of {chosen} is used",
        "if another model has the right one, make it the `base_model`",
        tuple(names),
    )
