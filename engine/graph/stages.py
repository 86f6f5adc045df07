"""Recipes of several stages: each stage's graph, and then one graph in which no intermediate tensor is stored.

A stage's output is to the next one a checkpoint like any other, whose tensors are nodes instead of ranges of files.
Once the last stage's graph is built, these are followed down to the files: a copy of a copy is a copy of the source,
and arithmetic on a result becomes a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...io.safetensors.checkpoint import Checkpoint
from ...io.safetensors.dtypes import DType
from ...io.safetensors.tensors import TensorRef
from ...methods.kernel.contract import Inputs, Kernel, Method
from ..model.inputs import Model, OpenModel
from ..recipe.types import ModelReference, Recipe, Stage
from .build import BuiltGraph, Saved, build_graph
from .fuse import BoundSlice, FusedKernel
from .graph import Kind, MergeGraph, Operation
from .usage import Unused


@dataclass(frozen=True, slots=True)
class StageRef(TensorRef):
    """A tensor that an earlier stage makes; its file and offset mean nothing.

    Args:
        stage: the number of the stage in the recipe.
        node: the node of the stage's graph.
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
    """The graph of a whole recipe.

    Args:
        recipe: its stages come in the order of their dependencies, the output's last.
        methods: by name.
        open_model: called with the reference of a model that is no stage, returns its Checkpoint.
        config_of: the config.json of what a stage makes; called once for each, in their order.
        seed: of the random methods.

    Raises:
        RecipeError: where the recipe asks for what the models don't have.
        CheckpointError: where the models don't fit each other.
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
        # an intermediate is not rounded to its dtype, only to an explicit out_dtype
        found = build_graph(recipe, stage if last else replace(stage, dtype=None), methods, open_any, seed=seed)
        built.append(found)
        config = config_of(stage, found)
        if not last:
            checkpoints[stage.name or ""] = _as_checkpoint(number, stage, found, config)
    return _Flattener(recipe, built, methods).flatten()


def _as_checkpoint(number: int, stage: Stage, built: BuiltGraph, config: Mapping[str, Any] | None) -> Checkpoint:
    """What a stage makes, as the next one sees it: the types are those that it would have on the disk."""
    graph = built.graph
    tensors: dict[str, TensorRef] = {}
    for index, output in enumerate(graph.outputs):
        dtype = _type_on_disk(stage, graph, output.node)
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


def _type_on_disk(stage: Stage, graph: MergeGraph, node: int) -> DType:
    """The type that a tensor of a stage has where the stage's output is written."""
    nominal, dtype = stage.out_dtype or stage.dtype, graph.node_dtype[node]
    kept = graph.operation(node).kind is Kind.REQUIRE_EQUAL
    return nominal if nominal is not None and not kept and dtype.kind is nominal.kind else dtype


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A tensor of a file."""

    model: int
    name: str
    ref: TensorRef


@dataclass(frozen=True, slots=True)
class _Result:
    """What an operation makes of leaves and other results."""

    operation: Operation
    sources: tuple[_Leaf | _Result, ...]
    key: int
    round_to: DType | None


class _Flattener:
    """Turns the graphs of all stages into the one of the last, over files only."""

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
        self._made: dict[tuple[int, int], _Leaf | _Result] = {}
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
            saved=tuple(Saved(self._recipe.stages[number], self._built[number].layers) for number in saved),
            intermediates=sum(len(found.graph.outputs) for found in self._built[:-1]),
        )

    def _save(self, graph: MergeGraph, number: int) -> None:
        """Let what a stage makes be written, too, in the types that it would have on its own."""
        stage, found = self._recipe.stages[number], self._built[number].graph
        for output in found.outputs:
            dtype = _type_on_disk(stage, found, output.node)
            node = self._add(graph, self._expression(number, output.node), dtype)
            graph.add_output(output.name, node, output.group, stage.name or "")

    def _unused(self, graph: MergeGraph) -> Iterator[Unused]:
        """Every tensor of a file that the flat graph doesn't read, with the reason that some stage has."""
        reasons: dict[tuple[int, str], str] = {}
        for found in self._built:
            numbers = {model.name: self._numbers.get(model.reference) for model in found.models}
            for unused in found.unused:
                number = numbers[unused.model]
                if number is None:  # a stage's tensors are unused: then so may be what they are made of
                    why = f"{unused.model}: {unused.reason}"
                    leaves = {leaf for name in unused.tensors for leaf in self._leaves_of(unused.model, name)}
                    reasons = {(leaf.model, leaf.name): why for leaf in leaves} | reasons
                elif unused.tensors:
                    reasons |= {(number, name): unused.reason for name in unused.tensors}
                else:
                    yield unused
        read = set(zip(graph.read_models, graph.read_names, strict=True))
        for model in self._models:
            names: dict[str, list[str]] = {}
            for name in model.checkpoint.tensors:
                if (model.number, name) not in read:
                    why = reasons.get((model.number, name), "no tensor of the output needs it")
                    names.setdefault(why, []).append(name)
            yield from (Unused(model.name, why, tuple(found)) for why, found in names.items())

    def _leaves_of(self, stage: str, name: str) -> Iterator[_Leaf]:
        """What a tensor of a stage is made of."""
        number = next(number for number, found in enumerate(self._recipe.stages) if found.name == stage)
        nodes = (output.node for output in self._built[number].graph.outputs if output.name == name)
        return _leaves(self._expression(number, next(nodes)))

    def _expression(self, stage: int, node: int) -> _Leaf | _Result:
        """What makes a node, down to the files."""
        made = self._made.get((stage, node))
        if made is None:
            made = self._made[stage, node] = self._make(stage, node)
        return made

    def _make(self, stage: int, node: int) -> _Leaf | _Result:
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

    def _add(self, graph: MergeGraph, made: _Leaf | _Result, dtype: DType) -> int:
        """The node of the flat graph that makes an expression, rounded to `dtype`."""
        if isinstance(made, _Leaf):
            if made.ref.dtype == dtype:
                return graph.add_node(Operation(Kind.COPY, "passthrough"), (self._read(graph, made),), dtype)
            made = self._cast(made, made.ref.shape)
        elif made.round_to is not None and made.round_to != dtype:
            made = self._cast(made, self._shape(made))
        if all(isinstance(source, _Leaf) for source in made.sources):
            leaves = [source for source in made.sources if isinstance(source, _Leaf)]
            if made.operation.kind is Kind.REQUIRE_EQUAL and len(set(leaves)) == 1:
                return graph.add_node(Operation(Kind.COPY, "passthrough"), (self._read(graph, leaves[0]),), dtype)
            return graph.add_node(made.operation, tuple(self._read(graph, leaf) for leaf in leaves), dtype, made.key)
        leaves = list(dict.fromkeys(_leaves(made)))
        operation = self._fuse(made, leaves)
        return graph.add_node(operation, tuple(self._read(graph, leaf) for leaf in leaves), dtype)

    def _cast(self, made: _Leaf | _Result, shape: tuple[int, ...]) -> _Result:
        kernel = self._passthrough.kernel(Inputs(1, None, shape), {})
        key = ("cast", shape)
        operation = self._operations.setdefault(key, Operation(Kind.MERGE, "passthrough", kernel=kernel))
        return _Result(operation, (made,), 0, None)

    def _fuse(self, made: _Result, leaves: list[_Leaf]) -> Operation:
        """An expression of several operations as one; expressions alike but for their leaves share it."""
        places = {leaf: number for number, leaf in enumerate(leaves)}
        parts: list[BoundSlice] = []
        numbers: dict[_Result, int] = {}
        methods: list[tuple[str, Any]] = []

        def add(result: _Result) -> int:
            if result in numbers:
                return numbers[result]
            sources = tuple(places[source] if isinstance(source, _Leaf) else ~add(source) for source in result.sources)
            kernel = result.operation.kernel
            assert kernel is not None
            rounding = result.round_to if result is not made else None
            parts.append(BoundSlice(kernel, sources, result.key, result.operation.positions, rounding))
            methods.append((result.operation.method, result.operation.parameters))
            numbers[result] = len(parts) - 1
            return numbers[result]

        add(made)
        key = tuple((id(part.kernel), part.sources, part.key, part.positions, part.round_to) for part in parts)
        found = self._operations.get(key)
        if found is None:
            inputs = Inputs(len(leaves), None, self._shape(made))
            kernel: Kernel = FusedKernel(inputs, parts)
            name = " of ".join(dict.fromkeys(method for method, _ in reversed(methods)))
            described = tuple((f"{place}. {method}", parameters) for place, (method, parameters) in enumerate(methods))
            found = self._operations[key] = Operation(Kind.MERGE, name, described, kernel=kernel)
        return found

    @staticmethod
    def _shape(made: _Result) -> tuple[int, ...]:
        return next(_leaves(made)).ref.shape

    @staticmethod
    def _read(graph: MergeGraph, leaf: _Leaf) -> int:
        return graph.add_read(leaf.model, leaf.name, leaf.ref)


def _leaves(made: _Leaf | _Result) -> Iterator[_Leaf]:
    """Every leaf of an expression, in the order of the sources."""
    if isinstance(made, _Leaf):
        yield made
        return
    for source in made.sources:
        yield from _leaves(source)
