"""One output tensor: from the tensors of a slice's sources to a node of the graph, by the rules of mergekit.md."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import CheckpointError
from ...io.safetensors.dtypes import F32, F64, DType
from ...io.safetensors.dtypes import Kind as ElementKind
from ...io.safetensors.tensors import TensorRef
from ...methods.kernel.contract import Absent, Base, Inputs, Kernel, Method, MethodError
from ..model.inputs import BoundSlice, Model
from ..model.layers import is_buffer, is_embedding, is_head, is_optional
from ..recipe.types import Stage
from .graph import Kind, MergeGraph, Operation
from .usage import TensorUsage


class Input(NamedTuple):
    """The tensor of one of a slice's sources."""

    source: int
    model: Model
    name: str
    ref: TensorRef


class TensorRules:
    """Adds output tensors to a graph.

    Args:
        stage: which is built.
        methods: by name.
        graph: to add to.
        account: of the input tensors.
        seed: of the random methods.
    """

    def __init__(
        self,
        stage: Stage,
        methods: Mapping[str, Method],
        graph: MergeGraph,
        account: TensorUsage,
        seed: int,
    ) -> None:
        self._wanted = stage.out_dtype or stage.dtype
        self._methods = methods
        self._method = methods[stage.merge_method]
        self._graph = graph
        self._account = account
        self._seed = seed
        self._written: set[str] = set()
        self._operations: dict[Hashable, Operation] = {}

    def add(
        self, part: BoundSlice, name: str, names: Sequence[str | None], t: float, group: int, *, as_it_is: bool = False
    ) -> None:
        """The node of one output tensor.

        Args:
            part: the slice that it is of.
            name: the output's.
            names: its sources' own names for it; None where a source doesn't have it. One has it.
            t: where its layer stands in a gradient.
            group: see `graph.Output`.
            as_it_is: whether it is taken from its one source without the stage's method.

        Raises:
            RecipeError: where the recipe asks for what the method can't do.
            CheckpointError: where the sources don't fit each other.
        """
        inputs = [
            Input(source, model, found, model.checkpoint.tensors[found])
            for source, (model, found) in enumerate(zip(part.models, names, strict=True))
            if found is not None
        ]
        if is_buffer(name, inputs[0].ref.shape):
            self._add_buffer(part, name, inputs, group)
            return
        passed = as_it_is or (len(inputs) < len(names) and self._without_some(part, name, inputs))
        _check_shapes(name, inputs)
        if any(found.ref.dtype.kind is not ElementKind.FLOAT for found in inputs):
            self._add_integers(part, name, inputs, t, group, passed=passed)
        else:
            self._add_floats(part, name, inputs, t, group, passed=passed)

    # --- kinds of tensors --------------------------------------------------------------------------------------

    def _add_floats(
        self, part: BoundSlice, name: str, inputs: Sequence[Input], t: float, group: int, *, passed: bool
    ) -> None:
        wanted = self._wanted or promote(found.ref.dtype for found in inputs)
        operation = self._pass(inputs[0]) if passed else self._bind(part, name, inputs, t)
        kernel = operation.kernel
        assert kernel is not None
        if kernel.copies is not None:
            chosen = inputs[kernel.copies]
            self._leave(inputs, chosen, f"{self._method.name} takes {chosen.model.name}'s alone")
            inputs = [chosen]
            dtype = chosen.ref.dtype
            if dtype == wanted or (self._wanted is None and chosen.name in chosen.model.quantized):
                copy = Operation(Kind.COPY, operation.method, operation.parameters)
                self._add(name, copy, inputs, dtype, group)
                return
            operation = self._pass(chosen)
        _refuse_quantized(inputs)
        key = self._random_key(name) if kernel.random else 0
        self._add(name, operation, inputs, wanted, group, key)

    def _add_buffer(self, part: BoundSlice, name: str, inputs: Sequence[Input], group: int) -> None:
        """A buffer comes from the base, else from the first that has it."""
        chosen = next((found for found in inputs if found.source == part.base_any_method), inputs[0])
        self._leave(inputs, chosen, f"no parameter: taken from {chosen.model.name}")
        self._add(name, Operation(Kind.COPY, "passthrough"), [chosen], chosen.ref.dtype, group)

    def _add_integers(
        self, part: BoundSlice, name: str, inputs: Sequence[Input], t: float, group: int, *, passed: bool
    ) -> None:
        """What holds no floating-point numbers is copied where all inputs are equal, which the merge finds out."""
        first = inputs[0]
        for other in inputs[1:]:
            if other.ref.dtype != first.ref.dtype:
                raise CheckpointError(
                    f"tensor {name} is {first.ref.dtype.name} in {first.model.name} and {other.ref.dtype.name} in "
                    f"{other.model.name}: integer tensors are only copied, where all inputs are equal"
                )
        packed = [found for found in inputs if found.name in found.model.quantized]
        if packed and not passed and (len(inputs) > 1 or _copied(self._bind(part, name, inputs, t)) is None):
            _refuse_quantized(packed)
        kind = Kind.COPY if len(inputs) == 1 else Kind.REQUIRE_EQUAL
        self._add(name, Operation(kind, self._method.name), inputs, first.ref.dtype, group)

    def _without_some(self, part: BoundSlice, name: str, inputs: Sequence[Input]) -> bool:
        """What the method makes of a tensor that some sources lack: whether a lone one is passed through.

        Raises:
            CheckpointError: where it has no rule for it.
        """
        have = [found.source for found in inputs]
        if is_optional(name):
            alone = len(inputs) == 1
            rule = self._method.absent
            if rule is Absent.SINGLE and alone:
                return True
            if rule is Absent.SINGLE_BASE and alone and have[0] == part.base:
                return True
            if rule is Absent.PRESENT:
                return False
            if rule is Absent.BASE_PRESENT and part.base in have:
                return alone
        lacking = next(model for source, model in enumerate(part.models) if source not in have)
        raise CheckpointError(
            f"tensor {name} is in {inputs[0].model.name} and not in {lacking.name}: models of one architecture have "
            f"the same tensors, and {self._method.name} has no rule for one that is missing"
        )

    # --- nodes -------------------------------------------------------------------------------------------------

    def _add(
        self, name: str, operation: Operation, inputs: Sequence[Input], dtype: DType, group: int, key: int = 0
    ) -> None:
        if name in self._written:
            raise CheckpointError(
                f"two tensors of the output would be called {name}: no two parts of the recipe may make the same one"
            )
        self._written.add(name)
        reads = []
        for found in inputs:
            self._account.use(found.model, found.name)
            reads.append(self._graph.add_read(found.model.number, found.name, found.ref))
        self._graph.add_output(name, self._graph.add_node(operation, tuple(reads), dtype, key), group)

    def _leave(self, inputs: Iterable[Input], chosen: Input, reason: str) -> None:
        for found in inputs:
            if found is not chosen:
                self._account.leave(found.model, found.name, reason)

    def _bind(self, part: BoundSlice, name: str, inputs: Sequence[Input], t: float) -> Operation:
        """The recipe's method for these inputs."""
        base = next((place for place, found in enumerate(inputs) if found.source == part.base), None)
        values = part.parameters.values(name, [(found.source, found.name) for found in inputs], t)
        positions = tuple(found.model.number for found in inputs)
        try:
            return self._operation(self._method, values, base, inputs[0].ref.shape, positions)
        except MethodError as error:
            named = [(found.source, found.name) for found in inputs]
            raise part.parameters.error(name, named, error) from error

    def _pass(self, found: Input) -> Operation:
        """The operation that only changes the dtype."""
        return self._operation(self._methods["passthrough"], {"scale": (1.0,)}, None, found.ref.shape, (0,))

    def _operation(
        self,
        method: Method,
        values: Mapping[str, Any],
        base: int | None,
        shape: tuple[int, ...],
        positions: tuple[int, ...],
    ) -> Operation:
        """A method bound to its inputs and parameters; equal ones are one object. Raises MethodError."""
        if method.base is Base.NONE:
            base = None
        parameters = tuple(values.items())
        key = (method.name, parameters, base, shape, positions)
        found = self._operations.get(key)
        if found is not None:
            return found
        kernel: Kernel = method.kernel(Inputs(len(positions), base, shape), dict(values))
        operation = Operation(Kind.MERGE, method.name, parameters, base, positions if kernel.random else (), kernel)
        if not kernel.random:  # whose models the tensors are doesn't matter, only how many there are
            alike = (method.name, parameters, base, shape, len(positions))
            operation = self._operations.setdefault(alike, operation)
        self._operations[key] = operation
        return operation

    def _random_key(self, name: str) -> int:
        """64 bits from the seed and the output tensor's name."""
        digest = hashlib.blake2b(f"{self._seed}\0{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def promote(dtypes: Iterable[DType]) -> DType:
    """The type that holds every one of `dtypes` (floating-point), as torch promotes; mixed 8-bit types give float32."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    wide = {dtype for dtype in found if dtype.bits >= 16}
    for candidate in (F64, F32):
        if candidate in wide:
            return candidate
    if len(wide) == 1:
        return wide.pop()
    return F32


def shape_mismatch(name: str, first: Model, first_shape: Sequence[int], second: Model, shape: Sequence[int]) -> str:
    """The words for a tensor whose shapes differ between two models."""
    if len(shape) == len(first_shape) == 2 and shape[1] == first_shape[1] and (is_embedding(name) or is_head(name)):
        return (
            f"tensor {name}: {first.name} has a vocabulary of {first_shape[0]} rows and {second.name} one of "
            f"{shape[0]}: models with different vocabularies can't be merged yet; resize one (transformers' "
            "resize_token_embeddings) so that both have the same tokens in the same rows"
        )
    return (
        f"tensor {name} has shape {list(first_shape)} in {first.name} and {list(shape)} in {second.name}: only models "
        "of the same shape can be merged"
    )


def _check_shapes(name: str, inputs: Sequence[Input]) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        if other.ref.shape != first.ref.shape:
            raise CheckpointError(shape_mismatch(name, first.model, first.ref.shape, other.model, other.ref.shape))


def _copied(operation: Operation) -> int | None:
    return None if operation.kernel is None else operation.kernel.copies


def _refuse_quantized(inputs: Iterable[Input]) -> None:
    """Refuse arithmetic on tensors whose numbers aren't their values."""
    for found in inputs:
        dtype = found.ref.dtype
        reason = found.model.quantized.get(found.name)
        if reason is None and dtype.kind is ElementKind.FLOAT and dtype.bits % 8 == 0 and dtype.name != "F8_E8M0":
            continue
        reason = reason or f"it is {dtype.name}"
        raise CheckpointError(
            f"tensor {found.name} of {found.model.name} is quantized ({reason}): arithmetic on it would need it "
            "dequantized, which mergeloom can't do yet; use a bfloat16 version of the model. passthrough without dtype "
            "keeps it as it is"
        )
