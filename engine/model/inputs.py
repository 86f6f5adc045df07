"""The inputs of a stage for planning: models with their layers, slices with their models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace

from ...errors import CheckpointError
from ...io.checkpoint.checkpoint import Checkpoint
from ...io.tensors.table import TensorTable
from ...methods.kernel.method import Method
from ..recipe.parameters import SliceParameters
from ..recipe.types import (
    Gradient,
    ModelReference,
    Module,
    Recipe,
    Setting,
    Slice,
    Stage,
    base_index,
    modules_of,
)
from .adapters.complete import unsaved_biases
from .adapters.loaded import Adapter, open_adapter
from .adapters.resized import rows_without_tokens
from .adapters.values import with_adapters
from .checks.identify import check_is_model
from .contents.diffusion import layers_of
from .experts.mapping import Mapped, NamedCheckpoint, in_layout_of
from .formats.registry import tensors_of, unknown_quantized
from .layers import AmbiguousLayers, LayerMap, Stack
from .logical import LogicalTensors, Tensors
from .paths import located
from .warnings import ModelWarning, ModelWarningKind

OpenModel = Callable[[ModelReference], Checkpoint]


@dataclass(slots=True, eq=False)
class Model:
    """An input model.

    Args:
        number: index of the model in the recipe.
        reference: reference of the model in the recipe.
        checkpoint: the model's checkpoint.
        tensors: what the model consists of: its stored tensors, or values that are computed from several of them.
        layers: the model's stacks of layers.
        by_layer: for each main stack and layer, the tensor names by the part after the layer's number.
        non_layer: names of the tensors outside the main stacks' layers, in file order.
        quantized: names of the quantized tensors and their scales, each with the reason.
        identified: whether the layers were identified; if not, all tensors are matched by name.
        note: how the model's tensors are rearranged, for display; empty if they are merged as they are stored.
        named: whether the recipe names the model itself; others have parts of the values of named models: a base
            that is only named with adapters, and the adapters.
        remarks: warnings about the model's adapters.
        is_adapter: whether it is an adapter, which has no values of its own.
    """

    number: int
    reference: ModelReference
    checkpoint: Checkpoint
    tensors: Tensors
    layers: LayerMap
    by_layer: dict[tuple[int, int], dict[str, str]] = field(default_factory=dict)
    non_layer: list[str] = field(default_factory=list)
    quantized: Mapping[str, str] = field(default_factory=dict)
    identified: bool = True
    note: str = ""
    named: bool = True
    remarks: tuple[ModelWarning, ...] = ()
    is_adapter: bool = False

    @property
    def has_files(self) -> bool:
        """Whether the tensors are read from the model's own files; those of a model with adapters have owners."""
        return not self.reference.adapters

    @property
    def name(self) -> str:
        """The model's name in the recipe."""
        return self.reference.text

    def stack(self, number: int) -> Stack:
        """A main stack by its number. Raises CheckpointError if the model has fewer stacks."""
        mains = self.layers.mains
        if number >= len(mains):
            raise CheckpointError(f"{self.name} has {len(mains)} stack(s) of layers, but the recipe needs {number + 1}")
        return mains[number]


def open_models(
    recipe: Recipe, stage: Stage, references: Collection[ModelReference], open_model: OpenModel
) -> tuple[Model, ...]:
    """Open the models of a stage, and number them in this order; then those that only have parts of their values.

    If the layers of one model can't be identified, the tensors of all models are matched by their complete names.

    Raises:
        CheckpointError: if a model or an adapter can't be opened, an adapter does not fit its base, or the stage needs
            layers that can't be identified.
    """
    bases: dict[ModelReference, Model] = {}
    twins: dict[ModelReference, Model | None] = {}
    identified = True
    plain = dict.fromkeys(reference.base for reference in references)
    for reference, (checkpoint, note) in _in_donors_layout(recipe, stage, plain, open_model):
        with located(recipe, reference):
            twins[reference] = twin = _twin(checkpoint, bases.values())
            tensors = _tensors_of(checkpoint, twin)
        try:
            layers = _layers_of(checkpoint, tensors, bases.values())
        except CheckpointError as error:
            reason = needs_layers(stage)
            if not isinstance(error, AmbiguousLayers) or reason is not None:
                needed = f" They are needed for {reason}." if reason and isinstance(error, AmbiguousLayers) else ""
                with located(recipe, reference):
                    raise CheckpointError(f"{reference.text}: {error}{needed}") from error
            layers, identified = LayerMap((), ()), False
        named = reference in references
        bases[reference] = Model(0, reference, checkpoint, tensors, layers, note=note, named=named)
    for number, model in enumerate(bases.values()):
        if not identified:
            model.layers, model.identified = LayerMap((), ()), False
        alike = next((other for other in list(bases.values())[:number] if _have_same_layers(other, model)), None)
        if alike is None:
            sort_tensors(model)
        else:  # no copies: most merges are of models of one architecture
            model.by_layer, model.non_layer = alike.by_layer, alike.non_layer
        twin = twins[model.reference]
        model.quantized = unknown_quantized(model.checkpoint, model.tensors) if twin is None else twin.quantized
    adapters = AdapterModels(recipe, open_model)
    models = [bases[each.base] if each is each.base else adapters.apply(each, bases[each.base]) for each in references]
    models += [model for model in bases.values() if not model.named]
    models += adapters.opened
    for number, model in enumerate(models):
        model.number = number
    return tuple(models)


class AdapterModels:
    """Opens adapters, each once, and applies them to models.

    Args:
        recipe: the recipe, for error messages.
        open_model: function that opens a checkpoint.
    """

    def __init__(self, recipe: Recipe, open_model: OpenModel) -> None:
        self._recipe = recipe
        self._open = open_model
        self._adapters: dict[ModelReference, Adapter] = {}

    def apply(self, reference: ModelReference, base: Model) -> Model:
        """Return a model with adapters. Raises CheckpointError as `open_adapter` and `with_adapters`."""
        with located(self._recipe, reference):
            adapters = [self._adapter(each) for each in reference.adapters]
            tensors = with_adapters(reference.text, base.checkpoint, base.tensors, adapters)
        added = [name for name in tensors if name not in base.tensors]
        warnings = [warning for adapter in adapters for warning in _adapter_warnings(adapter, base)]
        return replace(
            base,
            reference=reference,
            tensors=tensors,
            non_layer=base.non_layer + added,
            note=base.note,
            named=True,
            remarks=(*warnings, *rows_without_tokens(reference.text, base.tensors, tensors, adapters)),
        )

    @property
    def opened(self) -> list[Model]:
        """The adapters as models, which only have parts of the values of others."""
        return [
            Model(
                0,
                each.reference,
                each.checkpoint,
                each.checkpoint.tensors,
                LayerMap((), ()),
                named=False,
                is_adapter=True,
            )
            for each in self._adapters.values()
        ]

    def _adapter(self, reference: ModelReference) -> Adapter:
        if reference not in self._adapters:
            self._adapters[reference] = open_adapter(reference, self._open)
        return self._adapters[reference]


def _adapter_warnings(adapter: Adapter, base: Model) -> Iterator[ModelWarning]:
    """Warn of another base than the adapter was trained on, and of what it lacks."""
    if remark := adapter.remark(base.name, base.checkpoint):
        advice = "make sure that the base has the weights that the adapter was trained on"
        yield ModelWarning(ModelWarningKind.ADAPTER, remark, advice)
    if remark := unsaved_biases(adapter, base.tensors):
        yield ModelWarning(ModelWarningKind.ADAPTER, remark, "save it again with a version of PEFT that saves them")


def _in_donors_layout(
    recipe: Recipe, stage: Stage, references: Collection[ModelReference], open_model: OpenModel
) -> list[tuple[ModelReference, Mapped]]:
    """Open the models of a stage, with experts in the layout of the donor: the base model, or else the first one.

    Raises:
        CheckpointError: if a model can't be opened, or its experts can't be rearranged.
    """
    opened: list[NamedCheckpoint] = []
    for reference in references:
        checkpoint = open_model(reference)
        for other in opened[:1]:
            _share_names(checkpoint, other.checkpoint)
        if checkpoint.files:  # the output of a stage has none
            with located(recipe, reference):
                check_is_model(reference.text, checkpoint)
        opened.append(NamedCheckpoint(reference.text, checkpoint))
    found = list(references)
    donor = opened[0 if stage.base_model is None else found.index(stage.base_model.base)]
    mapped: list[tuple[ModelReference, Mapped]] = []
    for reference, each in zip(found, opened, strict=True):
        with located(recipe, reference):
            mapped.append((reference, in_layout_of(donor, each)))
    return mapped


def _share_names(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """Store the names that two checkpoints have in common once."""
    ours, theirs = checkpoint.tensors, other.tensors
    if isinstance(ours, TensorTable) and isinstance(theirs, TensorTable):
        ours.share_names(theirs)


def _have_same_names(ours: Tensors, theirs: Tensors) -> bool:
    """Whether the tensors of two models are known to have the same names in the same order."""
    if isinstance(ours, TensorTable) and isinstance(theirs, TensorTable):
        return ours.shares_names(theirs)
    return isinstance(ours, LogicalTensors) and isinstance(theirs, LogicalTensors) and ours.shares_names(theirs)


def _twin(checkpoint: Checkpoint, known: Iterable[Model]) -> Model | None:
    """A model with the same names, dtypes, shapes and description as a checkpoint: only the numbers may differ."""
    ours = checkpoint.tensors
    for model in known:
        theirs = model.checkpoint.tensors
        same = isinstance(ours, TensorTable) and isinstance(theirs, TensorTable) and ours.is_like(theirs)
        if same and _description(checkpoint) == _description(model.checkpoint):
            return model
    return None


def _description(checkpoint: Checkpoint) -> tuple[Mapping[str, object], Mapping[str, str]]:
    """What a checkpoint says about its tensors, without what differs between fine-tunes: their names and versions."""
    config = checkpoint.config or {}
    kept = {key: value for key, value in config.items() if key[:1] != "_" and key != "transformers_version"}
    return kept, checkpoint.metadata


def _tensors_of(checkpoint: Checkpoint, twin: Model | None) -> Tensors:
    """The tensors of a checkpoint; their values are stored as in its twin. Raises as `tensors_of`."""
    if twin is None:
        return tensors_of(checkpoint)
    if not isinstance(twin.tensors, LogicalTensors):
        return checkpoint.tensors
    return twin.tensors.seen_in(checkpoint.tensors) or tensors_of(checkpoint)


def _layers_of(checkpoint: Checkpoint, tensors: Tensors, known: Iterable[Model]) -> LayerMap:
    """The layers of a checkpoint, or those of a model with the same names and the same description. Raises as
    `layers_of`."""
    for model in known:
        same = model.layers.stacks and _have_same_names(tensors, model.tensors)
        if same and _description(checkpoint) == _description(model.checkpoint):
            return model.layers
    return layers_of(tensors, checkpoint.config)


def _have_same_layers(model: Model, other: Model) -> bool:
    """Whether two models have the same names in the same layers."""
    prefixes = [[stack.prefix for stack in each.layers.mains] for each in (model, other)]
    return prefixes[0] == prefixes[1] and _have_same_names(model.tensors, other.tensors)


def sort_tensors(model: Model) -> None:
    """Assign the tensors of a model to its layers."""
    stacks = {stack.prefix: index for index, stack in enumerate(model.layers.mains)}
    beginning, tensors = "", dict[str, str]()
    for name in model.tensors:
        if beginning and name.startswith(beginning):  # the layer of the name before, as for most names
            tensors[sys.intern(name[len(beginning) :])] = name
            continue
        layer = model.layers.split(name)
        if layer is None:
            model.non_layer.append(name)
            continue
        tensors = model.by_layer.setdefault((stacks[layer.stack], layer.index), {})
        tensors[layer.rest] = name
        beginning = f"{layer.stack}.{layer.index}."
        if any(prefix.startswith(beginning) for prefix in stacks):
            beginning = ""


def needs_layers(stage: Stage) -> str | None:
    """What a stage needs the layers of its models for, such as ``slices``; None if it matches tensors by name only."""
    for key in ("slices", "modules"):
        if getattr(stage, key) is not None:
            return f"`{key}`"
    if stage.non_layer.items():
        return "`non_layer`"
    scopes = [stage.parameters]
    for module in modules_of(stage):
        scopes += [source.parameters for part in module.slices or () for source in part.sources]
    gradients = (name for scope in scopes for name, setting in scope.items() if _has_gradient(setting))
    return next((f"the gradient of `{name}`" for name in gradients), None)


def _has_gradient(setting: Setting) -> bool:
    """Whether a setting has different values in different layers."""
    if isinstance(setting, Gradient):
        return len(set(setting.values)) > 1
    return isinstance(setting, tuple) and any(_has_gradient(condition.value) for condition in setting)


class BoundSlice:
    """A slice of the recipe with its opened models.

    Attributes:
        slice: the slice in the recipe.
        models: models of the slice's sources, in their order.
        base: index of the base model in `models` if the method uses one, or None.
        base_any_method: index of the base model in `models`, whether or not the method uses one, or None.
        parameters: lookup of the method's parameters for each tensor.
        is_copied: whether the base model is the only source, whose tensors are copied, instead of using the method.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        module: Module,
        part: Slice,
        method: Method,
        models: Mapping[ModelReference, Model],
    ) -> None:
        self.slice = part
        self.models = [models[source.model] for source in part.sources]
        self.base = base_index(stage, part, method)
        self.is_copied = self.base is not None and len(part.sources) == 1
        reference = part.base_model or stage.base_model
        self.base_any_method = next((i for i, source in enumerate(part.sources) if source.model == reference), None)
        self.parameters = SliceParameters(recipe, stage, module, part, method, self.base)
        self._recipe = recipe

    def copied_from(self, model: Model) -> BoundSlice:
        """The slice with one of its models as the only source, whose tensors are copied."""
        copied = copy(self)
        source = self.slice.sources[self.models.index(model)]
        copied.slice, copied.models, copied.is_copied = replace(self.slice, sources=(source,)), [model], True
        copied.base = copied.base_any_method = None
        return copied

    def ranges(self, stack: int) -> list[tuple[int, int]]:
        """The layers [first, end) of a main stack for each source.

        Raises:
            RecipeError: if the model doesn't have these layers, or the numbers of layers differ.
        """
        ranges = []
        for source, model in zip(self.slice.sources, self.models, strict=True):
            count = model.stack(stack).count
            first, end = source.layer_range or (0, count)
            if end > count:
                raise self._recipe.error(
                    (*source.place, "layer_range"),
                    f"[{first}, {end}] ends past the last layer: {model.name} has {count} layers, so the end can be at "
                    f"most {count}",
                )
            ranges.append((first, end))
        if len({end - first for first, end in ranges}) > 1:
            counts = ", ".join(
                f"{end - first} of {model.name}" for (first, end), model in zip(ranges, self.models, strict=True)
            )
            raise self._recipe.error(
                self.slice.place, f"all sources of a slice must have the same number of layers, got {counts}"
            )
        return ranges
