"""Recipe + checkpoints' headers -> merge graph: the walk over modules, slices and layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError
from ...io.safetensors.dtypes import Kind as ElementKind
from ...methods.kernel.contract import Method
from ..model.inputs import BoundSlice, Model, OpenModel, open_models
from ..model.layers import Stack, is_buffer, is_embedding, is_head, tied_embedding
from ..model.modules import StageModules
from ..recipe.parameters import layer_position
from ..recipe.types import Module, Recipe, Slice, Source, Stage, stage_inputs
from .graph import MergeGraph
from .rules import TensorRules, shape_mismatch
from .usage import TensorUsage, Unused

__all__ = ["BuiltGraph", "Model", "OutputStack", "Unused", "build_graph"]


@dataclass(frozen=True, slots=True)
class OutputStack:
    """A stack of layers of the output.

    Args:
        donor: the donor's stack that it is made like.
        sources: for each of its layers, the layer that config.json's per-layer lists follow.
    """

    donor: Stack
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """A stage whose output is written beside the last one's.

    Args:
        stage: the stage; its name is that of the folder.
        layers: of its main stack.
    """

    stage: Stage
    layers: int

    @property
    def folder(self) -> str:
        """The folder in OUT."""
        return self.stage.name or ""


@dataclass(frozen=True, slots=True)
class BuiltGraph:
    """A recipe turned into a graph, and what the output's other files need to know.

    Args:
        graph: reads, nodes, outputs.
        models: the input models in the order of the recipe.
        donor: the number of the model that config and tokenizer come from.
        donor_config: the config.json that the output's follows, or None: the donor's, or what a stage made of it.
        stacks: the output's stacks of layers, the main one first.
        dtype: torch's name of the type of the output, or None where it is mixed and the recipe sets none.
        head: whether a head (``lm_head``) is written.
        unused: input tensors that no output needs, with the reasons.
        warnings: what the user should know.
        saved: the stages whose output is written, too, each to a folder of OUT that bears its name.
        intermediates: how many tensors the stages before the last make.
    """

    graph: MergeGraph
    models: tuple[Model, ...]
    donor: int
    donor_config: Mapping[str, Any] | None
    stacks: tuple[OutputStack, ...]
    dtype: str | None
    head: bool
    unused: tuple[Unused, ...]
    warnings: tuple[str, ...]
    saved: tuple[Saved, ...] = ()
    intermediates: int = 0

    @property
    def layers(self) -> int:
        """Layers of the output's main stack; 0 where it has none."""
        return len(self.stacks[0].sources) if self.stacks else 0


def build_graph(
    recipe: Recipe, stage: Stage, methods: Mapping[str, Method], open_model: OpenModel, *, seed: int = 0
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

    def __init__(
        self, recipe: Recipe, stage: Stage, methods: Mapping[str, Method], open_model: OpenModel, seed: int
    ) -> None:
        self.recipe = recipe
        self.stage = stage
        self.warnings: list[str] = []
        sources = dict.fromkeys(stage_inputs(stage))
        base = stage.base_model
        references = dict.fromkeys((*sources, *(() if base is None else (base,))))
        self.models = open_models(references, open_model)
        self.sources = self.models[: len(sources)]
        by_reference = {model.reference: model for model in self.models}
        self.donor = by_reference[base] if base is not None else self.models[0]
        self.modules = StageModules(recipe, stage, self.donor)
        method = methods[stage.merge_method]
        self.parts = [
            [BoundSlice(recipe, stage, module, part, method, by_reference) for part in module.slices or ()]
            for module in self.modules.all
        ]
        self.outside = {
            name: BoundSlice(
                recipe, stage, self.modules.all[0], Slice((Source(model, None),), place=place), method, by_reference
            )
            for name, model in stage.outside.items()
            for place in ((*stage.place, "outside", name),)
        }
        self.graph = MergeGraph(tuple(model.name for model in self.models))
        self.account = TensorUsage()
        self.rules = TensorRules(stage, methods, self.graph, self.account, seed)
        self.layer_sources: dict[int, list[int]] = {}
        self._kinds: dict[int, set[frozenset[tuple[str, tuple[int, ...]]]]] = {}
        self._group = 0

    def build(self) -> BuiltGraph:
        for module, parts in zip(self.modules.all, self.parts, strict=True):
            self._build_module(module, parts)
        self._check_chosen_head()
        if not self.graph.outputs:
            raise CheckpointError("the recipe makes no tensor at all: the models have none in common with it")
        self._warn_of_filters()
        names = {dtype.torch_name for dtype in self.graph.node_dtype if dtype.kind is ElementKind.FLOAT}
        wanted = self.stage.out_dtype or self.stage.dtype
        dtype = wanted.torch_name if wanted is not None else (names.pop() if len(names) == 1 else None)
        head = any(is_head(output.name) for output in self.graph.outputs)
        return BuiltGraph(
            graph=self.graph,
            models=self.models,
            donor=self.donor.number,
            donor_config=self.donor.checkpoint.config,
            stacks=tuple(
                OutputStack(stack, tuple(self.layer_sources[number]))
                for number, stack in enumerate(self.donor.layers.mains)
                if number in self.layer_sources
            ),
            dtype=dtype,
            head=head,
            unused=tuple(self.account.unused(self.models, self.sources, head=head, covered=self.modules.covers)),
            warnings=tuple(self.warnings),
        )

    def _warn_of_filters(self) -> None:
        """A filter that fits no tensor is misspelt, or meant for another kind of model."""
        scopes = [self.stage.parameters]
        for module in self.modules.all:
            scopes.append(module.parameters)
            for part in module.slices or ():
                scopes += [part.parameters, *(source.parameters for source in part.sources)]
        settings = [setting for scope in scopes for setting in scope.values() if isinstance(setting, tuple)]
        names = {*self.graph.read_names, *(output.name for output in self.graph.outputs)} if settings else set()
        for wanted in dict.fromkeys(condition.filter for setting in settings for condition in setting):
            if wanted and wanted != "*" and not any(wanted in name for name in names):
                self.warnings.append(f"filter {wanted!r} fits no tensor's name: what it sets is used for none")

    # --- modules -----------------------------------------------------------------------------------------------

    def _build_module(self, module: Module, parts: Sequence[BoundSlice]) -> None:
        """The tensors of one module: before the layers, the layers slice by slice, after them."""
        stacks = self.modules.stacks(module)
        outside = [name for name in self._outside_names(parts[0], parts[-1]) if self.modules.belongs(module, name)]
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

    # --- outside the layers ------------------------------------------------------------------------------------

    def _outside_names(self, first: BoundSlice, last: BoundSlice) -> Iterator[str]:
        """Tensors outside the layers, the donor's first, each once."""
        seen: set[str] = set()
        others = [model for part in self.outside.values() for model in part.models]
        for model in (self.donor, *first.models, *last.models, *others):
            for name in model.outside:
                if name not in seen:
                    seen.add(name)
                    yield name

    def _named_part(self, name: str) -> str:
        """What `outside:` calls the part of the model that a tensor outside the layers belongs to."""
        if is_head(name):
            return "head"
        return "norm" if self.donor.layers.is_after(name) else "embeddings"

    def _add_outside(self, part: BoundSlice, name: str) -> None:
        chosen = self.outside.get(self._named_part(name))
        part = chosen or part
        names = [name if name in model.checkpoint.tensors else None for model in part.models]
        if is_head(name):
            names = [
                found if found is not None else tied_embedding(name, model.outside)
                for found, model in zip(names, part.models, strict=True)
            ]
        own = self.donor.checkpoint.tensors.get(name)
        if not any(names):
            if own is not None and not is_buffer(name, own.shape):
                raise CheckpointError(_missing(name, self.donor, part.models[0]))
            return
        if own is not None and self.donor not in part.models:
            source, found = next((i, found) for i, found in enumerate(names) if found is not None)
            model = part.models[source]
            shape = model.checkpoint.tensors[found].shape
            if shape != own.shape and not is_buffer(name, shape):
                raise CheckpointError(shape_mismatch(name, self.donor, own.shape, model, shape))
        self.rules.add(part, name, names, 0.0, self._group, as_it_is=chosen is not None)

    def _check_chosen_head(self) -> None:
        """Without any head, the chosen model's head is its embedding, which must then be the output's."""
        chosen = self.stage.outside.head
        if chosen is None or any(is_head(output.name) for output in self.graph.outputs):
            return
        embeddings = {
            self.models[self.graph.read_models[read]].reference
            for output in self.graph.outputs
            if is_embedding(output.name)
            for read in self.graph.node_sources[output.node]
        }
        if embeddings != {chosen}:
            raise self.recipe.error(
                (*self.stage.place, "outside", "head"),
                f"none of the models has a head of its own: {chosen.text}'s is its embedding, so that it can only "
                "come along with that: choose it for `embeddings`, too",
            )

    # --- layers ------------------------------------------------------------------------------------------------

    def _add_slice(self, part: BoundSlice, stack: int, first: int) -> int:
        """The layers of one slice, from output layer `first` on; the number of the layer after them."""
        ranges = part.ranges(stack)
        count = ranges[0][1] - ranges[0][0]
        own = part.models.index(self.donor) if self.donor in part.models else 0
        for index in range(count):
            places = [start + index for start, _ in ranges]
            if self.donor not in part.models:
                self._check_layer(part.models[0], stack, places[0])
            self._add_layer(part, stack, places, first + index, layer_position(index, count))
            self.layer_sources.setdefault(stack, []).append(places[own])
        return first + count

    def _add_layer(self, part: BoundSlice, stack: int, places: Sequence[int], target: int, t: float) -> None:
        layers = [model.by_layer.get((stack, place), {}) for model, place in zip(part.models, places, strict=True)]
        prefix = self.donor.layers.mains[stack].prefix
        own = part.models.index(self.donor) if self.donor in part.models else 0
        for rest in dict.fromkeys(rest for layer in (layers[own], *layers) for rest in layer):
            name = f"{prefix}.{target}.{rest}" if rest else f"{prefix}.{target}"
            self.rules.add(part, name, [layer.get(rest) for layer in layers], t, self._group)

    def _add_extras(self, part: BoundSlice, stack: int, count: int) -> None:
        """Layers beyond config.json's count (such as prediction heads) follow the stack, as they do in the model."""
        old = self.donor.layers.mains[stack].count
        for extra in self.donor.layers.mains[stack].extras:
            # a model that counts it among its layers, or has no config.json to count them, has no extra layer there
            if not any(extra in main.extras for model in part.models for main in model.layers.mains[stack : stack + 1]):
                continue
            target = count + extra - old
            self.warnings.append(
                f"{self.donor.name}: layer {extra} lies beyond the {old} layers that config.json counts (a prediction "
                f"head, most likely): it is kept, as layer {target}"
            )
            self._group += 1
            self._add_layer(part, stack, [extra] * len(part.models), target, 0.0)

    # --- what the donor's config.json describes ----------------------------------------------------------------

    def _check_layer(self, model: Model, stack: int, place: int) -> None:
        """A layer that is taken from another model than the donor must look like one of the donor's.

        Raises:
            CheckpointError: where a tensor is missing, superfluous or of another shape.
        """
        if stack not in self._kinds:
            layers = range(self.donor.stack(stack).count)
            self._kinds[stack] = {frozenset(_shapes(self.donor, stack, layer).items()) for layer in layers}
        shapes = _shapes(model, stack, place)
        if frozenset(shapes.items()) in self._kinds[stack]:
            return
        layer = min(place, self.donor.stack(stack).count - 1)
        known = _shapes(self.donor, stack, layer)
        for rest in (*known, *shapes):
            if rest not in shapes:
                name = self.donor.by_layer[stack, layer][rest]
                raise CheckpointError(_missing(name, self.donor, model))
            if rest not in known:
                raise CheckpointError(_missing(model.by_layer[stack, place][rest], model, self.donor))
            if shapes[rest] != known[rest]:
                name = model.by_layer[stack, place][rest]
                raise CheckpointError(shape_mismatch(name, self.donor, known[rest], model, shapes[rest]))


def _shapes(model: Model, stack: int, place: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's parameters, by the rest of their names."""
    tensors = model.checkpoint.tensors
    layer = model.by_layer.get((stack, place), {})
    return {rest: tensors[name].shape for rest, name in layer.items() if not is_buffer(name, tensors[name].shape)}


def _missing(name: str, first: Model, second: Model) -> str:
    return (
        f"tensor {name} is in {first.name} and not in {second.name}: slices of different models fit together only "
        "where their tensors have the same names and shapes"
    )
