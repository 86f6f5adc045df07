"""Recipe + checkpoints' headers -> merge graph: names and layers become nodes; every input tensor is accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from ..io.checkpoint import Checkpoint
from ..io.dtypes import F32, F64, DType
from ..io.dtypes import Kind as ElementKind
from ..methods.contract import Absent, Base, Inputs, Kernel, Method, MethodError
from .graph import Kind, MergeGraph, Operation
from .layers import LayerMap, Stack, find_layers, is_buffer, is_embedding, is_head, is_optional, tied_embedding
from .parameters import SliceParameters, layer_position
from .quantized import quantized_tensors
from .recipe import ModelReference, Module, Recipe, Slice, Stage, base_index, modules_of


@dataclass(slots=True)
class Model:
    """An input model, as planning sees it.

    Args:
        number: its place in the recipe.
        reference: what the recipe calls it.
        checkpoint: its headers.
        layers: which of its tensors are in which layer.
        by_layer: for each main stack and layer, the tensors by the rest of their name.
        outside: the tensors in no layer of a main stack, in file order.
        quantized: tensors whose values need others to be understood, with the reason.
    """

    number: int
    reference: ModelReference
    checkpoint: Checkpoint
    layers: LayerMap
    by_layer: dict[tuple[int, int], dict[str, str]] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    quantized: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self.reference.text


@dataclass(frozen=True, slots=True)
class Unused:
    """Input tensors that no output needs.

    Args:
        model: the model that they are of.
        reason: why.
        tensors: their names.
    """

    model: str
    reason: str
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OutputStack:
    """A stack of layers of the output.

    Args:
        donor: the donor's stack that it is made like.
        sources: for each of its layers, the donor's layer that config.json's per-layer lists follow.
    """

    donor: Stack
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BuiltGraph:
    """A recipe turned into a graph, and what the output's other files need to know.

    Args:
        graph: reads, nodes, outputs.
        models: the input models in the order of the recipe.
        donor: the number of the model that config and tokenizer come from.
        stacks: the output's stacks of layers, the main one first.
        dtype: torch's name of the type of the output, or None where it is mixed and the recipe sets none.
        head: whether a head (``lm_head``) is written.
        unused: input tensors that no output needs, with the reasons.
        warnings: what the user should know.
    """

    graph: MergeGraph
    models: tuple[Model, ...]
    donor: int
    stacks: tuple[OutputStack, ...]
    dtype: str | None
    head: bool
    unused: tuple[Unused, ...]
    warnings: tuple[str, ...]

    @property
    def layers(self) -> int:
        """Layers of the output's main stack; 0 where it has none."""
        return len(self.stacks[0].sources) if self.stacks else 0


def build_graph(
    recipe: Recipe, stage: Stage, methods: Mapping[str, Method], open_model: Any, *, seed: int = 0
) -> BuiltGraph:
    """The graph of one stage of a recipe.

    Args:
        recipe: for where its mistakes stand.
        stage: what to build.
        methods: by name.
        open_model: called with a ModelReference, returns its Checkpoint.
        seed: of the random methods.

    Raises:
        RecipeError: where the recipe asks for what the models don't have.
        CheckpointError: where the models don't fit each other.
    """
    return _Builder(recipe, stage, methods, open_model, seed).build()


class _Builder:
    """The state of building one graph."""

    def __init__(self, recipe: Recipe, stage: Stage, methods: Mapping[str, Method], open_model: Any, seed: int) -> None:
        self.recipe = recipe
        self.stage = stage
        self.methods = methods
        self.method = methods[stage.merge_method]
        self.seed = seed
        self.warnings: list[str] = []
        self.modules = modules_of(stage)
        self.models = self._open_models(open_model)
        self.by_reference = {model.reference: model for model in self.models}
        base = stage.base_model
        self.donor = self.by_reference[base] if base is not None else self.models[0]
        self.graph = MergeGraph(tuple(model.name for model in self.models))
        self.used: set[tuple[int, str]] = set()
        self.reasons: dict[tuple[int, str], str] = {}
        self.written: dict[str, str] = {}
        self.layer_sources: dict[int, list[int]] = {}
        self._operations: dict[Any, Operation] = {}
        self._group = 0

    # --- models ------------------------------------------------------------------------------------------------

    def _open_models(self, open_model: Any) -> tuple[Model, ...]:
        references = dict.fromkeys(
            source.model for module in self.modules for part in module.slices or () for source in part.sources
        )
        if self.stage.base_model is not None:
            references.setdefault(self.stage.base_model)
        models = []
        for number, reference in enumerate(references):
            checkpoint = open_model(reference)
            layers = find_layers(checkpoint.tensors, checkpoint.config)
            model = Model(number, reference, checkpoint, layers)
            mains = {stack.prefix: index for index, stack in enumerate(layers.mains)}
            for name in checkpoint.tensors:
                layer = layers.split(name)
                if layer is None:
                    model.outside.append(name)
                else:
                    model.by_layer.setdefault((mains[layer.stack], layer.index), {})[layer.rest] = name
            model.quantized = quantized_tensors(checkpoint.tensors)
            models.append(model)
        return tuple(models)

    # --- the walk ----------------------------------------------------------------------------------------------

    def build(self) -> BuiltGraph:
        for module in self.modules:
            self._build_module(module)
        if not self.graph.outputs:
            raise CheckpointError("the recipe makes no tensor at all: the models have none in common with it")
        names = {dtype.torch_name for dtype in self.graph.node_dtype if dtype.kind is ElementKind.FLOAT}
        wanted = self.stage.out_dtype or self.stage.dtype
        dtype = wanted.torch_name if wanted is not None else (names.pop() if len(names) == 1 else None)
        return BuiltGraph(
            graph=self.graph,
            models=self.models,
            donor=self.donor.number,
            stacks=tuple(
                OutputStack(stack, tuple(self.layer_sources[number]))
                for number, stack in enumerate(self.donor.layers.mains)
                if number in self.layer_sources
            ),
            dtype=dtype,
            head=any(is_head(output.name) for output in self.graph.outputs),
            unused=tuple(self._account()),
            warnings=tuple(self.warnings),
        )

    def _build_module(self, module: Module) -> None:
        """The tensors of one module: before the layers, the layers slice by slice, after them."""
        parts = [_Part(self, module, part) for part in module.slices or ()]
        stacks = self._stacks(module)
        outside = [name for name in self._outside_names(parts[0], parts[-1]) if self._belongs(module, name)]
        after = {name for name in outside if self.donor.layers.is_after(name)}
        self._group += 1
        for name in outside:
            if name not in after:
                self._add_outside(parts[0], name)
        for number in stacks:
            count = 0
            for part in parts:
                self._group += 1
                count = self._add_slice(part, number, count)
            self._add_extras(parts[-1], number, count)
        self._group += 1
        for name in outside:
            if name in after:
                self._add_outside(parts[-1], name)

    def _named(self, module: Module) -> bool:
        """Whether the recipe names the module, so that it is a part of the model."""
        return self.stage.modules is not None

    def _stacks(self, module: Module) -> list[int]:
        """The main stacks that a module's slices are about."""
        mains = self.donor.layers.mains
        if self._named(module):
            stack = self.donor.layers.module(module.name)
            if stack is None:
                known = ", ".join(stack.prefix for stack in self.donor.layers.stacks)
                raise self.recipe.error(
                    module.place, f"no part of {self.donor.name} is called {module.name!r}; its layers are in: {known}"
                )
            return [mains.index(stack)] if stack in mains else []
        sliced = any(source.layer_range is not None for part in module.slices or () for source in part.sources)
        if sliced and len(mains) > 1:
            prefixes = " and ".join(stack.prefix for stack in mains)
            raise self.recipe.error(
                module.place,
                f"{self.donor.name} has two stacks of layers, {prefixes}: say under `modules` which one the slices are of",
            )
        return list(range(len(mains)))

    def _belongs(self, module: Module, name: str) -> bool:
        """Whether a tensor outside the layers is of this module."""
        if not self._named(module):
            return True
        owner, own = self.donor.layers.owner(name), self.donor.layers.module(module.name)
        return owner == own if owner is not None else module is self.modules[0]

    def _outside_names(self, first: _Part, last: _Part) -> Iterator[str]:
        """Tensors outside the layers, the donor's first, each once."""
        sources = [self.donor, *(source for part in (first, last) for source in part.models)]
        seen: set[str] = set()
        for model in sources:
            for name in model.outside:
                if name not in seen:
                    seen.add(name)
                    yield name

    def _add_outside(self, part: _Part, name: str) -> None:
        names = [name if name in model.checkpoint.tensors else None for model in part.models]
        if not any(names):
            return
        if is_head(name):
            names = [
                found if found is not None else tied_embedding(name, model.outside)
                for found, model in zip(names, part.models, strict=True)
            ]
        self._add_tensor(part, name, names, 0.0)

    def _add_slice(self, part: _Part, stack: int, first: int) -> int:
        """The layers of one slice, from output layer `first` on; the number of the layer after them."""
        ranges = part.ranges(stack)
        count = ranges[0][1] - ranges[0][0]
        for index in range(count):
            places = [start + index for start, _ in ranges]
            self._add_layer(part, stack, places, first + index, layer_position(index, count))
            own = part.models.index(self.donor) if self.donor in part.models else 0
            self.layer_sources.setdefault(stack, []).append(places[own])
        return first + count

    def _add_layer(self, part: _Part, stack: int, places: Sequence[int], target: int, t: float) -> None:
        layers = [model.by_layer.get((stack, place), {}) for model, place in zip(part.models, places, strict=True)]
        prefix = self.donor.layers.mains[stack].prefix
        own = part.models.index(self.donor) if self.donor in part.models else 0
        for rest in dict.fromkeys(rest for layer in (layers[own], *layers) for rest in layer):
            name = f"{prefix}.{target}.{rest}" if rest else f"{prefix}.{target}"
            self._add_tensor(part, name, [layer.get(rest) for layer in layers], t)

    def _add_extras(self, part: _Part, stack: int, count: int) -> None:
        """Layers beyond config.json's count (such as prediction heads) follow the stack, as they do in the model."""
        extras = self.donor.layers.mains[stack].extras if self.donor.layers.mains else ()
        old = self.donor.layers.mains[stack].count if self.donor.layers.mains else 0
        for extra in extras:
            if not any((stack, extra) in model.by_layer for model in part.models):
                continue
            target = count + extra - old
            self.warnings.append(
                f"{self.donor.name}: layer {extra} lies beyond the {old} layers that config.json counts (a prediction "
                f"head, most likely): it is kept, as layer {target}"
            )
            self._group += 1
            self._add_layer(part, stack, [extra] * len(part.models), target, 0.0)

    # --- one tensor --------------------------------------------------------------------------------------------

    def _add_tensor(self, part: _Part, name: str, names: Sequence[str | None], t: float) -> None:
        """The node of one output tensor; `names` are its sources' names, None where a source doesn't have it."""
        present = [(index, found) for index, found in enumerate(names) if found is not None]
        shape = part.models[present[0][0]].checkpoint.tensors[present[0][1]].shape
        if is_buffer(name, shape):
            self._add_buffer(part, name, present)
            return
        lone = False
        if len(present) < len(names):
            lone = self._without_some(part, name, present)
        self._check_shapes(part, name, present)
        refs = [part.models[index].checkpoint.tensors[found] for index, found in present]
        dtypes = [ref.dtype for ref in refs]
        if any(dtype.kind is not ElementKind.FLOAT for dtype in dtypes):
            self._add_integers(part, name, present, dtypes)
            return
        wanted = self.stage.out_dtype or self.stage.dtype or promote(dtypes)
        if lone:
            operation = self._operation(self.methods["passthrough"], {"scale": (1.0,)}, 1, None, shape, (), part)
        else:
            base = next((place for place, (index, _) in enumerate(present) if index == part.base), None)
            values = part.parameters.values(name, present, t)
            positions = tuple(part.models[index].number for index, _ in present)
            operation = self._operation(self.method, values, len(present), base, shape, positions, part)
        kernel = operation.kernel
        if kernel is not None and kernel.copies is not None:
            chosen = present[kernel.copies]
            model = part.models[chosen[0]]
            ref = model.checkpoint.tensors[chosen[1]]
            for other in present:
                if other != chosen:
                    self.reasons[part.models[other[0]].number, other[1]] = (
                        f"{self.method.name} takes {model.name}'s alone"
                    )
            present = [chosen]
            if ref.dtype == wanted or (
                chosen[1] in model.quantized and self.stage.out_dtype is None and self.stage.dtype is None
            ):
                self._add(name, Operation(Kind.COPY, operation.method, operation.parameters), part, present, ref.dtype)
                return
        self._refuse_quantized(part, name, present)
        key = self._random_key(name) if kernel is not None and kernel.random else 0
        self._add(name, operation, part, present, wanted, key)

    def _add(
        self,
        name: str,
        operation: Operation,
        part: _Part,
        present: Sequence[tuple[int, str]],
        dtype: DType,
        key: int = 0,
    ) -> None:
        if name in self.written:
            raise CheckpointError(f"two tensors of the output would be called {name}")
        self.written[name] = name
        reads = []
        for index, found in present:
            model = part.models[index]
            self.used.add((model.number, found))
            reads.append(self.graph.add_read(model.number, found, model.checkpoint.tensors[found]))
        self.graph.add_output(name, self.graph.add_node(operation, tuple(reads), dtype, key), self._group)

    def _add_buffer(self, part: _Part, name: str, present: Sequence[tuple[int, str]]) -> None:
        """A buffer comes from the base, else from the first that has it."""
        chosen = next((entry for entry in present if entry[0] == part.anchor), present[0])
        for entry in present:
            if entry != chosen:
                reason = f"no parameter: taken from {part.models[chosen[0]].name}"
                self.reasons[part.models[entry[0]].number, entry[1]] = reason
        ref = part.models[chosen[0]].checkpoint.tensors[chosen[1]]
        self._add(name, Operation(Kind.COPY, "passthrough"), part, [chosen], ref.dtype)

    def _add_integers(
        self, part: _Part, name: str, present: Sequence[tuple[int, str]], dtypes: Sequence[DType]
    ) -> None:
        """Integer tensors are copied where all inputs are equal, which the merge finds out."""
        if len(set(dtypes)) > 1:
            first, second = present[0][0], next(i for (i, _), d in zip(present, dtypes, strict=True) if d != dtypes[0])
            raise CheckpointError(
                f"tensor {name} is {dtypes[0].name} in {part.models[first].name} and "
                f"{part.models[second].checkpoint.tensors[name].dtype.name} in {part.models[second].name}: "
                "integer tensors are only copied, where all inputs are equal"
            )
        if len(present) > 1:
            self._refuse_quantized(part, name, present)
        kind = Kind.COPY if len(present) == 1 else Kind.SAME
        self._add(name, Operation(kind, self.method.name), part, present, dtypes[0])

    def _without_some(self, part: _Part, name: str, present: Sequence[tuple[int, str]]) -> bool:
        """What the method makes of a tensor that some sources lack: whether a lone one is passed through.

        Raises:
            CheckpointError: where it has no rule for it.
        """
        have = [index for index, _ in present]
        lacking = next(i for i in range(len(part.models)) if i not in have)
        if is_optional(name):
            alone = len(present) == 1
            rule = self.method.absent
            if rule is Absent.LONE and alone:
                return True
            if rule is Absent.LONE_BASE and alone and have[0] == part.base:
                return True
            if rule is Absent.PRESENT:
                return False
            if rule is Absent.BASE_PRESENT and part.base in have:
                return alone
        raise CheckpointError(
            f"tensor {name} is in {part.models[have[0]].name} and not in {part.models[lacking].name}: models of one "
            f"architecture have the same tensors, and {self.method.name} has no rule for one that is missing"
        )

    def _check_shapes(self, part: _Part, name: str, present: Sequence[tuple[int, str]]) -> None:
        first_index, first_name = present[0]
        first = part.models[first_index].checkpoint.tensors[first_name].shape
        for index, found in present[1:]:
            shape = part.models[index].checkpoint.tensors[found].shape
            if shape == first:
                continue
            a, b = part.models[first_index].name, part.models[index].name
            if len(shape) == len(first) == 2 and shape[1] == first[1] and (is_embedding(name) or is_head(name)):
                raise CheckpointError(
                    f"tensor {name}: {a} has a vocabulary of {first[0]} rows and {b} one of {shape[0]}: models with "
                    "different vocabularies can't be merged yet; resize one (transformers' resize_token_embeddings) so that "
                    "both have the same tokens in the same rows"
                )
            raise CheckpointError(
                f"tensor {name} has shape {list(first)} in {a} and {list(shape)} in {b}: only models of the same shape "
                "can be merged"
            )

    def _refuse_quantized(self, part: _Part, name: str, present: Sequence[tuple[int, str]]) -> None:
        for index, found in present:
            model = part.models[index]
            dtype = model.checkpoint.tensors[found].dtype
            reason = model.quantized.get(found)
            if reason is None and dtype.kind is ElementKind.FLOAT and dtype.bits % 8 == 0 and dtype.name != "F8_E8M0":
                continue
            reason = reason or f"it is {dtype.name}"
            raise CheckpointError(
                f"tensor {found} of {model.name} is quantized ({reason}): arithmetic on it would need it dequantized, which "
                "mergeloom can't do yet; use a bfloat16 version of the model. passthrough without dtype keeps it as it is"
            )

    # --- operations --------------------------------------------------------------------------------------------

    def _operation(
        self,
        method: Method,
        values: Mapping[str, Any],
        count: int,
        base: int | None,
        shape: tuple[int, ...],
        positions: tuple[int, ...],
        part: _Part,
    ) -> Operation:
        """A method bound to its inputs and parameters; equal ones are one object."""
        if method.base is Base.NONE:
            base = None
        parameters = tuple(values.items())
        key = (method.name, parameters, count, base, shape, positions)
        found = self._operations.get(key)
        if found is not None:
            return found
        self._check_count(method, count - (base is not None), part)
        try:
            kernel: Kernel = method.kernel(Inputs(count, base, shape), dict(values))
        except MethodError as error:
            raise self.recipe.error(part.slice.place, f"{method.name}: {error}") from error
        operation = Operation(Kind.MERGE, method.name, parameters, base, positions if kernel.random else (), kernel)
        if positions and not kernel.random:
            operation = self._operations.setdefault((method.name, parameters, count, base, shape, ()), operation)
        self._operations[key] = operation
        return operation

    def _check_count(self, method: Method, others: int, part: _Part) -> None:
        beside = " beside the base" if method.base is not Base.NONE and part.base is not None else ""
        if others < method.minimum:
            raise self.recipe.error(
                part.slice.place,
                f"{method.name} needs at least {method.minimum} model(s){beside}, and there are {others}",
            )
        if method.maximum is not None and others > method.maximum:
            raise self.recipe.error(
                part.slice.place,
                f"{method.name} takes at most {method.maximum} model(s){beside}, and there are {others}",
            )

    def _random_key(self, name: str) -> int:
        """64 bits from the seed and the output tensor's name."""
        digest = hashlib.blake2b(f"{self.seed}\0{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    # --- accounting --------------------------------------------------------------------------------------------

    def _account(self) -> Iterator[Unused]:
        """Every input tensor that no node reads, with the reason."""
        for model in self.models:
            reasons: dict[str, list[str]] = {}
            for name in model.checkpoint.tensors:
                if (model.number, name) not in self.used:
                    reasons.setdefault(self._reason(model, name), []).append(name)
            for reason, names in reasons.items():
                yield Unused(model.name, reason, tuple(names))
            for file in model.checkpoint.ignored:
                yield Unused(model.name, f"{file.name} is not named by the index", ())

    def _reason(self, model: Model, name: str) -> str:
        known = self.reasons.get((model.number, name))
        if known is not None:
            return known
        layer = model.layers.split(name)
        if layer is not None:
            return f"layer {layer.index} is in no slice"
        if is_head(name):
            return "a tied head: the output has none"
        listed = any(model in _Part.models_of(self, part) for module in self.modules for part in module.slices or ())
        if not listed:
            return "the base model is no input of this recipe"
        return "outside the layers, which come from the first and the last slice"


class _Part:
    """A slice with its models opened."""

    def __init__(self, builder: _Builder, module: Module, part: Slice) -> None:
        self.slice = part
        self._builder = builder
        self.models = self.models_of(builder, part)
        method = builder.method
        self.base = base_index(builder.stage, part, method)
        reference = part.base_model or builder.stage.base_model
        self.anchor = next((i for i, source in enumerate(part.sources) if source.model == reference), None)
        if method.base is Base.REQUIRED and self.base is None:
            missing = (
                "a base_model" if reference is None else f"the base model {reference.text} among the slice's sources"
            )
            raise builder.recipe.error(part.place, f"{method.name} needs {missing}")
        self.parameters = SliceParameters(builder.recipe, builder.stage, module, part, method, self.base)

    @staticmethod
    def models_of(builder: _Builder, part: Slice) -> list[Model]:
        """The models of a slice's sources."""
        return [builder.by_reference[source.model] for source in part.sources]

    def ranges(self, stack: int) -> list[tuple[int, int]]:
        """The layers [first, end) that each source gives.

        Raises:
            RecipeError: where they are not in the model, or not equally many.
        """
        found = []
        for source, model in zip(self.slice.sources, self.models, strict=True):
            count = self._stack(model, stack).count
            first, end = source.layer_range or (0, count)
            if end > count:
                raise self._builder.recipe.error(
                    (*source.place, "layer_range"),
                    f"[{first}, {end}] ends past the last layer: {model.name} has {count} layers, so that {count} is the "
                    "largest end",
                )
            found.append((first, end))
        lengths = {end - first for first, end in found}
        if len(lengths) > 1:
            counts = ", ".join(
                f"{end - first} of {model.name}" for (first, end), model in zip(found, self.models, strict=True)
            )
            raise self._builder.recipe.error(
                self.slice.place, f"the sources of a slice must give equally many layers, and here they give {counts}"
            )
        return found

    def _stack(self, model: Model, number: int) -> Stack:
        mains = model.layers.mains
        if number >= len(mains):
            raise CheckpointError(
                f"{model.name} has {len(mains)} stack(s) of layers, and the recipe needs {number + 1}"
            )
        return mains[number]


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
