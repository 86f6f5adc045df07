"""Resolves the sources of the non-weight files of each stage: config, tokenizer, chat template and others.

The output of a stage is an ordinary model for the next stage, but its files are never written. They are resolved to
files that exist, together with the changes that stages make to them (config.json, chat template).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.companions import FileKind, companion_files, file_kind
from ...io.safetensors.checkpoint import Checkpoint
from ...io.small_files import read_json
from ..graph.build import BuiltGraph, OutputStack
from ..model.roles import is_embedding, is_head
from ..model.warnings import ModelWarning, ModelWarningKind
from ..recipe.types import ModelReference, Recipe, Stage
from .chat_templates import BUILT_IN, REPLACED, find_template, syntax_error
from .config_override import override_config, override_stack
from .configs.output import output_config
from .vocabulary import difference, read_vocabulary, same_files


@dataclass(frozen=True, slots=True)
class FileSources:
    """The sources of a model's non-weight files.

    Args:
        config: content of config.json, or None for no file.
        others: checkpoint that provides the generation config, processors and licenses.
        tokenizer: checkpoint that provides the tokenizer.
        template: chat template that replaces the tokenizer's, or None.
        config_from: name in the recipe of the model that config.json is derived from.
        tokenizer_from: name in the recipe of the tokenizer's model.
    """

    config: Mapping[str, Any] | None
    others: Checkpoint
    tokenizer: Checkpoint
    template: str | None
    config_from: str
    tokenizer_from: str


@dataclass(frozen=True, slots=True)
class OutputModel:
    """A model that a merge writes: the output or a saved stage.

    Args:
        folder: folder in OUT, empty for OUT itself.
        stage: stage that produces the model.
        files: sources of its non-weight files.
        layers: number of layers in its main stack.
    """

    folder: str
    stage: Stage
    files: FileSources
    layers: int


def directory_of(checkpoint: Checkpoint) -> Path:
    """The directory of a checkpoint, which contains its non-weight files."""
    return checkpoint.path.parent if checkpoint.path.is_file() else checkpoint.path


class FileResolver:
    """Resolves the file sources of each stage of a recipe. Stages are added in order.

    Args:
        recipe: recipe that contains the stages.
        open_model: opens the checkpoint of a model reference that does not name a stage.
    """

    def __init__(self, recipe: Recipe, open_model: Callable[[ModelReference], Checkpoint]) -> None:
        self.warnings: list[ModelWarning] = []
        self._recipe = recipe
        self._open = open_model
        self._stages: dict[str | None, FileSources] = {}
        self._built: dict[str | None, BuiltGraph] = {}
        self._models: dict[ModelReference, FileSources] = {}

    def _warn(self, kind: ModelWarningKind, problem: str, advice: str = "", names: Iterable[str] = ()) -> None:
        self.warnings.append(ModelWarning(kind, problem, advice, tuple(names)))

    @property
    def output(self) -> FileSources:
        """The file sources of the output."""
        return self.of_stage(self._recipe.output)

    def of_stage(self, stage: Stage) -> FileSources:
        """The file sources of a stage that has been added."""
        return self._stages[stage.name]

    def add(self, stage: Stage, built: BuiltGraph) -> Mapping[str, Any] | None:
        """Resolve the files of a stage, and return its config.json.

        Raises:
            RecipeError: the recipe names a file that the models do not have.
            CheckpointError: a file cannot be read, or vocabularies differ that must be equal.
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
        sources = FileSources(
            config, files.others, tokenizer.tokenizer, template, files.config_from, tokenizer.tokenizer_from
        )
        self._stages[stage.name] = sources
        self._built[stage.name] = built
        return config

    def of(self, reference: ModelReference) -> FileSources:
        """The file sources of a model or of a stage that has been added. Raises CheckpointError."""
        stage = self._recipe.stage(reference)
        if stage is not None:
            return self._stages[stage.name]
        if reference not in self._models:
            path = Path(reference.path).expanduser()
            if path.is_dir():  # works for directories without weights
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
            config, stacks = self._overridden(stage, stage.files_from, built, files.config)
        if config is None:
            self._warn(ModelWarningKind.FILES, f"{files.config_from} has no config.json: no config.json is written")
            return None
        is_written = stage.save or stage is self._recipe.output
        derived = output_config(config, stage, built, stacks, files.config_from, is_written=is_written)
        self.warnings += derived.warnings
        return derived.config

    def _overridden(
        self, stage: Stage, named: ModelReference, built: BuiltGraph, config: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], tuple[OutputStack, ...]]:
        """The config.json of the model that `files_from` names, and the output stacks with its layer indices."""
        place = (*stage.place, "files_from")
        if config is None:
            raise self._recipe.error(place, f"{named.text} has no config.json")
        main = built.stacks[0].donor.config_path if built.stacks else ()
        try:
            config_json, remarks = override_config(config, built.donor_config, main=main, head=built.head)
        except ValueError as error:
            raise self._recipe.error(place, f"{named.text} {error}") from error
        for remark in remarks:
            self._warn(ModelWarningKind.CONFIG_DIFFERS, f"files_from {named.text}: {remark}")
        stacks = (
            override_stack(stack, config, self._levels(built, number)) for number, stack in enumerate(built.stacks)
        )
        return config_json, tuple(stacks)

    def _levels(self, built: BuiltGraph, number: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Trace the layers of a stack to its donor and, if that is a stage, to the donor's donor, and so on.

        Yields:
            Number of layers in the donor, and index there of each layer of the stack.
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
        """Raise CheckpointError if a model whose embeddings are merged has another vocabulary than the tokenizer."""
        graph = built.graph
        used = dict.fromkeys(
            model
            for model, name in zip(graph.read_models, graph.read_names, strict=True)
            if is_embedding(name) or is_head(name)
        )
        for number in used:
            other = self.of(built.models[number].reference)
            difference_text = self._difference(tokenizer, other)
            if difference_text is not None:
                raise CheckpointError(
                    f"the vocabularies of {tokenizer.tokenizer_from} and {other.tokenizer_from} differ: "
                    f"{difference_text}. Embeddings cannot be merged by token yet: use models with the same "
                    "vocabulary, or remove the tokenizer from the recipe if the rows of the embeddings match anyway"
                )

    def _compare_vocabularies(self, donor: FileSources, tokenizer: FileSources) -> None:
        """Warn if the tokenizer of `files_from` has another vocabulary than the merged models."""
        if _has_tokenizer(donor) and _has_tokenizer(tokenizer):
            difference_text = self._difference(tokenizer, donor)
            if difference_text is not None:
                self._warn(
                    ModelWarningKind.VOCABULARY,
                    f"the tokenizer of {tokenizer.tokenizer_from} differs from that of {donor.tokenizer_from}, whose "
                    f"embeddings are merged: {difference_text}",
                )

    def _difference(self, first: FileSources, second: FileSources) -> str | None:
        """Describe how the vocabularies of two models differ; None if they are equal."""
        directories = [tokenizer_directory(files) for files in (first, second)]
        if directories[0] == directories[1] or same_files(*directories):
            return None
        names = (first.tokenizer_from, second.tokenizer_from)
        vocabularies = [read_vocabulary(directory) for directory in directories]
        ours, theirs = vocabularies
        if ours is None or theirs is None:
            without = names[vocabularies.index(None)]
            return f"{without} has no tokenizer files, so its vocabulary is unknown"
        return difference(ours, theirs, names)

    # --- the chat template -------------------------------------------------------------------------------------

    def _template(self, stage: Stage, built: BuiltGraph, tokenizer: FileSources) -> str | None:
        """The chat template that replaces the tokenizer's; None to keep it."""
        wanted = stage.chat_template
        if wanted is None:
            return tokenizer.template
        if not _has_tokenizer(tokenizer):
            self._warn(
                ModelWarningKind.TEMPLATE,
                f"{tokenizer.tokenizer_from} has no tokenizer files: no chat template is written",
            )
            return None
        if wanted.kind == "auto":
            return self._most_common(built, tokenizer)
        if wanted.kind == "text":
            problem = syntax_error(wanted.value)
            if problem is not None:
                raise self._recipe.error((*stage.place, "chat_template"), f"invalid Jinja template: {problem}")
            return wanted.value
        text, tokens = BUILT_IN[wanted.value]
        vocabulary = read_vocabulary(tokenizer_directory(tokenizer)) if tokens else None
        missing = [token for token in tokens if vocabulary is not None and token not in vocabulary.rows]
        if missing:
            self._warn(
                ModelWarningKind.TEMPLATE,
                f"chat_template {wanted.value} needs the tokens {', '.join(missing)}, which are not in the vocabulary "
                f"of {tokenizer.tokenizer_from}: the model will see them as ordinary text",
            )
        return text

    def _most_common(self, built: BuiltGraph, tokenizer: FileSources) -> str | None:
        """The most common template of a stage's models; that of the first model if several are equally common."""
        templates = [template for model in built.models if (template := _own_template(self.of(model.reference)))]
        if not templates:
            self._warn(ModelWarningKind.TEMPLATE, "chat_template auto: none of the models has a chat template")
            return tokenizer.template
        counts = Counter(template.strip() for template in templates)
        chosen = max(templates, key=lambda template: counts[template.strip()])
        return tokenizer.template if chosen == _own_template(tokenizer) else chosen


def _own_template(files: FileSources) -> str | None:
    return files.template or find_template(tokenizer_directory(files))


def _has_tokenizer(files: FileSources) -> bool:
    return any(
        not REPLACED.fullmatch(file.path) for file in companion_files(tokenizer_directory(files), (FileKind.TOKENIZER,))
    )


def tokenizer_directory(files: FileSources) -> Path:
    """The directory of the tokenizer files, which are downloaded first for a model on the Hub."""
    checkpoint = files.tokenizer
    if hasattr(checkpoint, "repository"):
        from ...io.hub.checkpoint import companions  # local models do not need the network libraries
        from ...io.hub.download import download

        download(file for file in companions(checkpoint) if file_kind(file.name) is FileKind.TOKENIZER)
    return directory_of(checkpoint)
