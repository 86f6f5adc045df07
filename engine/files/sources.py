"""Where the files beside the weights come from: config, tokenizer, chat template, and all others, stage by stage.

What a stage makes is to the next one a model like any other, with files of its own: only these are never written. So
they are followed down to files that exist, and what was changed on the way (config.json, a chat template) is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.companions import FileKind, companion_files, file_kind
from ...io.safetensors.checkpoint import Checkpoint
from ...io.small_files import read_json
from ..graph.build import BuiltGraph, OutputStack
from ..model.layers import is_embedding, is_head
from ..recipe.types import ModelReference, Recipe, Stage
from .chat_templates import BUILT_IN, REPLACED, find_template, syntax_error
from .config import merged_config
from .config_override import override_config, override_stack
from .vocabulary import difference, read_vocabulary, same_files


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


@dataclass(frozen=True, slots=True)
class OutputModel:
    """A model that a merge makes: the output, or a stage's that is saved.

    Args:
        folder: where in OUT; empty for OUT itself.
        stage: the stage that makes it.
        files: where the files beside the weights come from.
        layers: of its main stack.
    """

    folder: str
    stage: Stage
    files: FileSources
    layers: int


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
        return self.of_stage(self._recipe.output)

    def of_stage(self, stage: Stage) -> FileSources:
        """Those of a stage that was added."""
        return self._stages[stage.name]

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
            if path.is_dir():  # its weights don't matter, and needn't be there
                config = read_json(path / "config.json")
                checkpoint = Checkpoint(path, {}, config if isinstance(config, dict) else None, {}, (), ())
            else:
                checkpoint = self._open(reference)
            name = reference.text
            self._models[reference] = FileSources(checkpoint.config, checkpoint, checkpoint, None, name, name)
        return self._models[reference]

    # --- config.json -------------------------------------------------------------------------------------------

    def _config(self, stage: Stage, built: BuiltGraph, files: FileSources) -> dict[str, Any] | None:
        config: Mapping[str, Any] | None = built.donor_config
        stacks = built.stacks
        if stage.files_from is not None:
            config, stacks = self._adopted(stage, stage.files_from, built, files.config)
        if config is None:
            self.warnings.append(f"{files.config_from} has no config.json, so that none is written")
            return None
        # without a head the donor has none either: it is tied already, or it is no language model
        tied = False if built.head else None
        wanted = stage.out_dtype or stage.dtype
        for stack in stacks:
            merged = merged_config(
                config,
                layers=len(stack.sources),
                source_layers=stack.sources,
                tied=tied,
                dtype=wanted.torch_name if wanted is not None else built.dtype,
                main=stack.donor.config_path,
                key=stack.donor.config_key,
                donor_layers=stack.donor.count,
            )
            config = merged.config
            self.warnings += merged.warnings
        return dict(config)

    def _adopted(
        self, stage: Stage, named: ModelReference, built: BuiltGraph, config: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], tuple[OutputStack, ...]]:
        """The config.json of the model that `files_from` names, and the output's stacks as it counts layers."""
        place = (*stage.place, "files_from")
        if config is None:
            raise self._recipe.error(place, f"{named.text} has no config.json")
        main = built.stacks[0].donor.config_path if built.stacks else ()
        try:
            adopted, remarks = override_config(config, built.donor_config, main=main, head=built.head)
        except ValueError as error:
            raise self._recipe.error(place, f"{named.text} {error}") from error
        self.warnings += [f"files_from {named.text}: {remark}" for remark in remarks]
        stacks = (
            override_stack(stack, config, self._levels(built, number)) for number, stack in enumerate(built.stacks)
        )
        return adopted, tuple(stacks)

    def _levels(self, built: BuiltGraph, number: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """What the layers of a stack were in its donor, and, where that is a stage, in the donor's donor, and so on.

        Yields:
            for each, how many layers it has, and which of them each layer of the stack is.
        """
        sources = built.stacks[number].sources
        while True:
            yield built.stacks[number].donor.count, sources
            donor = self._recipe.stage(built.models[built.donor].reference)
            if donor is None:
                return
            built = self._built[donor.name]
            below = built.stacks[number].sources
            sources = tuple(below[min(layer, len(below) - 1)] for layer in sources)

    # --- the tokenizer -----------------------------------------------------------------------------------------

    def _check_vocabularies(self, built: BuiltGraph, tokenizer: FileSources) -> None:
        """All models whose embeddings go into a stage must have the vocabulary of its tokenizer."""
        graph = built.graph
        used = dict.fromkeys(
            model
            for model, name in zip(graph.read_models, graph.read_names, strict=True)
            if is_embedding(name) or is_head(name)
        )
        for number in used:
            other = self.of(built.models[number].reference)
            found = self._difference(tokenizer, other)
            if found is not None:
                raise CheckpointError(
                    f"the vocabularies of {tokenizer.tokenizer_from} and {other.tokenizer_from} differ: {found}. "
                    "Embeddings can't be merged by token yet: use models of one vocabulary, or leave the tokenizer out "
                    "of the recipe where their rows mean the same all the same"
                )

    def _compare_vocabularies(self, donor: FileSources, tokenizer: FileSources) -> None:
        """A tokenizer that comes along with `files_from` should be that of the merged models."""
        if _has_tokenizer(donor) and _has_tokenizer(tokenizer):
            found = self._difference(tokenizer, donor)
            if found is not None:
                self.warnings.append(
                    f"the tokenizer of {tokenizer.tokenizer_from} is not that of {donor.tokenizer_from}, whose "
                    f"embeddings are merged: {found}"
                )

    def _difference(self, first: FileSources, second: FileSources) -> str | None:
        """How the vocabularies of two models differ; None where they don't."""
        directories = [tokenizer_directory(files) for files in (first, second)]
        if directories[0] == directories[1] or same_files(*directories):
            return None
        names = (first.tokenizer_from, second.tokenizer_from)
        vocabularies = [read_vocabulary(directory) for directory in directories]
        ours, theirs = vocabularies
        if ours is None or theirs is None:
            without = names[vocabularies.index(None)]
            return f"{without} has no tokenizer files, so that its vocabulary isn't known"
        return difference(ours, theirs, names)

    # --- the chat template -------------------------------------------------------------------------------------

    def _template(self, stage: Stage, built: BuiltGraph, tokenizer: FileSources) -> str | None:
        """The chat template that takes the place of the tokenizer's; None where its own stays."""
        wanted = stage.chat_template
        if wanted is None:
            return tokenizer.template
        if not _has_tokenizer(tokenizer):
            self.warnings.append(
                f"{tokenizer.tokenizer_from} has no tokenizer files, so that no chat template is written"
            )
            return None
        if wanted.kind == "auto":
            return self._commonest(built, tokenizer)
        if wanted.kind == "text":
            problem = syntax_error(wanted.value)
            if problem is not None:
                raise self._recipe.error((*stage.place, "chat_template"), f"this is no valid Jinja text: {problem}")
            return wanted.value
        text, tokens = BUILT_IN[wanted.value]
        vocabulary = read_vocabulary(tokenizer_directory(tokenizer)) if tokens else None
        missing = [token for token in tokens if vocabulary is not None and token not in vocabulary.rows]
        if missing:
            self.warnings.append(
                f"chat_template {wanted.value} needs the tokens {', '.join(missing)}, which the vocabulary of "
                f"{tokenizer.tokenizer_from} hasn't: the model will see them as ordinary text"
            )
        return text

    def _commonest(self, built: BuiltGraph, tokenizer: FileSources) -> str | None:
        """The template that most of a stage's models have; of equally common ones that of the first model."""
        found = [template for model in built.models if (template := _own_template(self.of(model.reference)))]
        if not found:
            self.warnings.append("chat_template auto: none of the models has a chat template")
            return tokenizer.template
        counts = Counter(template.strip() for template in found)
        chosen = max(found, key=lambda template: counts[template.strip()])
        return tokenizer.template if chosen == _own_template(tokenizer) else chosen


def _own_template(files: FileSources) -> str | None:
    return files.template or find_template(tokenizer_directory(files))


def _has_tokenizer(files: FileSources) -> bool:
    return any(
        not REPLACED.fullmatch(file.path) for file in companion_files(tokenizer_directory(files), (FileKind.TOKENIZER,))
    )


def tokenizer_directory(files: FileSources) -> Path:
    """Where the tokenizer's files are; those of a model of the Hub are brought there first."""
    checkpoint = files.tokenizer
    if hasattr(checkpoint, "repository"):
        from ...io.hub.checkpoint import companions  # local models do without the network's libraries
        from ...io.hub.download import download

        download(file for file in companions(checkpoint) if file_kind(file.name) is FileKind.TOKENIZER)
    return directory_of(checkpoint)
