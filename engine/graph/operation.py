"""What the nodes of a task graph do with their sources."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from ...io.tensors.dtypes import DTYPES, DType
from ...methods.kernel.access import ALIGNED, Access, Shape
from ...methods.kernel.kernel import Kernel, Traceable
from ...methods.kernel.method import Method
from ...methods.kernel.reduction.survival import Compared
from ...methods.kernel.spec import Base, InputSpec
from ..model.logical import Encoding


class Kind(Enum):
    """How an operation computes its output."""

    COPY = "copy"  # the source's bytes, unchanged
    REQUIRE_EQUAL = "same"  # the sources' bytes, which must be equal (integer tensors)
    MERGE = "merge"  # a kernel: a method, a decoder, or several of them in one
    RESULT = "result"  # another tensor that the node before it computes


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation on the sources of a node, shared by all nodes with equal operations.

    Args:
        kind: how the output is computed.
        method: name of the merge method, for display.
        parameters: the resolved parameters as (name, value); a per-input value is a tuple.
        base: index of the base model among the sources, or None.
        positions: for each source, the index of its model in the recipe, for random keys.
        kernel: the method bound to inputs and parameters; None if the source is copied.
        copied: for each source, how the output uses its elements if nothing is computed; all `ALIGNED` if empty.
        made: which elements of a `RESULT` are made with a range of the elements of the node before it.
    """

    kind: Kind
    method: str
    parameters: tuple[tuple[str, Any], ...] = ()
    base: int | None = None
    positions: tuple[int, ...] = ()
    kernel: Kernel | None = None
    copied: tuple[Access, ...] = ()
    made: Access = ALIGNED

    @property
    def copies_tensor(self) -> bool:
        """Whether the output is all bytes of a stored tensor, which a file system can share or copy itself."""
        return self.kind is Kind.COPY and not self.copied

    @property
    def accesses(self) -> tuple[Access, ...]:
        """For each source, how the output uses its elements; empty if all are `ALIGNED`."""
        return self.copied if self.kernel is None else self.kernel.inputs.accesses

    @property
    def passes(self) -> int:
        """Number of passes over the sources: the reductions, and the pass that computes the output."""
        return 1 if self.kernel is None else self.kernel.reductions + 1


def result_of(operation: Operation, shape: Shape, place: int, own: Shape) -> Operation:
    """Return the operation that stands for another tensor that an operation computes.

    Args:
        operation: the operation.
        shape: shape of the first tensor.
        place: number of the tensor, from 1.
        own: shape of the tensor.

    Raises:
        ValueError: the tensor does not have one element for each of the first one's, or for each of its blocks.
    """
    blocks = None if operation.kernel is None else operation.kernel.blocks[place]
    made: Access = blocks or ALIGNED
    if not made.part_shape_fits(shape, own) or (0 in shape and 0 not in own):
        raise ValueError(f"a tensor of shape {list(own)} cannot be computed with one of {list(shape)} by {made}")
    return Operation(Kind.RESULT, operation.method, made=made)


def dtype_of_numbers(dtype: DType) -> DType:
    """The dtype in which the numbers of a `RESULT` are computed, by the dtype in a file's header.

    Bytes are the exponents of scales: what F8_E8M0 stores, under the name that libraries without this dtype read.
    """
    return DTYPES["F8_E8M0"] if dtype.name == "U8" else dtype


class Resolved(NamedTuple):
    """The node of output tensors whose inputs are of the same classes, with the same parameters.

    Args:
        operation: the operation.
        kept: indices of the inputs that the output depends on.
        reason: why the others are not used.
        dtype: dtype of the output.
        random: whether the node needs a random key.
        encoding: how the output is stored as codes and scales; None if it is stored in `dtype`.
        like_donor: whether codes and scales have the names that they have in the donor.
    """

    operation: Operation
    kept: tuple[int, ...]
    reason: str
    dtype: DType
    random: bool
    encoding: Encoding | None = None
    like_donor: bool = True


class Operations:
    """Binds methods to inputs and parameters. Equal operations are the same object."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Operation] = {}
        self._kernels: dict[Hashable, Kernel] = {}  # of expressions that are the same for all shapes

    def of(
        self,
        method: Method,
        values: Mapping[str, Any],
        base: int | None,
        shape: tuple[int, ...],
        positions: tuple[int, ...],
        compared: tuple[int, str] | None = None,
    ) -> Operation:
        """Bind a method.

        Args:
            method: the method.
            values: the parameters (see `Method.kernel`).
            base: index of the base model among the inputs, or None.
            shape: shape of the output.
            positions: for each input, the index of its model in the recipe.
            compared: index of the input that the output is compared with, and torch's name of the dtype that it is
                rounded to; None for no comparison.

        Raises:
            MethodError: a value or the number of inputs is invalid.
        """
        if method.base is Base.NONE:
            base = None
        parameters = tuple(values.items())
        key = (method.name, parameters, base, shape, positions, compared)
        known = self._known.get(key)
        if known is not None:
            return known
        kernel = self._kernel(method, parameters, InputSpec(len(positions), base, shape), compared)
        shown = tuple(
            (name, tuple(value[index] for index in kernel.kept) if isinstance(value, tuple) else value)
            for name, value in parameters
        )
        drawn = tuple(positions[index] for index in kernel.kept) if kernel.random else ()
        operation = Operation(Kind.MERGE, method.name, shown, kernel.inputs.base, drawn, kernel)
        if not kernel.random:  # only the number of models matters, not which
            equal = (method.name, parameters, base, shape, len(positions), compared)
            operation = self._known.setdefault(equal, operation)
        self._known[key] = operation
        return operation

    def _kernel(
        self,
        method: Method,
        parameters: tuple[tuple[str, Any], ...],
        inputs: InputSpec,
        compared: tuple[int, str] | None,
    ) -> Kernel:
        """The kernel of a method without inputs that it doesn't use; traced once if it is the same for all shapes."""
        key = (method.name, parameters, inputs.base, inputs.count, compared)
        if key in self._kernels:
            return self._kernels[key].resized(inputs.shape)
        traced: Traceable = method if compared is None else Compared(method, *compared)
        kernel = traced.kernel(inputs, dict(parameters)).with_used_inputs()
        if kernel.any_shape:
            self._kernels[key] = kernel
        return kernel
