"""Builds the merge graph of a stage from the headers of its models, module by module and slice by slice."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from ...errors import CheckpointError, MergeloomError, RecipeError
from ...io.tensors.dtypes import Kind as ElementKind
from ...methods.kernel.method import Method
from ..model.checks.mismatch import TensorMismatch, explain_mismatch
from ..model.checks.shapes import shape_mismatch
from ..model.inputs import BoundSlice, Model, OpenModel, open_models
from ..model.logical import kind_of
from ..model.modules import StageModules
from ..model.paths import located
from ..model.roles import is_buffer, is_head, tied_embedding
from ..model.vocabularies.gather import gather_embeddings
from ..model.vocabularies.known import Vocabularies
from ..model.vocabularies.stage import StageVocabulary, stage_vocabulary
from ..model.warnings import ModelWarning, ModelWarningKind
from ..recipe.entries.dtype_lookup import nominal_dtype
from ..recipe.parameter_uses import summarize_uses
from ..recipe.parameters import layer_position
from ..recipe.types import Module, Recipe, Slice, Source, Stage, stage_inputs
from .built import BuiltGraph, OutputStack, Saved
from .checks.duplicates import explained, find_duplicates
from .checks.filters import names_of_values, unmatched_filters
from .checks.heads import check_chosen_head
from .checks.layers import LayerChecks, OutputLayer, missing_tensor
from .checks.output_formats import check_output_formats
from .checks.partial import partial_warnings
from .graph import MergeGraph
from .layers.layer_rules import LayerRules
from .layers.prediction_layers import PredictionLayers
from .rules import TensorRules
from .tensor_sources import TensorSources
from .usage import TensorUsage, Unused

__all__ = ["BuiltGraph", "Model", "OutputStack", "Saved", "Unused", "build_graph"]


def build_graph(
    recipe: Recipe,
    stage: Stage,
    methods: Mapping[str, Method],
    open_model: OpenModel,
    *,
    seed: int = 0,
    intermediate: bool = False,
    compares: bool = False,
    known: Vocabularies | None = None,
) -> BuiltGraph:
    """Build the graph of one stage of a recipe.

    Args:
        recipe: the recipe, for error messages.
        stage: the stage to build.
        methods: the merge methods by name.
        open_model: function that opens the Checkpoint of a ModelReference.
        seed: seed for methods that sample.
        intermediate: whether the output is an input of other stages, which is not rounded to the stage's `dtype`, only
            to an explicit `out_dtype`.
        compares: whether outputs of 16 bits are compared with the base; see `TensorRules`.
        known: the tokens of models and of earlier stages.

    Raises:
        RecipeError: if the recipe refers to layers or parts that the models don't have.
        CheckpointError: if the models are incompatible.
    """
    builder = _GraphBuilder(recipe, stage, methods, open_model, seed, intermediate=intermediate, compares=compares)
    try:
        builder.arrange_embeddings(known or Vocabularies(recipe, open_model))
        return builder.build()
    except TensorMismatch as error:
        cause = explain_mismatch(error, None if stage.modules is None else builder.modules.donor_names)
        cause.add_warnings(builder.warnings)
        with located(recipe, *(model.reference for model in reversed(error.models))):
            raise cause from error
    except MergeloomError as error:
        error.add_warnings(builder.warnings)
        raise


class _GraphBuilder:
    """Builds the graph of one stage."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        methods: Mapping[str, Method],
        open_model: OpenModel,
        seed: int,
        *,
        intermediate: bool,
        compares: bool,
    ) -> None:
        self.recipe = recipe
        decodes = intermediate and stage.dtype is not None
        self.stage = stage = replace(stage, dtype=None) if intermediate else stage
        self.warnings: list[ModelWarning] = []
        sources = dict.fromkeys(stage_inputs(stage))
        base, named = stage.base_model, (each.model for each in stage.tensors_from)
        references = dict.fromkeys((*sources, *(() if base is None else (base,)), *named))
        self.models = open_models(recipe, stage, references, open_model)
        self.warnings += dict.fromkeys(remark for model in self.models for remark in model.remarks)
        self.sources = self.models[: len(sources)]
        by_reference = {model.reference: model for model in self.models}
        self.donor = by_reference[base] if base is not None else self.models[0]
        self.modules = StageModules(recipe, stage, self.donor)
        method, first = methods[stage.merge_method], self.modules.all[0]
        self.parts = [
            [BoundSlice(recipe, stage, module, part, method, by_reference) for part in module.slices or ()]
            for module in self.modules.all
        ]
        self.non_layer = {
            name: BoundSlice(recipe, stage, first, Slice((Source(model, None),), place=place), method, by_reference)
            for name, model in stage.non_layer.items()
            for place in ((*stage.non_layer.place, name),)
        }
        self.graph = MergeGraph(tuple(model.name for model in self.models))
        self.graph.reads.keep_rows([model.checkpoint.tensors for model in self.models])
        self.usage = TensorUsage(self.graph)
        self.tensors_from = TensorSources(recipe, stage, first, method, by_reference, self.usage)
        owners = {reference: model.number for reference, model in by_reference.items()}
        given = stage, methods, self.graph, self.usage, seed, self.donor, owners
        self.rules = TensorRules(*given, intermediate=intermediate, decodes=decodes, compares=compares)
        self.prediction = PredictionLayers(self.donor, self.rules, self.usage)
        self.layer_rules = LayerRules(self.graph, self.rules, self.tensors_from if stage.tensors_from else None)
        self.layer_sources: dict[int, list[int]] = {}
        self.checks = LayerChecks(self.donor)
        self.layer_inputs: dict[int, list[tuple[tuple[int, int], ...]]] = {}
        self._group, self._has_head = 0, False
        self.vocabulary: StageVocabulary | None = None

    def arrange_embeddings(self, known: Vocabularies) -> None:
        """Rearrange the rows of the models' embeddings for the output's vocabulary, where models have others."""
        ends = {model for parts in self.parts for part in (parts[0], parts[-1]) for model in part.models}
        chosen = {model for part in self.non_layer.values() for model in part.models}
        used = chosen if {"embeddings", "head"} <= self.non_layer.keys() else ends | chosen
        named = [model for model in self.models if model.named]  # which have the first numbers
        self.vocabulary = stage_vocabulary(self.recipe, self.stage, named, self.donor, used, known)
        if self.vocabulary is not None:
            gather_embeddings(self.recipe, named, self.vocabulary.models)
            self.warnings += self.vocabulary.warnings

    def build(self) -> BuiltGraph:
        duplicates = list(find_duplicates(self.recipe, (part for parts in self.parts for part in parts)))
        self.warnings += [duplicate.warning for duplicate in duplicates]
        try:
            for module, parts in zip(self.modules.all, self.parts, strict=True):
                self._build_module(module, parts)
        except RecipeError as error:
            self._warn_of_filters(name for model in self.sources for name in model.tensors)
            raise explained(error, duplicates) from error
        self.warnings += (*self.checks.warnings(), *self.prediction.warnings(), *self.rules.buffers.warnings())
        self.tensors_from.check_used()
        check_chosen_head(self.recipe, self.stage, self.graph, self.models)
        if not self.graph.outputs:
            raise CheckpointError(
                "the output has no tensors: no tensor of the models belongs to a module of the recipe"
            )
        self._warn_of_filters(names_of_values(self.graph, self.models))
        given = self.recipe, self.stage, self.graph, self.models, self.donor, self.rules.dtypes
        self.warnings += check_output_formats(*given)
        names = {dtype.torch_name for dtype in self.graph.node_dtype if dtype.kind is ElementKind.FLOAT}
        wanted = nominal_dtype(self.stage)
        dtype = wanted.torch_name if wanted is not None else (names.pop() if len(names) == 1 else None)
        used, head = (*self.sources, *self.tensors_from.models), self._has_head
        return BuiltGraph(
            graph=self.graph,
            models=self.models,
            donor=self.donor.number,
            donor_config=self.donor.checkpoint.config,
            stacks=tuple(
                OutputStack(stack, tuple(self.layer_sources[number]), tuple(self.layer_inputs[number]))
                for number, stack in enumerate(self.donor.layers.mains)
                if number in self.layer_sources
            ),
            dtype=dtype,
            head=head,
            unused=tuple(self.usage.unused(self.models, used, head=head, covered=self.modules.covers)),
            warnings=(*self.warnings, *partial_warnings(self.rules.partial, self.models, self.stage.merge_method)),
            partial=tuple(self.rules.partial),
            buffers=tuple(self.rules.buffers.checks),
            copies=self.rules.copies,
            vocabulary=self.vocabulary,
            parameters=summarize_uses(use for parts in self.parts for part in parts for use in part.parameters.uses()),
        )

    def _warn(self, kind: ModelWarningKind, problem: str, advice: str = "", names: Iterable[str] = ()) -> None:
        self.warnings.append(ModelWarning(kind, problem, advice, tuple(names)))

    def _warn_of_filters(self, names: Iterable[str]) -> None:
        """Warn about filters that match none of the names."""
        self.warnings += unmatched_filters(self.recipe, self.stage, self.modules.all, names)

    # --- modules -----------------------------------------------------------------------------------------------

    def _build_module(self, module: Module, parts: Sequence[BoundSlice]) -> None:
        """Add the tensors of one module: those before the layers, the layers slice by slice, those after them."""
        stacks = self.modules.stacks(module)
        names = [each for each in self._non_layer_names(module, parts) if self.modules.belongs(module, each)]
        after = {name for name in names if self.donor.layers.is_after(name)}
        self._group += 1
        self._add_outside(module, parts[0], [name for name in names if name not in after])
        for number in stacks:
            count = 0
            for part in parts:
                self._group += 1
                count = self._add_slice(part, number, count)
            self._add_extras(parts[-1], number, count)
        self._group += 1
        self._add_outside(module, parts[-1], [name for name in names if name in after])

    # --- outside the layers ------------------------------------------------------------------------------------

    def _non_layer_names(self, module: Module, parts: Sequence[BoundSlice]) -> Iterator[str]:
        """The names of all tensors outside the layers, the donor's first."""
        seen: set[str] = set()
        others = [model for part in self.non_layer.values() for model in part.models]
        for model in (self.donor, *parts[0].models, *parts[-1].models, *others):
            for name in self.modules.names(module, model):
                if name not in seen:
                    seen.add(name)
                    yield name
        taken = (name for name in self.tensors_from.names() if self.donor.layers.split(name) is None)
        yield from (name for name in dict.fromkeys(taken) if name not in seen)

    def _non_layer_key(self, name: str) -> str:
        """The key under `non_layer:` for a tensor outside the layers."""
        if is_head(name):
            return "head"
        return "norm" if self.donor.layers.is_after(name) else "embeddings"

    def _add_outside(self, module: Module, part: BoundSlice, names: Iterable[str]) -> None:
        """Add tensors outside the layers. A head is one of them, so only these names are searched for it."""
        before = len(self.graph.outputs)
        for name in names:
            self._add_non_layer(module, part, name)
        self._has_head |= any(map(is_head, self.graph.outputs.names[before:]))

    def _add_non_layer(self, module: Module, part: BoundSlice, name: str) -> None:
        key = self._non_layer_key(name)
        chosen = self.non_layer.get(key)
        part = chosen or part
        names = [self.modules.name_in(module, model, name) for model in part.models]
        taken = self.tensors_from.add(self.rules, name, part.models, names, self._group, copied=chosen is not None)
        taken = taken or self.usage.drop_ema_copy(name, part.models, names)
        if taken or self.prediction.add(name, part, names, self._group):
            return
        if is_head(name):
            names = [
                own_name if own_name is not None else tied_embedding(name, model.non_layer)
                for own_name, model in zip(names, part.models, strict=True)
            ]
        own = self.donor.tensors.get(name)
        if not any(names):
            if own is not None and not is_buffer(name, own.shape):
                raise missing_tensor(name, self.donor, part.models[0])
            return
        if own is not None and self.donor not in part.models:
            model, source = next((model, source) for model, source in zip(part.models, names, strict=True) if source)
            shape = kind_of(model.tensors, source).shape
            if shape != own.shape and not is_buffer(name, shape):
                message = shape_mismatch(name, self.donor, own.shape, model, shape, "" if chosen else key)
                raise TensorMismatch(message, self.donor, model)
        self.rules.add(part, name, names, 0.0, self._group, copied=chosen is not None or part.is_copied)

    # --- layers ------------------------------------------------------------------------------------------------

    def _add_slice(self, part: BoundSlice, stack: int, first: int) -> int:
        """Add the layers of one slice, starting at output layer `first`; returns the number of the next layer."""
        ranges = part.ranges(stack)
        count = ranges[0][1] - ranges[0][0]
        own = part.models.index(self.donor) if self.donor in part.models else 0
        for index in range(count):
            indices = [start + index for start, _ in ranges]
            if self.donor not in part.models:
                self.checks.require_known(part.models[0], stack, indices[0])
            t = layer_position(index, count)
            rests = self._add_layer(part, stack, indices, first + index, t)
            layer = OutputLayer(first + index, part.models[own].name, indices[own], t, rests)
            self.checks.add(part, stack, indices, layer)
            self.layer_sources.setdefault(stack, []).append(indices[own])
            inputs = [(model.number, at) for model, at in zip(part.models, indices, strict=True)]
            self.layer_inputs.setdefault(stack, []).append((inputs[own], *inputs[:own], *inputs[own + 1 :]))
        return first + count

    def _add_layer(
        self, part: BoundSlice, stack: int, indices: Sequence[int], target: int, t: float
    ) -> Collection[str]:
        """Add the tensors of one layer; returns the parts of their names after the layer's number."""
        layers = [model.by_layer.get((stack, index), {}) for model, index in zip(part.models, indices, strict=True)]
        prefix = self.donor.layers.mains[stack].prefix
        own = part.models.index(self.donor) if self.donor in part.models else 0
        rests = dict.fromkeys(chain.from_iterable((layers[own], *layers)))
        unmoved = target == indices[own] and part.models[own].layers.mains[stack].prefix == prefix
        # the same strings as in the checkpoint, if the names are the same
        known = layers[own] if unmoved else {}
        tensors = {
            rest: known.get(rest) or (f"{prefix}.{target}.{rest}" if rest else f"{prefix}.{target}") for rest in rests
        }
        self.layer_rules.add(part, tensors, [list(map(layer.get, rests)) for layer in layers], t, self._group)
        return rests

    def _add_extras(self, part: BoundSlice, stack: int, count: int) -> None:
        """Add layers beyond config.json's count, such as prediction heads, after the stack, as in the model."""
        for source, indices, target in self.prediction.extras(part, stack, count):
            self._group += 1
            self._add_layer(source, stack, indices, target, 0.0)
