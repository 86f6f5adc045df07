"""The graph of a recipe, with the facts that determine the output's other files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..model.inputs import Model
from ..model.layers import Stack
from ..model.vocabularies.stage import StageVocabulary
from ..model.vocabularies.tensors import embedding_rows
from ..model.warnings import ModelWarning
from ..recipe.parameter_uses import ParameterUse
from ..recipe.types import Stage
from .checks.buffers import BufferCheck
from .checks.partial import PartialTensor
from .encoding.output_values import OutputCounts, output_counts
from .fuse import fuse
from .graph import MergeGraph
from .usage import Unused
from .values import CopiedValue


@dataclass(frozen=True, slots=True)
class OutputStack:
    """A stack of layers of the output.

    Args:
        donor: the donor's stack that it corresponds to.
        sources: for each of its layers, the layer whose entry in config.json's per-layer lists applies.
        inputs: for each of its layers, the number of each model that it is merged from, and the layer there. The first
            one is the layer in `sources`: the donor's, or else that of the slice's first model.
    """

    donor: Stack
    sources: tuple[int, ...]
    inputs: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Saved:
    """A stage whose output is written in addition to that of the last stage.

    Args:
        stage: the stage, whose name is also the name of the folder.
        layers: number of layers of the output's main stack.
    """

    stage: Stage
    layers: int

    @property
    def folder(self) -> str:
        """The folder in OUT."""
        return self.stage.name or ""


@dataclass(frozen=True)
class BuiltGraph:
    """The graph of a recipe, and the facts that determine the output's other files.

    Args:
        graph: the graph of reads, nodes and outputs.
        models: the input models in the order of the recipe.
        donor: index of the model that config and tokenizer come from.
        donor_config: the config.json that the output's is based on, or None: the donor's, as updated by earlier stages.
        stacks: the output's stacks of layers, the main one first.
        dtype: torch's name of the output's dtype; None if it is mixed and the recipe doesn't set it for all tensors.
        head: whether a head (``lm_head``) is written.
        unused: input tensors that no output needs, with the reasons.
        warnings: warnings about the models and the recipe's filters.
        partial: tensors that only some of the models have that they are merged from.
        saved: the other stages whose output is written, each to a folder of OUT with the stage's name.
        intermediates: number of tensors that the stages before the last compute.
        buffers: the buffers that are compared between the models before the merge.
        parameters: parameters with filters or gradients, and how many tensors use each value.
        unfused: the graph before nodes became parts of others; None if there are no such nodes.
        copies: values of an intermediate output of which only the parts are copied, by their names.
        vocabulary: the output's vocabulary, if embeddings are rearranged for it.
    """

    graph: MergeGraph
    models: tuple[Model, ...]
    donor: int
    donor_config: Mapping[str, Any] | None
    stacks: tuple[OutputStack, ...]
    dtype: str | None
    head: bool
    unused: tuple[Unused, ...]
    warnings: tuple[ModelWarning, ...]
    partial: tuple[PartialTensor, ...] = ()
    saved: tuple[Saved, ...] = ()
    intermediates: int = 0
    buffers: tuple[BufferCheck, ...] = ()
    parameters: tuple[ParameterUse, ...] = ()
    unfused: MergeGraph | None = None
    copies: Mapping[str, CopiedValue] = field(default_factory=dict)
    vocabulary: StageVocabulary | None = None

    def __repr__(self) -> str:
        """One line with the number of models and tensors."""
        return f"<BuiltGraph: {len(self.graph.outputs):,} tensors from {len(self.named):,} models>"

    @property
    def named(self) -> tuple[Model, ...]:
        """The models that the recipe names; the others only have parts of their values."""
        return tuple(model for model in self.models if model.named)

    @property
    def files(self) -> tuple[Model, ...]:
        """The models whose files are read: all but those with adapters, which have no files of their own."""
        return tuple(model for model in self.models if model.has_files)

    @functools.cached_property
    def inlined(self) -> MergeGraph:
        """The graph in which every output is one expression of what files hold: what it is, however it is computed."""
        return self.graph if self.unfused is None else fuse(self.unfused, inline=True)

    @functools.cached_property
    def counts(self) -> Mapping[str, OutputCounts]:
        """The numbers of tensors and parameters of each model that is written, by its folder in OUT."""
        folders = "", *(saved.folder for saved in self.saved)
        return {folder: output_counts(self.graph, self.models, folder) for folder in folders}

    @property
    def requested_rows(self) -> int | None:
        """The rows of embeddings that `tokenizer` or the donor's adapters ask for; None if they have the base's."""
        if self.vocabulary is not None:
            return self.vocabulary.rows
        donor = self.models[self.donor]
        return embedding_rows(donor) if donor.reference.adapters else None

    @property
    def layers(self) -> int:
        """Number of layers of the output's main stack; 0 if it has none."""
        return len(self.stacks[0].sources) if self.stacks else 0

    @property
    def matched_by_name(self) -> bool:
        """Whether the layers of a model were not identified, so tensors are matched by their complete names."""
        return not all(model.identified for model in self.models)
