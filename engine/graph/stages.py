"""Builds the graph of a recipe with several stages, in which no intermediate tensor is written.

Each stage has a graph of its own. To the next stage, its output is a checkpoint whose tensors are nodes instead of file
ranges. The graphs are then linked to one, in which a copy of a copy is a copy of the source, and fused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from sys import intern
from typing import Any

from ...io.checkpoint.checkpoint import Checkpoint
from ...io.tensors.dtypes import F32, F64, DType
from ...io.tensors.refs import TensorClass
from ...io.tensors.table import TensorTable
from ...methods.kernel.method import Method
from ...methods.kernel.spec import InputSpec
from ..model.inputs import Model, OpenModel
from ..model.logical import ArrangedTensors
from ..model.vocabularies.known import Vocabularies, tokenizer_source
from ..recipe.entries.dtype_lookup import nominal_dtype, rounds
from ..recipe.types import ModelReference, Recipe, Stage
from .build import BuiltGraph, Saved, build_graph
from .checks.buffers import BufferCheck, StoredBuffer
from .checks.output_formats import refuse_blocks_between_stages
from .fuse import fuse
from .graph import Kind, MergeGraph, Operation, Value
from .usage import REPLACED, UnreadTensors, Unused


def build_stages(
    recipe: Recipe,
    methods: Mapping[str, Method],
    open_model: OpenModel,
    config_of: Callable[[Stage, BuiltGraph], Mapping[str, Any] | None],
    *,
    seed: int = 0,
    compares: bool = False,
) -> BuiltGraph:
    """Build the graph of a recipe with one or more stages.

    Args:
        recipe: the recipe, with its stages in topological order.
        methods: the merge methods by name.
        open_model: function that opens the Checkpoint of a ModelReference; not called for stages.
        config_of: function that returns the config.json of a stage's output; called once for each stage, in order.
        seed: seed for methods that sample.
        compares: whether outputs of 16 bits are compared with the base; see `TensorRules`.

    Raises:
        RecipeError: if the recipe refers to layers or parts that the models don't have.
        CheckpointError: if the models are incompatible.
    """
    if len(recipe.stages) == 1:
        single = build_graph(recipe, recipe.output, methods, open_model, seed=seed, compares=compares)
        if single.graph.uses_nodes:
            single = replace(single, graph=fuse(single.graph), unfused=single.graph)
        config_of(recipe.output, single)
        return single
    checkpoints: dict[str, Checkpoint] = {}
    built: list[BuiltGraph] = []

    def open_any(reference: ModelReference) -> Checkpoint:
        stage = recipe.stage(reference)
        return open_model(reference) if stage is None else checkpoints[stage.name or ""]

    known = Vocabularies(recipe, open_model)
    for number, stage in enumerate(recipe.stages):
        last = number == len(recipe.stages) - 1
        if not last:
            refuse_blocks_between_stages(recipe, stage)
        graph = build_graph(
            recipe,
            stage,
            methods,
            open_any,
            seed=seed,
            intermediate=not last,
            compares=compares and last,
            known=known,
        )
        built.append(graph)
        new = () if graph.vocabulary is None else graph.vocabulary.new
        known.add_stage(stage, tokenizer_source(stage, graph.models[graph.donor].reference), new)
        config = config_of(stage, graph)
        if not last:
            checkpoints[stage.name or ""] = _as_checkpoint(stage, graph, config)
    return _Linker(recipe, built, methods).link()


def _as_checkpoint(stage: Stage, built: BuiltGraph, config: Mapping[str, Any] | None) -> Checkpoint:
    """A stage's output as a checkpoint for the next stage, with the dtypes that it would have on disk.

    The offset of a tensor is the number of its output in the stage's graph.
    """
    graph, outputs = built.graph, built.graph.outputs

    classes: list[TensorClass] = []
    known: dict[tuple[str, tuple[int, ...]], TensorClass] = {}
    for name, node in zip(outputs.names, outputs.nodes, strict=True):
        dtype, shape = _stored_dtype(stage, graph, name, node), graph.shape(node)
        if (dtype.name, shape) not in known:
            known[dtype.name, shape] = TensorClass(dtype, shape, dtype.nbytes(graph.elements(node)))
        classes.append(known[dtype.name, shape])
    tensors = TensorTable()
    tensors.add(Path(stage.name or "stage"), tuple(map(intern, outputs.names)), classes, range(len(outputs)))
    arranged = ArrangedTensors(tensors if built.copies else {})
    arranged.found = tuple(copy.tensor_of(tensors) for copy in built.copies.values())
    donor = built.models[built.donor].checkpoint
    return replace(
        donor,
        tensors=arranged if arranged.found else tensors,
        config=None if config is None else dict(config),
        files=(),
        ignored=(),
        remarks=(),
    )


def _stored_dtype(stage: Stage, graph: MergeGraph, name: str, node: int) -> DType:
    """The dtype of a stage's tensor if the stage's output is written.

    Args:
        stage: the stage.
        graph: graph of the stage without its `dtype`.
        name: name of the output tensor.
        node: node that computes it.
    """
    nominal, dtype = nominal_dtype(stage) if rounds(stage, name) else stage.dtype, graph.node_dtype[node]
    kept = graph.operation(node).kind is Kind.REQUIRE_EQUAL
    return nominal if nominal is not None and not kept and dtype.kind is nominal.kind else dtype


class _Linker:
    """Links the graphs of all stages to one task graph that only reads files: stages are ordinary nodes.

    An intermediate tensor is in the work dtype, unless its stage has an ``out_dtype``, which rounds it.

    Args:
        recipe: the recipe.
        built: graph of each stage, in order.
        methods: the merge methods by name.
    """

    def __init__(self, recipe: Recipe, built: list[BuiltGraph], methods: Mapping[str, Method]) -> None:
        self._recipe = recipe
        self._built = built
        self._passthrough = methods["passthrough"]
        references: dict[ModelReference, int] = {}
        self._models: list[Model] = []
        for found in built:
            for model in found.models:
                if recipe.stage(model.reference) is not None:
                    continue
                if model.reference not in references:
                    references[model.reference] = len(self._models)
                    self._models.append(replace(model, number=len(self._models)))
                self._models[references[model.reference]].named |= model.named
        self._numbers = references
        names = {stage.name: number for number, stage in enumerate(recipe.stages)}
        # for each stage and each of its models, the number of the stage whose output the model is
        self._stages = [
            [None if (stage := recipe.stage(model.reference)) is None else names[stage.name] for model in found.models]
            for found in built
        ]
        self._graph = MergeGraph(tuple(model.name for model in self._models))
        self._rounded = [
            {output.node for output in found.graph.outputs if rounds(stage, output.name)}
            for stage, found in zip(recipe.stages, built, strict=True)
        ]
        self._wide: set[int] = set()  # nodes of the linked graph that are computed in float64
        self._conversions: dict[tuple[int, ...], Operation] = {}

    def link(self) -> BuiltGraph:
        """Return the linked graph, fused, with the facts of the last stage."""
        last, graph = len(self._built) - 1, self._graph
        final = self._built[last]
        saved = [number for number, stage in enumerate(self._recipe.stages[:-1]) if stage.save]
        values = self._values([*saved, last])
        for output in final.graph.outputs:
            dtype, shape = final.graph.node_dtype[output.node], final.graph.shape(output.node)
            graph.add_output(output.name, self._stored(values[last, output.node], dtype, shape), output.group)
        for number in saved:
            saving, found = self._recipe.stages[number], self._built[number].graph
            for output in found.outputs:
                dtype, shape = _stored_dtype(saving, found, output.name, output.node), found.shape(output.node)
                node = self._stored(values[number, output.node], dtype, shape)
                graph.add_output(output.name, node, output.group, saving.name or "")
        donor = final
        while self._recipe.stage(reference := donor.models[donor.donor].reference.base) is not None:
            stage = self._recipe.stage(reference)
            donor = self._built[next(n for n, found in enumerate(self._recipe.stages) if found is stage)]
        return replace(
            final,
            graph=fuse(graph),
            unfused=graph,
            models=tuple(self._models),
            donor=self._numbers[reference],
            donor_config=final.models[final.donor].checkpoint.config,
            unused=tuple(dict.fromkeys(self._unused())),
            warnings=tuple(dict.fromkeys(warning for found in self._built for warning in found.warnings)),
            parameters=tuple(use for found in self._built for use in found.parameters),
            saved=tuple(Saved(self._recipe.stages[number], self._built[number].layers) for number in saved),
            intermediates=sum(len(found.graph.outputs) for found in self._built[:-1]),
            buffers=tuple(dict.fromkeys(self._buffers())),
        )

    # --- nodes -------------------------------------------------------------------------------------------------

    def _computing(self, number: int, read: int) -> tuple[int, int] | None:
        """The stage and its node that compute what a stage reads; None if it reads a file."""
        graph = self._built[number].graph
        stage = self._stages[number][graph.read_models[read]]
        if stage is None:
            return None
        _, offsets = graph.reads.places()
        return stage, self._built[stage].graph.outputs.nodes[offsets[read]]

    def _values(self, stages: list[int]) -> dict[tuple[int, int], Value]:
        """Add what the outputs of some stages are computed from; return the value of each node of a stage by both."""
        needed: list[set[int]] = [set() for _ in self._built]
        for number in stages:
            needed[number] |= {output.node for output in self._built[number].graph.outputs}
        for number in range(len(self._built) - 1, -1, -1):
            graph = self._built[number].graph
            for node in range(len(graph.node_sources) - 1, -1, -1):  # users come after what they use
                for value in graph.node_sources[node] if node in needed[number] else ():
                    if value < 0:
                        needed[number].add(~value)
                    elif (computing := self._computing(number, value)) is not None:
                        needed[computing[0]].add(computing[1])
        values: dict[tuple[int, int], Value] = {}
        for number, nodes in enumerate(needed):
            for node in sorted(nodes):
                values[number, node] = self._value(number, node, values)
        return values

    def _value(self, stage: int, node: int, values: Mapping[tuple[int, int], Value]) -> Value:
        """Add a node of a stage, and return its value."""
        built = self._built[stage]
        graph, operation = built.graph, built.graph.operation(node)
        sources: list[Value] = []
        for value in graph.node_sources[node]:
            if value < 0:
                sources.append(values[stage, ~value])
            elif (computing := self._computing(stage, value)) is not None:
                sources.append(values[computing])
            else:
                sources.append(self._read(built, value))
        if len(graph.results_with(node)) > 1:
            return self._encoded(graph, node, sources)
        rounded = graph.node_dtype[node] if node in self._rounded[stage] else None
        copies = operation.kernel is not None and operation.kernel.copies is not None and not operation.accesses
        if operation.copies_tensor or (copies and rounded is None):
            return sources[0]
        if operation.kind is Kind.REQUIRE_EQUAL:
            return self._equal(operation, sources, graph.node_dtype[node])
        shape = graph.shape(node)
        if operation.kind is Kind.COPY:
            operation = self._picked(operation, sources[0], shape)
        computed = sources[0] if copies else self._computed(operation, sources, graph.node_key[node], shape)
        return computed if rounded is None else self._converted(computed, rounded)

    def _encoded(self, graph: MergeGraph, node: int, sources: list[Value]) -> Value:
        """Add a node that computes several tensors, such as codes and scales, or find one of the others."""
        linked = self._graph
        if graph.operation(node).kind is Kind.RESULT:
            return ~linked.results(~sources[0])[graph.results_with(node).index(node)]
        made = linked.add_node(graph.operation(node), tuple(sources), graph.node_dtype[node], shape=graph.shape(node))
        if len(linked.results(made)) == 1:
            others = graph.results(node)[1:]
            linked.add_results(made, [(graph.node_dtype[other], graph.shape(other)) for other in others])
        return ~made

    def _read(self, built: BuiltGraph, read: int) -> Value:
        """Add a read of a file by a stage."""
        graph = built.graph
        model, name = (
            self._models[self._numbers[built.models[graph.read_models[read]].reference]],
            graph.read_names[read],
        )
        if isinstance(model.tensors, TensorTable):
            return self._graph.add_stored(model.number, name, model.tensors)
        return self._graph.add_read(model.number, name, graph.reads[read])

    def _picked(self, operation: Operation, source: Value, shape: tuple[int, ...]) -> Operation:
        """The kernel that loads the elements which a copy with an access copies."""
        inputs = InputSpec(1, None, shape, operation.copied, (self._graph.value_shape(source),))
        return Operation(Kind.MERGE, operation.method, kernel=self._passthrough.kernel(inputs, {}))

    def _computed(self, operation: Operation, sources: list[Value], key: int, shape: tuple[int, ...]) -> Value:
        """Add a node that computes in the work dtype of its sources."""
        graph = self._graph
        wide = any(graph.reads[value].dtype == F64 if value >= 0 else ~value in self._wide for value in sources)
        node = graph.add_node(operation, tuple(sources), F64 if wide else F32, key, shape)
        if wide:
            self._wide.add(node)
        return ~node

    def _converted(self, value: Value, dtype: DType) -> Value:
        """Add a node that rounds a value to a dtype, unless it is stored so."""
        graph, shape = self._graph, self._graph.value_shape(value)
        if value >= 0 and graph.reads[value].dtype == dtype:
            return value
        operation = self._conversions.get(shape)
        if operation is None:
            kernel = self._passthrough.kernel(InputSpec(1, None, shape), {})
            operation = self._conversions[shape] = Operation(Kind.MERGE, "passthrough", kernel=kernel)
        node = graph.add_node(operation, (value,), dtype)
        if value < 0 and ~value in self._wide:
            self._wide.add(node)
        return ~node

    def _as_in_file(self, read: int) -> tuple[DType, tuple[int, ...]] | None:
        """The dtype and shape of a read in its file: parts of values, such as packed codes, are read as others."""
        model, name = self._models[self._graph.read_models[read]], self._graph.read_names[read]
        stored = model.checkpoint.tensors.get(name)
        return None if stored is None else (stored.dtype, stored.shape)

    def _equal(self, operation: Operation, sources: list[Value], dtype: DType) -> Value:
        """Add a node of tensors that must be equal, those that earlier stages compare included."""
        graph = self._graph
        reads = [read for value in sources for read in ([value] if value >= 0 else graph.node_sources[~value])]
        distinct = tuple(dict.fromkeys(reads))
        return distinct[0] if len(distinct) == 1 else ~graph.add_node(operation, distinct, dtype)

    def _stored(self, value: Value, dtype: DType, shape: tuple[int, ...]) -> int:
        """Add the node of an output that has a value, rounded to `dtype`."""
        graph = self._graph
        if value >= 0 and (graph.reads[value].dtype == dtype or self._as_in_file(value) == (dtype, shape)):
            return graph.add_node(Operation(Kind.COPY, "passthrough"), (value,), dtype, shape=shape)
        if value < 0 and (graph.operation(~value).kind is Kind.REQUIRE_EQUAL or len(graph.results_with(~value)) > 1):
            return ~value
        return ~self._converted(value, dtype)

    # --- facts -------------------------------------------------------------------------------------------------

    def _buffers(self) -> Iterator[BufferCheck]:
        """The buffers that are compared between the models, in all stages."""
        for number, found in enumerate(self._built):
            for check in found.buffers:
                chosen, *others = (self._in_file(number, each) for each in (check.chosen, *check.others))
                others = [each for each in dict.fromkeys(others) if each != chosen]
                yield BufferCheck(check.name, chosen, tuple(others))

    def _in_file(self, number: int, buffer: StoredBuffer) -> StoredBuffer:
        """A buffer of an input of a stage as it is stored in a file: stages only copy buffers."""
        while (stage := self._stages[number][buffer.model]) is not None:
            number, graph = stage, self._built[stage].graph
            read = graph.node_sources[graph.outputs.nodes[buffer.ref.offset]][0]
            buffer = StoredBuffer(graph.read_models[read], graph.read_names[read], graph.reads[read])
        return buffer._replace(model=self._numbers[self._built[number].models[buffer.model].reference])

    def _unused(self) -> Iterator[Unused]:
        """Every tensor in a file that the linked graph doesn't read, with the cause in one of the stages."""
        causes: dict[tuple[int, str], tuple[str, int | None]] = {}
        for found in self._built:
            numbers = {model.name: self._numbers.get(model.reference) for model in found.models}
            for unused in found.unused:
                number = numbers[unused.model]
                if number is None:  # tensors of a stage are unused: their sources may be, too
                    indirect = f"{unused.model}: {unused.reason}", None
                    causes = dict.fromkeys(self._stored_sources(unused.model, unused.tensors), indirect) | causes
                elif unused.tensors:
                    causes |= {(number, name): (unused.cause, unused.layer) for name in unused.tensors}
                else:
                    yield unused
        unread = UnreadTensors(self._graph, self._models)
        for model in sorted(self._models, key=lambda each: not each.named):
            names: dict[tuple[str, int | None], list[str]] = {}
            other = "no tensor of the output needs it" if model.named else REPLACED
            for name in unread.of(model):
                names.setdefault(causes.get((model.number, name), (other, None)), []).append(name)
            yield from (Unused(model.name, why, tuple(found), layer) for (why, layer), found in names.items())

    def _stored_sources(self, stage: str, names: Collection[str]) -> Iterator[tuple[int, str]]:
        """The tensors in files, by model and name, that some tensors of a stage are computed from."""
        number = next(number for number, found in enumerate(self._recipe.stages) if found.name == stage)
        copies = self._built[number].copies
        wanted = {part for name in names for part in (copies[name].parts if name in copies else (name,))}
        stack = [(number, output.node) for output in self._built[number].graph.outputs if output.name in wanted]
        seen = set(stack)
        while stack:
            number, node = stack.pop()
            built = self._built[number]
            for read in built.graph.reads_of(node):
                computing = self._computing(number, read)
                if computing is None:
                    yield (
                        self._numbers[built.models[built.graph.read_models[read]].reference],
                        built.graph.read_names[read],
                    )
                elif computing not in seen:
                    seen.add(computing)
                    stack.append(computing)
