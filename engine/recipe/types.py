"""The types of a validated recipe, as the rest of the engine reads it.

`load.load_recipe` builds one. Its meaning is that of a mergekit configuration; docs/mergekit.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import RecipeError
from ...io.safetensors.dtypes import DType
from ...methods.kernel.contract import Base, Method
from .yaml import Keys

Scalar = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values over the layers of a slice: numbers are linear between neighbours, booleans and texts change in steps."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Conditional:
    """A value for tensors whose name contains `filter`; for all where that is ``*`` or None."""

    filter: str | None
    value: Scalar | Gradient


Setting = Scalar | Gradient | tuple[Conditional, ...]
Settings = Mapping[str, Setting]
"""The settings of one scope by the parameter's name."""

DEFAULT_MODULE = "default"
"""mergekit's name for the one module of a model that has no others."""


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model as a recipe names it: a directory, a Hub id, or the name of another stage.

    Args:
        path: the directory or id.
        revision: a branch, tag or commit of the Hub's repository, or None.
    """

    path: str
    revision: str | None = None

    @property
    def text(self) -> str:
        """``path`` or ``path@revision``."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """The reference that ``path`` or ``path@revision`` is. Raises ValueError, with what to write instead."""
        verbatim = "a directory whose name has such a character is written as `{path: ...}`"
        if "+" in text:
            raise ValueError(
                f"{text!r} is a model with a LoRA adapter on top, which mergeloom can't merge yet: apply the adapter "
                f"first, and name the result ({verbatim})"
            )
        path, *rest = text.split("@")
        if len(rest) > 1:
            raise ValueError(f"{text!r} has more than one @: expected `id@revision` ({verbatim})")
        if not path.strip():
            raise ValueError(f"{text!r} names no model")
        if rest and not rest[0].strip():
            raise ValueError(f"{text!r} has no revision after the @")
        return cls(path, rest[0] if rest else None)


@dataclass(frozen=True, slots=True)
class Source:
    """A model, or a range of its layers, that goes into a merge.

    Args:
        model: which.
        layer_range: the first layer and the one after the last; None for all of them.
        parameters: the settings for this model.
        place: where it stands in the recipe, for `Recipe.error`.
    """

    model: ModelReference
    layer_range: tuple[int, int] | None
    parameters: Settings = field(default_factory=dict)
    place: Keys = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of layers of the output, and what goes into it.

    Args:
        sources: the inputs in recipe order, all with the same number of layers.
        base_model: the slice's own base model, or None for the stage's.
        parameters: the settings for this slice.
        place: where it stands in the recipe.
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
class TokenizerSource:
    """Whose tokenizer the output has: `model`'s, or that of the base model (else the first) where it is None."""

    model: ModelReference | None


@dataclass(frozen=True, slots=True)
class Outside:
    """Models from which tensors outside the layers come as they are; None for what the slices say.

    Args:
        embeddings: of what stands before the layers.
        norm: of what stands after them and is no head.
        head: of the language model's head.
    """

    embeddings: ModelReference | None = None
    norm: ModelReference | None = None
    head: ModelReference | None = None

    def items(self) -> tuple[tuple[str, ModelReference], ...]:
        """The parts that it names, each with its model."""
        pairs = (("embeddings", self.embeddings), ("norm", self.norm), ("head", self.head))
        return tuple((part, model) for part, model in pairs if model is not None)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The output's chat template: ``auto`` (the commonest among the models), a built-in name, or a Jinja text."""

    kind: Literal["auto", "name", "text"]
    value: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One merge. Exactly one of `models`, `slices` and `modules` is set: `modules_of` is the same for all three.

    Args:
        name: by which other stages refer to it; None for the output (which may have one).
        merge_method: its name in the mapping of methods.
        base_model: or None.
        models: whole models.
        slices: runs of layers.
        modules: parts of models.
        parameters: the settings for all of it. As everywhere, only those that the method has and that have an effect.
        dtype: of the arithmetic's inputs, and of the output where `out_dtype` is None.
        out_dtype: of the output.
        tokenizer: whose tokenizer the output gets, or None where the recipe doesn't say.
        chat_template: or None.
        files_from: the model that config, tokenizer and generation files come from, or None for the usual one.
        outside: where the tensors outside the layers come from, if not from the slices.
        allow_nonfinite: whether NaN and infinities may stand in the output.
        save: whether an intermediate stage is to be written, too.
        place: where it stands in the recipe: the prefix of its paths, empty unless there are several stages.
    """

    name: str | None
    merge_method: str
    base_model: ModelReference | None = None
    models: tuple[Source, ...] | None = None
    slices: tuple[Slice, ...] | None = None
    modules: tuple[Module, ...] | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer: TokenizerSource | None = None
    chat_template: ChatTemplate | None = None
    files_from: ModelReference | None = None
    outside: Outside = Outside()
    allow_nonfinite: bool = False
    save: bool = False
    place: Keys = field(default=(), compare=False)

    def references(self) -> Iterator[tuple[ModelReference, Keys]]:
        """Every model that it names, and where: a model may come more than once."""
        for key in ("base_model", "files_from"):
            reference = getattr(self, key)
            if reference is not None:
                yield reference, (*self.place, key)
        if self.tokenizer is not None and self.tokenizer.model is not None:
            yield self.tokenizer.model, (*self.place, "tokenizer")
        for key, model in self.outside.items():
            yield model, (*self.place, "outside", key)
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
        stages: in an order in which each comes after those that it uses; the output's is the last.
        warnings: what is odd but no error, each with its place.
        source: the file it was read from, or None.
        text: the file's text; for a recipe given as data, that data as YAML.
        lines: the line of every key and value.
    """

    stages: tuple[Stage, ...]
    warnings: tuple[str, ...]
    source: Path | None
    text: str
    lines: Mapping[Keys, int] = field(default_factory=dict, repr=False)

    @property
    def output(self) -> Stage:
        """The stage whose result is the output."""
        return self.stages[-1]

    def stage(self, reference: ModelReference | str) -> Stage | None:
        """The stage of that name, or to which a model reference refers; None where there is none."""
        if isinstance(reference, ModelReference):
            if reference.revision is not None:
                return None
            reference = reference.path
        return next((stage for stage in self.stages if stage.name == reference), None)

    def error(self, place: Keys, message: str) -> RecipeError:
        """A RecipeError for what stands at `place`, with its line or that of what it stands in."""
        return RecipeError(message, source=self.source, line=line_of(self.lines, place), path=place)


def line_of(lines: Mapping[Keys, int], place: Keys) -> int | None:
    """The line of what stands at `place`, or else of what it stands in."""
    ends = range(len(place), -1, -1)
    return next((lines[place[:end]] for end in ends if place[:end] in lines), None)


def modules_of(stage: Stage) -> tuple[Module, ...]:
    """The stage in its normal form: modules of slices.

    What `models:` lists becomes one slice of all layers (a layer_range of None), with the base model as the last source
    if it isn't listed. A stage without `modules:` is one module of the name ``default``.
    """
    if stage.modules is not None:
        return tuple(
            Module(
                module.name,
                module.slices if module.models is None else (_whole(stage, module.models, module.place),),
                None,
                module.parameters,
                module.place,
            )
            for module in stage.modules
        )
    slices = stage.slices
    if slices is None:
        slices = (_whole(stage, stage.models or (), stage.place),)
    return (Module(DEFAULT_MODULE, slices, place=stage.place),)


def slices_of(stage: Stage) -> tuple[Slice, ...]:
    """The slices of all modules of the stage (see `modules_of`), in order."""
    return tuple(part for module in modules_of(stage) for part in module.slices or ())


def stage_inputs(stage: Stage) -> tuple[ModelReference, ...]:
    """The models whose tensors go into the stage, each once: as `slices_of` has them, then `outside`."""
    sources = dict.fromkeys(source.model for part in slices_of(stage) for source in part.sources)
    return tuple(sources | dict.fromkeys(model for _, model in stage.outside.items()))


def base_index(stage: Stage, part: Slice, method: Method) -> int | None:
    """Which of the slice's sources is the base model's; None without one, or where the method has no place for one."""
    base = part.base_model or stage.base_model
    if method.base is Base.NONE or base is None:
        return None
    return next((index for index, source in enumerate(part.sources) if source.model == base), None)


def _whole(stage: Stage, models: tuple[Source, ...], place: Keys) -> Slice:
    base = stage.base_model
    if base is not None and all(source.model != base for source in models):
        models += (Source(base, None, place=(*stage.place, "base_model")),)
    return Slice(models, place=(*place, "models"))
