"""Where the files beside the weights come from: config, tokenizer, chat template, and all others, stage by stage.

What a stage makes is to the next one a model like any other, with files of its own: only these are never written. So
they are followed down to files that exist, and what was changed on the way (config.json, a chat template) is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat_templates import BUILT_IN, find_template, syntax_error
from .engine.build import BuiltGraph, OutputStack
from .engine.config import merged_config
from .engine.files_from import adopted_config, adopted_stack
from .engine.layers import is_embedding, is_head
from .engine.recipe import ModelReference, Recipe, Stage
from .errors import CheckpointError
from .io.checkpoint import Checkpoint
from .io.files import FileKind, companion_files, read_json
from .io.vocabulary import difference, read_vocabulary, same_files


@dataclass(frozen=True, slots=True)
class FileSources:
    """Where the files beside a model's weights come from.

    Args:
        config: what its config.json says; None for no file.
        others: the checkpoint that the generation config, processors and licences stand beside.
        tokenizer: the checkpoint that the tokenizer stands beside.
        template: the chat template that takes the place of the tokenizer's, or None.
        config_from: what the recipe calls the model that config.json is made after.
        tokenizer_from: what it calls the tokenizer's.
    """

    config: Mapping[str, Any] | None
    others: Checkpoint
    tokenizer: Checkpoint
    template: str | None
    config_from: str
    tokenizer_from: str


def directory_of(checkpoint: Checkpoint) -> Path:
    """The directory that a checkpoint's other files are in."""
    return checkpoint.path.parent if checkpoint.path.is_file() else checkpoint.path


class FileResolver:
    """The files of every stage of a recipe, added in the order of the stages.

    Args:
        recipe: whose stages are added.
        open_model: called with the reference of a model that is no stage, returns its Checkpoint.
    """

    def __init__(self, recipe: Recipe, open_model: Callable[[ModelReference], Checkpoint]) -> None:
        self.warnings: list[str] = []
        self._recipe = recipe
        self._open = open_model
        self._stages: dict[str | None, FileSources] = {}
        self._built: dict[str | None, BuiltGraph] = {}
        self._models: dict[ModelReference, FileSources] = {}

    @property
    def output(self) -> FileSources:
        """Those of the output."""
        return self._stages[self._recipe.output.name]

    def add(self, stage: Stage, built: BuiltGraph) -> Mapping[str, Any] | None:
        """The config.json of what a stage makes; its other files are noted.

        Raises:
            RecipeError: where the recipe asks for what the models don't have.
            CheckpointError: for files that can't be read, and for vocabularies that differ where they must not.
        """
        donor = built.models[built.donor].reference
        files = self.of(stage.files_from or donor)
        config = self._config(stage, built, files)
        tokenizer = files
        if stage.tokenizer is not None:
            tokenizer = self.of(stage.tokenizer.model or donor)
            self._check_vocabularies(built, tokenizer)
        elif stage.files_from is not None:
            self._compare_vocabularies(self.of(donor), tokenizer)
        template = self._template(stage, built, tokenizer)
        made = FileSources(
            config, files.others, tokenizer.tokenizer, template, files.config_from, tokenizer.tokenizer_from
        )
        self._stages[stage.name] = made
        self._built[stage.name] = built
        return config

    def of(self, reference: ModelReference) -> FileSources:
        """The files of a model, or of a stage that was added before. Raises CheckpointError."""
        stage = self._recipe.stage(reference)
        if stage is not None:
            return self._stages[stage.name]
        if reference not in self._models:
            path = Path(reference.path).expanduser()
            if path.is_dir() and reference.revision is None:  # its weights don't matter, and needn't be there
                config = read_json(path / "config.json")
                checkpoint = Checkpoint(path, {}, config if isinstance(config, dict) else None, {}, (), ())
            else:
                checkpoint = self._open(reference)
                _fetch_tokenizer(checkpoint)
            name = reference.text
            self._models[reference] = FileSources(checkpoint.config, checkpoint, checkpoint, None, name, name)
        return self._models[reference]

    # --- config.json -------------------------------------------------------------------------------------------

    def _config(self, stage: Stage, built: BuiltGraph, files: FileSources) -> Mapping[str, Any] | None:
        config: Mapping[str, Any] | None = built.donor_config
        stacks = built.stacks
        if stage.files_from is not None:
            place = (*stage.place, "files_from")
            if files.config is None:
                raise self._recipe.error(place, f"{stage.files_from.text} has no config.json")
            try:
                adopted, remarks = adopted_config(files.config, config, built)
                stacks = tuple(
                    adopted_stack(stack, adopted, self._levels(stage, number)) for number, stack in enumerate(stacks)
                )
            except ValueError as error:
                raise self._recipe.error(place, f"{stage.files_from.text} {error}") from error
            config = adopted
            self.warnings += [f"files_from {stage.files_from.text}: {remark}" for remark in remarks]
        if config is None:
            self.warnings.append(f"{files.config_from} has no config.json, so that none is written")
            return None
        wanted = stage.out_dtype or stage.dtype
        made, warnings = _merged(config, stacks, built.head, wanted.torch_name if wanted else built.dtype)
        self.warnings += warnings
        return made

    def _levels(self, stage: Stage, number: int) -> list[tuple[int, tuple[int, ...]]]:
        """What the layers of a stage's stack were: in its donor, in the donor's donor, down to a model with files.

        Returns:
            for each, how many layers it has, and which of them each layer is.
        """
        found: list[tuple[int, tuple[int, ...]]] = []
        built: BuiltGraph | None = None
        upper: Stage | None = stage
        while upper is not None:
            built = self._built.get(upper.name) if built is not None else self._current
            break
        return found

    # --- the tokenizer -----------------------------------------------------------------------------------------

    def _check_vocabularies(self, built: BuiltGraph, tokenizer: FileSources) -> None:
        """All models whose embeddings go into a stage must have the vocabulary of its tokenizer."""
        graph = built.graph
        used = dict.fromkeys(
            model for model, name in zip(graph.read_models, graph.read_names, strict=True) if _has_rows(name)
        )
        for number in used:
            other = self.of(built.models[number].reference)
            found = _difference(tokenizer, other)
            if found is not None:
                raise CheckpointError(
                    f"the vocabularies of {tokenizer.tokenizer_from} and {other.tokenizer_from} differ: {found}. "
                    "Merging embeddings by token can't be done yet: give all models the same vocabulary, or leave "
                    "the tokenizer out of the recipe where their rows mean the same anyway"
                )

    def _compare_vocabularies(self, donor: FileSources, tokenizer: FileSources) -> None:
        """A tokenizer that comes along with `files_from` should be that of the merged models."""
        if all(companion_files(directory_of(files.tokenizer), (FileKind.TOKENIZER,)) for files in (donor, tokenizer)):
            found = _difference(tokenizer, donor)
            if found is not None:
                self.warnings.append(
                    f"the tokenizer of {tokenizer.tokenizer_from} is not that of {donor.tokenizer_from}, whose "
                    f"embeddings are merged: {found}"
                )
