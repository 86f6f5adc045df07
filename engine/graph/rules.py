"""Adds the node of one output tensor to the graph, by the rules in docs/mergekit.md."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import CheckpointError
from ...io.tensors.dtypes import F32, DType
from ...io.tensors.dtypes import Kind as ElementKind
from ...io.tensors.refs import TensorClass, TensorRef
from ...io.tensors.table import NameSet
from ...methods.kernel.method import Method
from ...methods.kernel.spec import Absent, MethodError
from ..model.checks.mismatch import TensorMismatch
from ..model.checks.shapes import check_shapes
from ..model.inputs import BoundSlice
from ..model.logical import Encoding, LogicalTensor, kind_of
from ..model.modules import absent_part, lone_projector
from ..model.roles import is_buffer, is_optional
from ..recipe.entries.dtype_lookup import OutputDtypes, Stored, promote
from ..recipe.types import ModelReference, Stage
from .checks.buffers import BufferChecks, StoredBuffer
from .checks.partial import PartialTensor
from .checks.quantized_inputs import refuse_format, refuse_quantized
from .encoding.outputs import EncodedOutputs
from .graph import Kind, MergeGraph, Operation
from .operation import Operations
from .usage import TensorUsage
from .values import CopiedValue, Input, TensorValues


class _Resolved(NamedTuple):
    """The node of output tensors whose inputs are of the same classes, with the same parameters.

    Args:
        operation: the operation.
        kept: indices of the inputs that the output depends on.
        reason: why the others are not used.
        dtype: dtype of the output.
        random: whether the node needs a random key.
        encoding: how the output is stored as codes and scales; None if it is stored in `dtype`.
    """

    operation: Operation
    kept: tuple[int, ...]
    reason: str
    dtype: DType
    random: bool
    encoding: Encoding | None = None


class TensorRules:
    """Adds output tensors to a graph.

    Args:
        stage: the stage to build.
        methods: the merge methods by name.
        graph: the graph that receives the tensors.
        usage: record of the used input tensors.
        seed: seed for methods that sample.
        donor: tensors of the donor, which most output tensors have the names of.
        owners: numbers of the models that have parts of other models' values.
        intermediate: whether other stages use the output. If not, values that the donor stores quantized are stored in
            its format, unless the recipe sets a dtype.
        decodes: whether a value that is only copied is decoded, even if nothing rounds it.
        compares: whether outputs of 16 bits are compared with the base as well, and not only codes; see `survival`.

    Attributes:
        buffers: the buffers among the tensors, which are compared between the models.
        copies: values of an intermediate output whose parts are copied, by name.
        written: the names of the output tensors.
        dtypes: the dtype that the recipe sets for each output tensor.
    """

    def __init__(
        self,
        stage: Stage,
        methods: Mapping[str, Method],
        graph: MergeGraph,
        usage: TensorUsage,
        seed: int,
        donor: Mapping[str, TensorRef],
        owners: Mapping[ModelReference, int],
        *,
        intermediate: bool,
        decodes: bool,
        compares: bool = False,
    ) -> None:
        self.partial: list[PartialTensor] = []
        self.dtypes = OutputDtypes(stage)
        self._advise_modules = stage.modules is None
        self._methods = methods
        self._method = methods[stage.merge_method]
        self._graph = graph
        self._usage = usage
        self._seed = seed
        self.buffers = BufferChecks(graph.models)
        self.copies: dict[str, CopiedValue] = {}
        self._intermediate = intermediate
        self._decodes = decodes
        self._compares = compares and not intermediate
        self.written = NameSet(donor)
        self._tensors = TensorValues(graph, methods["passthrough"], owners)
        self._encoders = EncodedOutputs(graph, self._tensors)
        self._operations = Operations()
        self._resolved: dict[Hashable, _Resolved] = {}
        # by slice, rule for the dtype, and the addresses of the inputs' classes
        self._known: dict[tuple[object, ...], _Resolved] = {}

    def add(
        self, part: BoundSlice, name: str, names: Sequence[str | None], t: float, group: int, *, copied: bool = False
    ) -> None:
        """Add one output tensor and its node.

        Args:
            part: the slice that contains the tensor.
            name: name of the output tensor.
            names: for each source, its name for the tensor, or None if it lacks the tensor; at least one has it.
            t: position of the tensor's layer in a gradient.
            group: group of the output (see `graph.Output`).
            copied: whether the tensor is copied from its only source instead of using the stage's method.

        Raises:
            RecipeError: if the method can't be used as the recipe requires.
            CheckpointError: if the sources are incompatible.
        """
        if not copied and self._add_known(part, name, names, group):
            return
        inputs = [
            Input(source, model, own_name, kind_of(model.tensors, own_name))
            for source, (model, own_name) in enumerate(zip(part.models, names, strict=True))
            if own_name is not None
        ]
        if is_buffer(name, inputs[0].kind.shape):
            self._add_buffer(part, name, inputs, group)
            return
        passed = copied or (len(inputs) < len(names) and self._without_some(part, name, inputs))
        if len(inputs) < len(names):
            self.partial.append(PartialTensor.of(name, part.models, names))
        check_shapes(name, [(each.model, each.kind.shape) for each in inputs])
        if any(each.kind.dtype.kind is not ElementKind.FLOAT for each in inputs):
            self._add_integers(part, name, inputs, t, group, passed=passed)
        else:
            self._add_floats(part, name, inputs, t, group, passed=passed)

    def _add_known(self, part: BoundSlice, name: str, names: Sequence[str | None], group: int) -> bool:
        """Add an output tensor if one with inputs of the same classes was added before; returns whether there is one.

        Nearly all tensors of a mixture of experts are added here: nothing that depends on their class is done again.
        """
        if part.parameters.constant is None or None in names:
            return False
        kinds = [kind_of(model.tensors, own or "") for model, own in zip(part.models, names, strict=True)]
        found = self._known.get((part, self.dtypes.key(name), *map(id, kinds)))
        if found is None or is_buffer(name, kinds[0].shape):
            return False
        for index, own in enumerate(names) if len(found.kept) < len(names) else ():
            if index not in found.kept:
                self._usage.mark_unused(part.models[index], own or "", found.reason)
        self._check_unwritten(name)
        values = [self._tensors.value(part.models[index], names[index] or "") for index in found.kept]
        key = self.random_key(name) if found.random else 0
        self._graph.add_output(name, self._graph.add_node(found.operation, tuple(values), found.dtype, key), group)
        return True

    @property
    def remarks(self) -> tuple[int, ...]:
        """How many facts were recorded about single tensors, apart from their nodes."""
        return len(self.partial), len(self.buffers.checks), len(self.copies), self._usage.marked

    # --- kinds of tensors --------------------------------------------------------------------------------------

    def _add_floats(
        self, part: BoundSlice, name: str, inputs: Sequence[Input], t: float, group: int, *, passed: bool
    ) -> None:
        values = None if passed else self._values(part, name, inputs, t)
        quantized = [each.name in each.model.quantized for each in inputs]
        classes = [
            (each.source, each.kind.dtype.name, each.kind.shape, each.decoded, each.adapted, each.encoding)
            for each in inputs
        ]
        given = None if values is None else tuple(values.items())
        donor = _donor(part, inputs)
        alike = [each.stored_like(donor) for each in inputs if each.encoding is not None]
        key = (part, self.dtypes.key(name), given, *quantized, *classes, *alike)
        found = self._resolved.get(key)
        if found is None:
            found = self._resolved[key] = self._resolve(part, name, inputs, values)
        in_tables = all(isinstance(each.kind, TensorClass) and not each.model.quantized for each in inputs)
        if in_tables and values is not None and values is part.parameters.constant:
            self._known[part, self.dtypes.key(name), *(id(each.kind) for each in inputs)] = found
        if len(found.kept) < len(inputs):
            for index, each in enumerate(inputs):
                if index not in found.kept:
                    self._usage.mark_unused(each.model, each.name, found.reason)
            inputs = [inputs[index] for index in found.kept]
        if found.operation.kind is Kind.COPY and isinstance(inputs[0].kind, LogicalTensor):
            self._copy(name, inputs[0], group)
            return
        random_key = self.random_key(name) if found.random else 0
        if found.encoding is None:
            self._add(name, found.operation, inputs, found.dtype, group, random_key)
            return
        values_of = tuple([self._tensors.value(each.model, each.name) for each in inputs])
        node = self._graph.add_node(found.operation, values_of, F32, random_key)
        bases = [value for value, each in zip(values_of, inputs, strict=True) if each.source == part.base_any_method]
        base = bases[0] if bases else None
        for written, stored in self._encoders.add(node, found.encoding, donor, name, base):
            self._check_unwritten(written)
            self._graph.add_output(written, stored, group)

    def _resolve(
        self, part: BoundSlice, name: str, inputs: Sequence[Input], values: Mapping[str, Any] | None
    ) -> _Resolved:
        """Find the node for floating-point inputs of these classes.

        Args:
            part: the slice that contains the tensor.
            name: name of the output tensor, for errors.
            inputs: the inputs.
            values: the method's parameters; None if the only input is passed through.
        """
        wanted = self.dtypes.of(name)
        donor = _donor(part, inputs)
        target = wanted if isinstance(wanted, DType) else promote(each.kind.dtype for each in inputs)
        if wanted is Stored.SAME:
            target = donor.kind.dtype
        operation = self._pass(inputs[0]) if values is None else self._bind(part, name, inputs, values)
        kernel = operation.kernel
        assert kernel is not None
        kept, reason = tuple(range(len(inputs))), ""
        if values is not None:
            kept, reason = tuple(kernel.kept), "it has no effect on the output, as with a weight of 0"
            if kernel.copies is not None:
                reason = f"{self._method.name} only uses that of {inputs[kept[0]].model.name}"
        used = [inputs[index] for index in kept]
        if kernel.copies is not None:
            (chosen,) = used
            alike = chosen is donor or chosen.stored_like(donor)
            dtype, as_stored = chosen.kind.dtype, wanted is None or (wanted is Stored.SAME and alike)
            keep = chosen.name in chosen.model.quantized
            if chosen.decoded:  # in another form than the donor's, the values are encoded again if they can be
                keep = not self._decodes and not chosen.adapted and (alike or donor.encoding is None)
            if (dtype == target and not chosen.decoded) or (as_stored and keep):
                copy = Operation(Kind.COPY, operation.method, operation.parameters)
                return _Resolved(copy, kept, reason, dtype, random=False)
            operation = self._pass(chosen)
        refuse_quantized(used)
        if wanted is Stored.SAME:
            refuse_format(donor, encodes=not self._intermediate)
            refuse_quantized([donor], ", and out_dtype `same` needs its dtype")
        encoding = None if self._intermediate or isinstance(wanted, DType) else donor.encoding
        if self._compares and values is not None and kernel.copies is None and encoding is None and target.bits == 16:
            base = next((index for index, each in enumerate(inputs) if each.source == part.base_any_method), None)
            compared = None if base is None else (base, target.torch_name or "")
            operation = self._bind(part, name, inputs, values, compared)
        return _Resolved(operation, kept, reason, target, kernel.random, encoding)

    def _add_buffer(self, part: BoundSlice, name: str, inputs: Sequence[Input], group: int) -> None:
        """Add a buffer, copied from the base model or else from the first model that has it."""
        chosen = next((each for each in inputs if each.source == part.base_any_method), inputs[0])
        self._mark_unused(inputs, chosen, f"not a parameter: copied from {chosen.model.name}")
        if not any(isinstance(each.kind, LogicalTensor) for each in inputs):
            stored = [StoredBuffer(each.model.number, each.name, each.ref) for each in inputs]
            self.buffers.add(name, stored[inputs.index(chosen)], stored)
        self._copy(name, chosen, group)

    def _add_integers(
        self, part: BoundSlice, name: str, inputs: Sequence[Input], t: float, group: int, *, passed: bool
    ) -> None:
        """Add a tensor without floating-point numbers: it is copied, and the merge checks that all inputs are equal."""
        first = inputs[0]
        for other in inputs[1:]:
            if other.kind.dtype != first.kind.dtype:
                message = (
                    f"tensor {name} is {first.kind.dtype.name} in {first.model.name} and {other.kind.dtype.name} in "
                    f"{other.model.name}: integer tensors can only be copied, if all inputs are equal"
                )
                raise TensorMismatch(message, first.model, other.model)
        packed = [each for each in inputs if each.name in each.model.quantized]
        if packed and not passed and (len(inputs) > 1 or not self._copies(part, name, inputs, t)):
            refuse_quantized(packed)
        kind = Kind.COPY if len(inputs) == 1 else Kind.REQUIRE_EQUAL
        self._add(name, Operation(kind, self._method.name), inputs, first.kind.dtype, group)

    def _without_some(self, part: BoundSlice, name: str, inputs: Sequence[Input]) -> bool:
        """Whether a tensor that some sources lack is passed through from the only source that has it.

        Raises:
            CheckpointError: if the method has no rule for this case.
        """
        have = [each.source for each in inputs]
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
        first = inputs[0].model
        lacking = next(model for source, model in enumerate(part.models) if source not in have)
        message = (
            f"tensor {name} is in {first.name} but not in {lacking.name}: models of the same architecture "
            f"have the same tensors, and {self._method.name} has no rule for a missing one"
            f"{absent_part(first, lacking, name) if self._advise_modules else lone_projector(name, first)}"
        )
        raise TensorMismatch(message, first, lacking)

    # --- nodes -------------------------------------------------------------------------------------------------

    def _add(
        self, name: str, operation: Operation, inputs: Sequence[Input], dtype: DType, group: int, key: int = 0
    ) -> None:
        self._check_unwritten(name)
        values = tuple([self._tensors.value(each.model, each.name) for each in inputs])
        self._graph.add_output(name, self._graph.add_node(operation, values, dtype, key), group)

    def _copy(self, name: str, source: Input, group: int) -> None:
        """Add the tensors that a value is stored as."""
        parts = []
        for written, node in self._tensors.copies(source.model, source.name, name):
            self._check_unwritten(written)
            self._graph.add_output(written, node, group)
            parts.append(written)
        if self._intermediate and isinstance(source.kind, LogicalTensor) and source.kind.decoded:
            self.copies[name] = CopiedValue(name, source.kind, tuple(parts))

    def _check_unwritten(self, name: str) -> None:
        """Record the name of an output tensor. Raises CheckpointError if it is there already."""
        if not self.written.add(name):
            raise CheckpointError(
                f"two tensors of the output have the name {name}: each must come from a single part of the recipe"
            )

    def _mark_unused(self, inputs: Iterable[Input], chosen: Input, reason: str) -> None:
        for each in inputs:
            if each is not chosen:
                self._usage.mark_unused(each.model, each.name, reason)

    def _copies(self, part: BoundSlice, name: str, inputs: Sequence[Input], t: float) -> bool:
        """Whether the stage's method returns one of these inputs unchanged."""
        kernel = self._bind(part, name, inputs, self._values(part, name, inputs, t)).kernel
        return kernel is not None and kernel.copies is not None

    def _values(self, part: BoundSlice, name: str, inputs: Sequence[Input], t: float) -> Mapping[str, Any]:
        """The parameters of the stage's method for these inputs."""
        return part.parameters.values(name, [(each.source, each.name) for each in inputs], t)

    def _bind(
        self,
        part: BoundSlice,
        name: str,
        inputs: Sequence[Input],
        values: Mapping[str, Any],
        compared: tuple[int, str] | None = None,
    ) -> Operation:
        """The operation of the stage's method on these inputs; `compared` is as for `Operations.of`."""
        base = next((index for index, each in enumerate(inputs) if each.source == part.base), None)
        positions = tuple(each.model.number for each in inputs)
        try:
            return self._operations.of(self._method, values, base, inputs[0].kind.shape, positions, compared)
        except MethodError as error:
            named = [(each.source, each.name) for each in inputs]
            raise part.parameters.error(name, named, error) from error

    def _pass(self, source: Input) -> Operation:
        """The operation that only converts the dtype."""
        return self._operations.of(self._methods["passthrough"], {"scale": (1.0,)}, None, source.kind.shape, (0,))

    def random_key(self, name: str) -> int:
        """A 64-bit key derived from the seed and the output tensor's name."""
        digest = hashlib.blake2b(f"{self._seed}\0{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def _donor(part: BoundSlice, inputs: Sequence[Input]) -> Input:
    """The tensor whose stored form counts for the output: the base model's, or else the first one."""
    return next((each for each in inputs if each.source == part.base_any_method), inputs[0])
