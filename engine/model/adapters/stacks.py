"""Adapters of fused experts (``target_parameters`` of PEFT): which parameters they change, and their factors.

A module with several adapted parameters is wrapped once for each, in the order in which it defines them, so the first
one is the innermost. The file does not name the parameters: they follow from `target_parameters` and that order.

For E experts, A is [E * rank, in], one expert after the other; B is [out, rank * E], and the columns of all experts
take turns. PEFT up to 0.18 takes the dimensions of a parameter [E, d1, d2] for (in, out). From 0.19 on it takes them
for (out, in), except in modules that are marked as transposed. (peft, ``tuners/lora/layer.py``, `ParamWrapper`, and
``tuners/tuners_utils.py``, `_inject_parameters`.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.units import plural
from ....methods.kernel.access import ColumnFactor, RowFactor, Shape
from ..experts.layouts import LAYOUTS, ExpertLayout, text_config_of
from ..logical import Part, Tensors, kind_of
from .changes import WRAPPED, A, B, Stored
from .loaded import Adapter
from .matching import TensorNames

_ORDER = ("gate_up_proj", "down_proj")
"""The parameters of fused experts, in the order in which transformers' modules define them."""
_MARKED_TRANSPOSED = frozenset(("gpt_oss",))
"""Values of `model_type` whose experts are marked with ``is_transposed`` in transformers."""
_BY_OUTPUT = (0, 19)
"""The version of PEFT from which on parameters are [E, out, in]."""


class StackFactors(NamedTuple):
    """The factors of what is added to one tensor.

    Args:
        name: name of the tensor.
        parts: the left factor and the right one.
        parameter: name of the adapted parameter, for its scale.
        rank: the rank.
    """

    name: str
    parts: tuple[Part, ...]
    parameter: str
    rank: int


class _Lines(NamedTuple):
    """How a factor is stored: the distances of its lines, of the elements of a line, and of its matrices."""

    stored: Stored
    line: int
    rank: int
    matrix: int


@dataclass(frozen=True)
class StackMatcher:
    """Finds the tensors of fused experts that an adapter changes, whether the checkpoint stores them fused or not.

    Args:
        adapter: the adapter.
        base: checkpoint of the model.
        tensors: tensors of the model.
        names: their names.
    """

    adapter: Adapter
    base: Checkpoint
    tensors: Tensors
    names: TensorNames

    def is_stack(self, module: str) -> bool:
        """Whether a module of the adapter is a wrapper of a parameter of `target_parameters`."""
        return bool(self.adapter.config.target_parameters) and bool(self._parameters(_root(module)))

    def factors(self, modules: Mapping[str, Mapping[str, Stored]]) -> Iterator[StackFactors]:
        """Yield the factors for each changed tensor.

        Args:
            modules: the tensors of each wrapper by role.

        Raises:
            CheckpointError: the architecture or the orientation is unknown, tensors are missing, or shapes don't fit.
        """
        roots: dict[str, list[str]] = {}
        for module in modules:
            roots.setdefault(_root(module), []).append(module)
        for root, wrappers in roots.items():
            parameters = self._parameters(root)
            if len(parameters) != len(wrappers):
                raise self._error(
                    f"has {plural(len(wrappers), 'adapted parameter')} of {root}, but target_parameters names "
                    f"{len(parameters)} ({', '.join(parameters)})"
                )
            innermost = sorted(wrappers, key=lambda each: -each.count(WRAPPED))
            for parameter, wrapper in zip(parameters, innermost, strict=True):
                yield from self._of_parameter(root, parameter, modules[wrapper])

    def _parameters(self, root: str) -> list[str]:
        """The adapted parameters of a module, in the order of their wrappers."""
        targets = self.adapter.config.target_parameters
        return [
            name
            for name in _ORDER
            if any(f"{root}.{name}" == target or f"{root}.{name}".endswith(f".{target}") for target in targets)
        ]

    def _of_parameter(self, root: str, parameter: str, stored: Mapping[str, Stored]) -> Iterator[StackFactors]:
        if missing := next((role for role in (A, B) if role not in stored), None):
            raise self._error(f"lacks {missing} of {root}.{parameter}: the file is incomplete; download it again")
        full = f"{root}.{parameter}"
        kind, layout = self._layout(full)
        fused = self.names.candidates(full)
        if len(fused) == 1:
            shape = kind_of(self.tensors, fused[0]).shape
            rows, columns, rank = self._oriented(full, kind, shape, stored)
            yield StackFactors(fused[0], self._parts(rows, columns, rank), full, rank)
        else:
            yield from self._separate(root, parameter, kind, layout, stored)

    def _layout(self, parameter: str) -> tuple[str, ExpertLayout]:
        kind = text_config_of(self.base.config).get("model_type")
        layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
        if layout is None:
            raise self._error(
                f"changes fused experts ({parameter}), and their layout is unknown for model_type {kind!r} in the "
                f"config.json of {self.base.path}: merge the adapter with PEFT (merge_and_unload)"
            )
        return str(kind), layout

    def _separate(
        self, root: str, parameter: str, kind: str, layout: ExpertLayout, stored: Mapping[str, Stored]
    ) -> Iterator[StackFactors]:
        """Yield the factors for each projection of separate experts: slices of those of the fused ones."""
        owner = root.removesuffix(layout.fused)
        projections = (layout.down,) if parameter == "down_proj" else (layout.gate, layout.up)
        names: list[list[str]] = []
        while found := [self._one(f"{owner}{layout.separate}.{len(names)}.{each}.weight") for each in projections]:
            if None in found:
                break
            names.append([name for name in found if name is not None])
        if not names:
            raise self._error(
                f"changes {root}.{parameter}, but {self.base.path} has neither such a tensor nor "
                f"{owner}{layout.separate}.0.{projections[0]}.weight"
            )
        height, width = kind_of(self.tensors, names[0][0]).shape
        height *= len(projections)
        shape = (len(names), width, height) if layout.transposed else (len(names), height, width)
        rows, columns, rank = self._oriented(f"{root}.{parameter}", kind, shape, stored)
        if layout.transposed:
            rows, columns = columns, rows
        step = len(projections) if layout.interleaved else 1
        for expert, own in enumerate(names):
            for number, name in enumerate(own):
                first = number if layout.interleaved else number * height // len(projections)
                yield StackFactors(
                    name,
                    self._parts(
                        rows._replace(line=rows.line * step, matrix=0),
                        columns._replace(matrix=0),
                        rank,
                        (expert * rows.matrix + first * rows.line, expert * columns.matrix),
                    ),
                    f"{root}.{parameter}",
                    rank,
                )

    def _one(self, name: str) -> str | None:
        candidates = self.names.candidates(name)
        return candidates[0] if len(candidates) == 1 else None

    def _oriented(
        self, parameter: str, kind: str, shape: Shape, stored: Mapping[str, Stored]
    ) -> tuple[_Lines, _Lines, int]:
        """The factors of the rows and of the columns of a fused tensor, and the rank."""
        a, b = stored[A], stored[B]
        shapes = f"{list(a.ref.shape)} and {list(b.ref.shape)}"
        if len(shape) != 3 or len(a.ref.shape) != 2 or len(b.ref.shape) != 2 or a.ref.shape[0] % shape[0]:
            raise self._error(f"has factors of shapes {shapes} for {parameter} of shape {list(shape)}")
        experts, rank, into = shape[0], a.ref.shape[0] // shape[0], a.ref.shape[1]
        fitting = [
            by_output
            for by_output in (True, False)
            if (a.ref.shape[1], *b.ref.shape)
            == (shape[2 if by_output else 1], shape[1 if by_output else 2], rank * experts)
        ]
        version = self.adapter.config.version
        if version is not None:
            wanted = version >= _BY_OUTPUT and kind not in _MARKED_TRANSPOSED
            fitting = [by_output for by_output in fitting if by_output == wanted]
        if len(fitting) != 1:
            reason = (
                "the shapes fit in both orientations, and the config doesn't say which version of PEFT wrote it; add "
                "its peft_version to adapter_config.json"
                if fitting
                else f"these don't fit{'' if version is None else ' in the layout of its version of PEFT'}"
            )
            raise self._error(f"has factors of shapes {shapes} for {parameter} of shape {list(shape)}: {reason}")
        of_a = _Lines(a, 1, into, rank * into)
        of_b = _Lines(b, rank * experts, experts, 1)
        return (of_b, of_a, rank) if fitting[0] else (of_a, of_b, rank)

    def _parts(self, rows: _Lines, columns: _Lines, rank: int, offsets: tuple[int, int] = (0, 0)) -> tuple[Part, ...]:
        owner = self.adapter.reference
        left = RowFactor(rank, rows.line, rows.rank, rows.matrix, offsets[0])
        right = ColumnFactor(rank, columns.line, columns.rank, columns.matrix, offsets[1])
        return (
            Part(rows.stored.name, rows.stored.ref, left, owner=owner),
            Part(columns.stored.name, columns.stored.ref, right, owner=owner),
        )

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.adapter.name} {problem}")


def _root(module: str) -> str:
    """The path of a module without the wrappers around it."""
    while module.endswith(WRAPPED):
        module = module.removesuffix(WRAPPED)
    return module
