"""Builds the graph of a recipe with several stages, in which no intermediate tensor is stored.

Each stage has a graph of its own. To the next stage, its output is a checkpoint whose tensors are nodes instead of file
ranges. The last stage's graph is then resolved down to the files: a copy of a copy becomes a copy of the source, and
arithmetic on an intermediate result becomes a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...io.safetensors.checkpoint import Checkpoint
from ...io.safetensors.dtypes import DType
from ...io.safetensors.tensors import TensorRef
from ...methods.kernel.composition import Composition, Part
from ...methods.kernel.method import Method
from ...methods.kernel.spec import InputSpec
from ..model.inputs import Model, OpenModel
from ..recipe.types import ModelReference, Recipe, Stage
from .buffers import BufferCheck, StoredBuffer
from .build import BuiltGraph, Saved, build_graph
from .graph import Kind, MergeGraph, Operation
from .usage import Unused


@dataclass(frozen=True, slots=True)
class StageRef(TensorRef):
    """A tensor that an earlier stage computes; its file and offset have no meaning.

    Args:
        stage: index of the stage in the recipe.
        node: node of the stage's graph that computes the tensor.
    """

    stage: int
    node: int


def build_stages(
    recipe: Recipe,
    methods: Mapping[str, Method],
    open_model: OpenModel,
    config_of: Callable[[Stage, BuiltGraph], Mapping[str, Any] | None],
    *,
    seed: int = 0,
) -> BuiltGraph:
    """Build the graph of a recipe with one or more stages.

    Args:
        recipe: the recipe, with its stages in topological order.
        methods: the merge methods by name.
        open_model: function that opens the Checkpoint of a ModelReference; not called for stages.
        config_of: function that returns the config.json of a stage's output; called once for each stage, in order.
        seed: seed for methods that sample.

    Raises:
        RecipeError: if the recipe refers to layers or parts that the models don't have.
        CheckpointError: if the models are incompatible.
    """
    if len(recipe.stages) == 1:
        single = build_graph(recipe, recipe.output, methods, open_model, seed=seed)
        config_of(recipe.output, single)
        return single
    checkpoints: dict[str, Checkpoint] = {}
    built: list[BuiltGraph] = []

    def open_any(reference: ModelReference) -> Checkpoint:
        stage = recipe.stage(reference)
        return open_model(reference) if stage is None else checkpoints[stage.name or ""]

    for number, stage in enumerate(recipe.stages):
        last = number == len(recipe.stages) - 1
        # an intermediate result is not rounded to `dtype`, only to an explicit out_dtype
        graph = build_graph(recipe, stage if last else replace(stage, dtype=None), methods, open_any, seed=seed)
        built.append(graph)
        config = config_of(stage, graph)
        if not last:
            checkpoints[stage.name or ""] = _as_checkpoint(number, stage, graph, config)
    return _Flattener(recipe, built, methods).flatten()


def _as_checkpoint(number: int, stage: Stage, built: BuiltGraph, config: Mapping[str, Any] | None) -> Checkpoint:
    """A stage's output as a checkpoint for the next stage, with the dtypes that it would have on disk."""
    graph = built.graph
    tensors: dict[str, TensorRef] = {}
    for index, output in enumerate(graph.outputs):
        dtype = _stored_dtype(stage, graph, output.node)
        elements = graph.elements(output.node)
        tensors[output.name] = StageRef(
            Path(stage.name or "stage"),
            index,
            dtype.nbytes(elements),
            dtype,
            graph.shape(output.node),
            number,
            output.node,
        )
    donor = built.models[built.donor].checkpoint
    return replace(
        donor, tensors=tensors, config=None if config is None else dict(config), files=(), ignored=(), remarks=()
    )


def _stored_dtype(stage: Stage, graph: MergeGraph, node: int) -> DType:
    """The dtype of a stage's tensor if the stage's output is written."""
    nominal, dtype = stage.out_dtype or stage.dtype, graph.node_dtype[node]
    kept = graph.operation(node).kind is Kind.REQUIRE_EQUAL
    return nominal if nominal is not None and not kept and dtype.kind is nominal.kind else dtype


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A tensor in a file."""

    model: int
    name: str
    ref: TensorRef


@dataclass(frozen=True, slots=True)
class _Result:
    """The result of an operation on leaves and other results."""

    operation: Operation
    sources: tuple[_Leaf | _Result, ...]
    key: int
    round_to: DType | None


class _Flattener:
    """Combines the graphs of all stages into one graph that only reads files."""

    def __init__(self, recipe: Recipe, built: list[BuiltGraph], methods: Mapping[str, Method]) -> None:
        self._recipe = recipe
        self._built = built
        self._passthrough = methods["passthrough"]
        references: dict[ModelReference, int] = {}
        self._models: list[Model] = []
        for found in built:
            for model in found.models:
                if recipe.stage(model.reference) is None and model.reference not in references:
                    references[model.reference] = len(self._models)
                    self._models.append(replace(model, number=len(self._models)))
        self._numbers = references
        self._expressions: dict[tuple[int, int], _Leaf | _Result] = {}
        self._operations: dict[Hashable, Operation] = {}

    def flatten(self) -> BuiltGraph:
        last = len(self._built) - 1
        final = self._built[last]
        graph = MergeGraph(tuple(model.name for model in self._models))
        for output in final.graph.outputs:
            dtype = final.graph.node_dtype[output.node]
            graph.add_output(output.name, self._add(graph, self._expression(last, output.node), dtype), output.group)
        saved = [number for number, stage in enumerate(self._recipe.stages[:-1]) if stage.save]
        for number in saved:
            self._save(graph, number)
        donor = final
        while self._recipe.stage(reference := donor.models[donor.donor].reference) is not None:
            stage = self._recipe.stage(reference)
            donor = self._built[next(n for n, found in enumerate(self._recipe.stages) if found is stage)]
        return replace(
            final,
            graph=graph,
            models=tuple(self._models),
            donor=self._numbers[reference],
            donor_config=final.models[final.donor].checkpoint.config,
            unused=tuple(dict.fromkeys(self._unused(graph))),
            warnings=tuple(warning for found in self._built for warning in found.warnings),
            parameters=tuple(use for found in self._built for use in found.parameters),
            saved=tuple(Saved(self._recipe.stages[number], self._built[number].layers) for number in saved),
            intermediates=sum(len(found.graph.outputs) for found in self._built[:-1]),
            buffers=tuple(dict.fromkeys(self._buffers())),
        )

    def _buffers(self) -> Iterator[BufferCheck]:
        """The buffers that are compared between the models, in all stages."""
        for found in self._built:
            for check in found.buffers:
                chosen, *others = (self._stored(found, each) for each in (check.chosen, *check.others))
                others = [each for each in dict.fromkeys(others) if each != chosen]
                yield BufferCheck(check.name, chosen, tuple(others))

    def _stored(self, built: BuiltGraph, buffer: StoredBuffer) -> StoredBuffer:
        """A buffer of an input of a stage as it is stored in a file: stages only copy buffers."""
        if isinstance(buffer.ref, StageRef):
            leaf = next(_leaves(self._expression(buffer.ref.stage, buffer.ref.node)))
            return StoredBuffer(leaf.model, leaf.name, leaf.ref)
        return buffer._replace(model=self._numbers[built.models[buffer.model].reference])

    def _save(self, graph: MergeGraph, number: int) -> None:
        """Add the outputs of a saved stage, in the dtypes that they would have if it were the only one."""
        stage, found = self._recipe.stages[number], self._built[number].graph
        for output in found.outputs:
            dtype = _stored_dtype(stage, found, output.node)
            node = self._add(graph, self._expression(number, output.node), dtype)
            graph.add_output(output.name, node, output.group, stage.name or "")

    def _unused(self, graph: MergeGraph) -> Iterator[Unused]:
        """Every tensor in a file that the combined graph doesn't read, with the cause in one of the stages."""
        causes: dict[tuple[int, str], tuple[str, int | None]] = {}
        for found in self._built:
            numbers = {model.name: self._numbers.get(model.reference) for model in found.models}
            for unused in found.unused:
                number = numbers[unused.model]
                if number is None:  # tensors of a stage are unused: their sources may be, too
                    indirect = f"{unused.model}: {unused.reason}", None
                    leaves = {leaf for name in unused.tensors for leaf in self._leaves_of(unused.model, name)}
                    causes = {(leaf.model, leaf.name): indirect for leaf in leaves} | causes
                elif unused.tensors:
                    causes |= {(number, name): (unused.cause, unused.layer) for name in unused.tensors}
                else:
                    yield unused
        read = set(zip(graph.read_models, graph.read_names, strict=True))
        for model in self._models:
            names: dict[tuple[str, int | None], list[str]] = {}
            for name in model.checkpoint.tensors:
                if (model.number, name) not in read:
                    cause = causes.get((model.number, name), ("no tensor of the output needs it", None))
                    names.setdefault(cause, []).append(name)
            yield from (Unused(model.name, why, tuple(unread), layer) for (why, layer), unread in names.items())

    def _leaves_of(self, stage: str, name: str) -> Iterator[_Leaf]:
        """The file tensors that a tensor of a stage is computed from."""
        number = next(number for number, found in enumerate(self._recipe.stages) if found.name == stage)
        nodes = (output.node for output in self._built[number].graph.outputs if output.name == name)
        return _leaves(self._expression(number, next(nodes)))

    def _expression(self, stage: int, node: int) -> _Leaf | _Result:
        """The expression of a node in terms of file tensors."""
        expression = self._expressions.get((stage, node))
        if expression is None:
            expression = self._expressions[stage, node] = self._build_expression(stage, node)
        return expression

    def _build_expression(self, stage: int, node: int) -> _Leaf | _Result:
        built = self._built[stage]
        graph = built.graph
        operation = graph.operation(node)
        sources: list[_Leaf | _Result] = []
        for read in graph.node_sources[node]:
            ref = graph.reads[read]
            if isinstance(ref, StageRef):
                sources.append(self._expression(ref.stage, ref.node))
            else:
                model = self._numbers[built.models[graph.read_models[read]].reference]
                sources.append(_Leaf(model, graph.read_names[read], ref))
        rounds = self._recipe.stages[stage].out_dtype
        copies = operation.kernel is not None and operation.kernel.copies is not None
        if operation.kind is Kind.COPY or (copies and rounds is None):
            return sources[0]
        return _Result(operation, tuple(sources), graph.node_key[node], rounds)

    def _add(self, graph: MergeGraph, expression: _Leaf | _Result, dtype: DType) -> int:
        """Add the node that computes an expression, rounded to `dtype`, to the combined graph."""
        if isinstance(expression, _Leaf):
            if expression.ref.dtype == dtype:
                return graph.add_node(Operation(Kind.COPY, "passthrough"), (self._read(graph, expression),), dtype)
            expression = self._cast(expression, expression.ref.shape)
        elif expression.round_to is not None and expression.round_to != dtype:
            expression = self._cast(expression, self._shape(expression))
        if all(isinstance(source, _Leaf) for source in expression.sources):
            leaves = [source for source in expression.sources if isinstance(source, _Leaf)]
            if expression.operation.kind is Kind.REQUIRE_EQUAL and len(set(leaves)) == 1:
                return graph.add_node(Operation(Kind.COPY, "passthrough"), (self._read(graph, leaves[0]),), dtype)
            reads = tuple(self._read(graph, leaf) for leaf in leaves)
            return graph.add_node(expression.operation, reads, dtype, expression.key)
        leaves = list(dict.fromkeys(_leaves(expression)))
        operation = self._fuse(expression, leaves)
        return graph.add_node(operation, tuple(self._read(graph, leaf) for leaf in leaves), dtype)

    def _cast(self, expression: _Leaf | _Result, shape: tuple[int, ...]) -> _Result:
        kernel = self._passthrough.kernel(InputSpec(1, None, shape), {})
        key = ("cast", shape)
        operation = self._operations.setdefault(key, Operation(Kind.MERGE, "passthrough", kernel=kernel))
        return _Result(operation, (expression,), 0, None)

    def _fuse(self, expression: _Result, leaves: list[_Leaf]) -> Operation:
        """Fuse the operations of an expression into one, shared by expressions that differ only in their leaves."""
        leaf_numbers = {leaf: number for number, leaf in enumerate(leaves)}
        parts: list[Part] = []
        numbers: dict[_Result, int] = {}
        methods: list[tuple[str, Any]] = []

        def add(result: _Result) -> int:
            if result in numbers:
                return numbers[result]
            sources = tuple(
                leaf_numbers[source] if isinstance(source, _Leaf) else ~add(source) for source in result.sources
            )
            kernel = result.operation.kernel
            assert kernel is not None
            rounding = result.round_to.torch_name if result.round_to and result is not expression else None
            parts.append(Part(kernel, sources, result.key, result.operation.positions, rounding))
            methods.append((result.operation.method, result.operation.parameters))
            numbers[result] = len(parts) - 1
            return numbers[result]

        add(expression)
        key = tuple((id(part.kernel), part.sources, part.key, part.positions, part.round_to) for part in parts)
        operation = self._operations.get(key)
        if operation is None:
            kernel = Composition(InputSpec(len(leaves), None, self._shape(expression)), parts)
            name = " of ".join(dict.fromkeys(method for method, _ in reversed(methods)))
            described = tuple(
                (f"{number}. {method}", parameters) for number, (method, parameters) in enumerate(methods)
            )
            operation = self._operations[key] = Operation(Kind.MERGE, name, described, kernel=kernel)
        return operation

    @staticmethod
    def _shape(expression: _Result) -> tuple[int, ...]:
        return next(_leaves(expression)).ref.shape

    @staticmethod
    def _read(graph: MergeGraph, leaf: _Leaf) -> int:
        return graph.add_read(leaf.model, leaf.name, leaf.ref)


def _leaves(expression: _Leaf | _Result) -> Iterator[_Leaf]:
    """The leaves of an expression, in the order of the sources."""
    if isinstance(expression, _Leaf):
        yield expression
        return
    for source in expression.sources:
        yield from _leaves(source)
