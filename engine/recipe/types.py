"""The types of a validated recipe.

`load.load_recipe` builds one. Semantics are those of a mergekit configuration; docs/mergekit.md lists the differences.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import RecipeError
from ...io.tensors.dtypes import DType
from ...io.units import plural
from ...methods.kernel.language import Array, Inputs
from ...methods.kernel.method import Method
from ...methods.kernel.spec import Absent, Base
from .entries.model_reference import ModelNameError as ModelNameError
from .entries.model_reference import ModelReference as ModelReference
from .entries.output_dtype import OutputDtype
from .entries.rename import Rename
from .entries.tokenizer_source import TokenizerSource as TokenizerSource
from .nodes import Keys, Origins
from .warnings import RecipeWarning

Scalar = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values over the layers of a slice: numbers are interpolated linearly, booleans and strings change in steps."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Conditional:
    """A value for tensors whose name contains `filter`; for all tensors if that is ``*`` or None.

    Args:
        filter: substring of tensor names, or None.
        value: the value.
        place: key path of the filter in the recipe.
    """

    filter: str | None
    value: Scalar | Gradient
    place: Keys = field(default=(), compare=False)


Setting = Scalar | Gradient | tuple[Conditional, ...]
Settings = Mapping[str, Setting]
"""The settings of one scope, by parameter name."""

DEFAULT_MODULE = "default"
"""mergekit's name for the module of a model that has only one."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model, or a range of its layers, as an input of a merge.

    Args:
        model: reference of the model.
        layer_range: the first layer and the one after the last; None for all layers.
        parameters: the settings for this model.
        place: key path of the source in the recipe, for `Recipe.error`.
    """

    model: ModelReference
    layer_range: tuple[int, int] | None
    parameters: Settings = field(default_factory=dict)
    place: Keys = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive layers of the output, and their sources.

    Args:
        sources: the inputs in recipe order, all with the same number of layers.
        base_model: the slice's own base model, or None for the stage's.
        parameters: the settings for this slice.
        place: key path of the slice in the recipe.
    """

    sources: tuple[Source, ...]
    base_model: ModelReference | None = None
    parameters: Settings = field(default_factory=dict)
    place: Keys = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model with layers of its own, such as a text decoder; exactly one of `slices` and `models` is set."""

    name: str
    slices: tuple[Slice, ...] | None
    models: tuple[Source, ...] | None = None
    parameters: Settings = field(default_factory=dict)
    place: Keys = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class NonLayer:
    """The models that tensors outside the layers are copied from; None for those that the slices determine.

    Args:
        embeddings: source of the tensors before the layers.
        norm: source of the tensors after the layers, except the head.
        head: source of the language model's head.
        place: key path of the mapping in the recipe.
    """

    embeddings: ModelReference | None = None
    norm: ModelReference | None = None
    head: ModelReference | None = None
    place: Keys = field(default=(), compare=False)

    def items(self) -> tuple[tuple[str, ModelReference], ...]:
        """The parts for which a model is set, each with its model."""
        pairs = (("embeddings", self.embeddings), ("norm", self.norm), ("head", self.head))
        return tuple((part, model) for part, model in pairs if model is not None)


@dataclass(frozen=True, slots=True)
class TensorSource:
    """The model that the output tensors whose name contains `filter` are copied from.

    Args:
        filter: substring of tensor names.
        model: reference of the model.
        place: key path of the entry in the recipe.
    """

    filter: str
    model: ModelReference
    place: Keys = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The output's chat template: ``auto`` (the most frequent of the models), a built-in name, or a Jinja template."""

    kind: Literal["auto", "name", "text"]
    value: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One merge. Exactly one of `models`, `slices` and `modules` is set; `modules_of` normalizes all three.

    Args:
        name: the name that other stages refer to; optional for the output.
        merge_method: name of the merge method.
        base_model: the base model, or None.
        models: complete models to merge, or None.
        slices: slices of the output's layers, or None.
        modules: modules of the output, or None.
        parameters: the settings for the entire stage; like all settings, without unknown or ineffective ones.
        dtype: dtype of the inputs in arithmetic, and of the output if `out_dtype` is None.
        out_dtype: dtype of the output or of each of its tensors, or None.
        tokenizer: source of the output's tokenizer, or None if the recipe doesn't set it.
        chat_template: the output's chat template, or None.
        files_from: source of the config, tokenizer and generation files, or None for the default.
        non_layer: sources of the tensors outside the layers, if not the slices.
        tensors_from: sources of tensors that are copied instead of merged.
        allow_nonfinite: whether computed tensors may contain NaN and infinities; copied ones are never checked.
        allow_vocabulary_mismatch: whether embeddings are merged row by row although vocabularies differ.
        save: whether the result of an intermediate stage is written.
        place: key path of the stage in the recipe; empty for a single stage.
    """

    name: str | None
    merge_method: str
    base_model: ModelReference | None = None
    models: tuple[Source, ...] | None = None
    slices: tuple[Slice, ...] | None = None
    modules: tuple[Module, ...] | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: DType | None = None
    out_dtype: OutputDtype | None = None
    tokenizer: TokenizerSource | None = None
    chat_template: ChatTemplate | None = None
    files_from: ModelReference | None = None
    non_layer: NonLayer = NonLayer()
    tensors_from: tuple[TensorSource, ...] = ()
    allow_nonfinite: bool = False
    allow_vocabulary_mismatch: bool = False
    save: bool = False
    place: Keys = field(default=(), compare=False)

    def __repr__(self) -> str:
        """One line with the method and the number of models."""
        return f"<Stage{'' if self.name is None else f' {self.name!r}'}: {self.title}>"

    @property
    def title(self) -> str:
        """The method and the number of models, such as ``ties of 3 models``."""
        return f"{self.merge_method} of {plural(len(stage_inputs(self)), 'model')}"

    def references(self) -> Iterator[tuple[ModelReference, Keys]]:
        """Every reference to a model, with its key path; a model may occur more than once."""
        for key in ("base_model", "files_from"):
            reference = getattr(self, key)
            if reference is not None:
                yield reference, (*self.place, key)
        if self.tokenizer is not None and self.tokenizer.model is not None:
            yield self.tokenizer.model, (*self.place, "tokenizer")
        for key, model in self.non_layer.items():
            yield model, (*self.non_layer.place, key)
        for tensors in self.tensors_from:
            yield tensors.model, tensors.place
        for module in modules_of(self):
            for part in module.slices or ():
                if part.base_model is not None:
                    yield part.base_model, (*part.place, "base_model")
                for source in part.sources:
                    yield source.model, source.place


@dataclass(frozen=True, slots=True)
class Recipe:
    """A validated recipe.

    Args:
        stages: the stages in topological order; the output is the last.
        warnings: problems that do not prevent the merge.
        text: text of the file; for a recipe given as data, or changed by overrides, that data as YAML.
        origins: the lines and the overrides that its entries come from.
        renames: other names for the tensors of models.
    """

    stages: tuple[Stage, ...]
    warnings: tuple[RecipeWarning, ...]
    text: str
    origins: Origins = field(default=Origins(), repr=False)
    renames: Mapping[ModelReference, Rename] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        """One line with the file, and the method of the output."""
        source = "" if self.source is None else f" {os.fspath(self.source)!r}"
        stages = f"{len(self.stages)} stages, the last one " if len(self.stages) > 1 else ""
        warnings = f", {plural(len(self.warnings), 'warning')}" if self.warnings else ""
        return f"<Recipe{source}: {stages}{self.output.title}{warnings}>"

    @property
    def source(self) -> Path | None:
        """The recipe's file, or None."""
        return self.origins.source

    @property
    def output(self) -> Stage:
        """The stage whose result is the output."""
        return self.stages[-1]

    def stage(self, reference: ModelReference | str) -> Stage | None:
        """The stage with that name, or that a model reference refers to; None if there is none."""
        if isinstance(reference, ModelReference):
            if reference.revision is not None or reference.adapters:
                return None
            reference = reference.path
        return next((stage for stage in self.stages if stage.name == reference), None)

    def error(self, place: Keys, message: str) -> RecipeError:
        """A RecipeError for the entry at `place`, with its location (see `Origins.locate`)."""
        return RecipeError.at(self.origins.locate(place), message)


def modules_of(stage: Stage) -> tuple[Module, ...]:
    """Normalize a stage to modules of slices.

    `models:` becomes one slice of all layers (a layer_range of None), with the base model as the last source if it
    isn't listed. A stage without `modules:` becomes one module named ``default``.
    """
    if stage.modules is not None:
        return tuple(
            Module(
                module.name,
                module.slices if module.models is None else (_full_slice(stage, module.models, module.place),),
                None,
                module.parameters,
                module.place,
            )
            for module in stage.modules
        )
    slices = stage.slices
    if slices is None:
        slices = (_full_slice(stage, stage.models or (), stage.place),)
    return (Module(DEFAULT_MODULE, slices, place=stage.place),)


def slices_of(stage: Stage) -> tuple[Slice, ...]:
    """The slices of all modules of the stage, in order (see `modules_of`)."""
    return tuple(part for module in modules_of(stage) for part in module.slices or ())


def stage_inputs(stage: Stage) -> tuple[ModelReference, ...]:
    """The models whose tensors the stage uses, each once: those of the slices, then those of `non_layer`."""
    sources = dict.fromkeys(source.model for part in slices_of(stage) for source in part.sources)
    return tuple(sources | dict.fromkeys(model for _, model in stage.non_layer.items()))


def base_index(stage: Stage, part: Slice, method: Method) -> int | None:
    """The index of the base model among the slice's sources; None if it is absent or the method doesn't use one."""
    base = part.base_model or stage.base_model
    if method.base is Base.NONE or base is None:
        return None
    return next((index for index, source in enumerate(part.sources) if source.model == base), None)


def _full_slice(stage: Stage, models: tuple[Source, ...], place: Keys) -> Slice:
    base = stage.base_model
    if base is not None and all(source.model != base for source in models):
        models += (Source(base, None, place=(*stage.place, "base_model")),)
    return Slice(models, place=(*place, "models"))


def _unknown(inputs: Inputs, **parameters: object) -> Array:
    raise AssertionError("a recipe with an unknown method is an error")


UNKNOWN_METHOD = Method(
    name="",
    summary="",
    description="",
    paper=None,
    base=Base.OPTIONAL,
    minimum=0,
    maximum=None,
    absent=Absent.PRESENT,
    parameters=(),
    function=_unknown,
)
"""Stands for a method that the recipe misnames, so the rest of the recipe can be read."""
