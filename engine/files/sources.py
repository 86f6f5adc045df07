"""Resolves the sources of the non-weight files of each stage: config, tokenizer, chat template and others.

The output of a stage is an ordinary model for the next stage, but its files are never written. They are resolved to
files that exist, together with the changes that stages make to them (config.json, chat template).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ...io.checkpoint.checkpoint import Checkpoint
from ...io.companions import FileKind, companion_files
from ..graph.build import BuiltGraph, Model, OutputStack
from ..model.contents.diffusion import is_diffusion
from ..model.paths import located
from ..model.vocabularies.adapter_tokenizers import adapter_with_tokenizer
from ..model.vocabularies.added_tokens import AddedToken
from ..model.vocabularies.known import open_directory, tokenizer_source
from ..model.vocabularies.tensors import embedding_rows
from ..model.vocabularies.tokenizer_files import (
    GENERATION,
    check_companions,
    generation_config,
    has_file,
    tokenizer_directory,
)
from ..model.vocabularies.vocabulary import read_vocabulary
from ..model.warnings import ModelWarning, ModelWarningKind
from ..recipe.types import ModelReference, Recipe, Stage
from .chat_templates import BUILT_IN, REPLACED, find_template, syntax_error
from .config.files_from import follow_tokenizer, override_config, override_stack
from .config.output import output_config
from .token_checks import (
    CONFIG,
    SpecialTokens,
    TokenModel,
    check_input_tokens,
    check_output_tokens,
    check_stated_ids,
    check_tokenizer_rows,
    stated_vocabulary,
)
from .token_ids import Renumbering
from .vocabulary_checks import (
    TokenizerModel,
    VocabularyRule,
    check_vocabularies,
    models_with_merged_embeddings,
    models_with_used_embeddings,
)


@dataclass(frozen=True, slots=True)
class FileSources:
    """The sources of a model's non-weight files.

    Args:
        config: content of config.json, or None for no file.
        others: checkpoint that provides the processors and licenses.
        generation: checkpoint that provides the generation config.
        tokenizer: checkpoint that provides the tokenizer.
        template: chat template that replaces the tokenizer's, or None.
        config_from: name in the recipe of the model that config.json is derived from.
        tokenizer_from: name in the recipe of the tokenizer's model.
        new_tokens: tokens that are added to the tokenizer.
        generation_ids: ids of tokens that generation_config.json states otherwise than its model's file.
    """

    config: Mapping[str, Any] | None = field(repr=False)
    others: Checkpoint
    generation: Checkpoint
    tokenizer: Checkpoint
    template: str | None = field(repr=False)
    config_from: str
    tokenizer_from: str
    new_tokens: tuple[AddedToken, ...] = ()
    generation_ids: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The content of generation_config.json; empty if there is none. Raises CheckpointError."""
        return {**generation_config(self.generation), **self.generation_ids}

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are tokenizer files, a chat template aside."""
        directory = tokenizer_directory(self.tokenizer)
        return any(not REPLACED.fullmatch(file.path) for file in companion_files(directory, (FileKind.TOKENIZER,)))

    def special_tokens(self, renumbering: Renumbering | None = None) -> SpecialTokens:
        """The special tokens that the files state, with the numbers that they have in another vocabulary."""
        new = {token.text: token.row for token in self.new_tokens}
        return SpecialTokens(
            self.config, self.generation_config, self.tokenizer, self.template, new=new, renumbering=renumbering
        )


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
        renumbering = _renumbering(built, stage.files_from or donor)
        if config is not None and renumbering.changes:
            self.warnings += renumbering.lost(config, CONFIG, files.config_from)
            config = renumbering.apply(config)
        if stage.tokenizer is not None:
            tokenizer = self.of(stage.tokenizer.model or donor)
            if config is not None and not stage.tokenizer.union and tokenizer is not files:
                config = follow_tokenizer(config, tokenizer.config)
        self._check_vocabularies(stage, built, tokenizer)
        if built.vocabulary is not None:
            tokenizer = replace(tokenizer, new_tokens=(*tokenizer.new_tokens, *built.vocabulary.new))
        template = self._template(stage, built, tokenizer)
        generation = tokenizer if has_file(tokenizer.generation, GENERATION) else files
        ids = generation.generation_ids
        if generation is files and renumbering.changes:
            self.warnings += renumbering.lost(generation.generation_config, GENERATION, files.config_from)
            ids = renumbering.apply(generation.generation_config, ())
        sources = FileSources(
            config,
            files.others,
            generation.generation,
            tokenizer.tokenizer,
            template,
            files.config_from,
            tokenizer.tokenizer_from,
            tokenizer.new_tokens,
            ids,
        )
        if stage.save or stage is self._recipe.output:
            check_companions(files.others, generation.generation, tokenizer.tokenizer)
        self._check_tokens(stage, built, sources)
        self._stages[stage.name] = sources
        self._built[stage.name] = built
        return config

    def of(self, reference: ModelReference) -> FileSources:
        """The file sources of a model or of a stage that has been added. Raises CheckpointError."""
        with located(self._recipe, reference):
            adapter = adapter_with_tokenizer(reference, self._open)
        if adapter is not None:
            files = replace(self.of(reference.base), tokenizer=adapter, tokenizer_from=reference.text)
            return replace(files, template=None, new_tokens=())
        reference = reference.base  # an adapter has no other files
        stage = self._recipe.stage(reference)
        if stage is not None:
            return self._stages[stage.name]
        if reference not in self._models:
            with located(self._recipe, reference):
                checkpoint = open_directory(reference) or self._open(reference)
            name = reference.text
            self._models[reference] = FileSources(
                checkpoint.config, checkpoint, checkpoint, checkpoint, None, name, name
            )
        return self._models[reference]

    # --- config.json -------------------------------------------------------------------------------------------

    def _config(self, stage: Stage, built: BuiltGraph, files: FileSources) -> dict[str, Any] | None:
        config: Mapping[str, Any] | None = built.donor_config
        stacks = built.stacks
        if stage.files_from is not None:
            config, stacks = self._overridden(stage, stage.files_from, built, files.config)
        if config is None:
            if self._is_bare(built, files):
                return None
            self._warn(ModelWarningKind.FILES, f"{files.config_from} has no config.json: no config.json is written")
            return None
        is_written = stage.save or stage is self._recipe.output
        derived = output_config(config, stage, built, stacks, files.config_from, is_written=is_written)
        self.warnings += derived.warnings
        return derived.config

    def _is_bare(self, built: BuiltGraph, files: FileSources) -> bool:
        """Whether a stage needs no config.json: its donor is a file that stands alone, or a diffusion model's."""
        donor = built.models[built.donor]
        return files.others.standalone or (donor.checkpoint.bare and is_diffusion(donor.tensors))

    def _overridden(
        self, stage: Stage, named: ModelReference, built: BuiltGraph, config: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], tuple[OutputStack, ...]]:
        """The config.json of the model that `files_from` names, and the output stacks with its layer indices."""
        place = (*stage.place, "files_from")
        if config is None:
            raise self._recipe.error(place, f"{named.text} has no config.json")
        main = built.stacks[0].donor.config_path if built.stacks else ()
        try:
            rows = built.requested_rows
            config_json, remarks = override_config(config, built.donor_config, main=main, head=built.head, rows=rows)
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
            donor = self._recipe.stage(built.models[built.donor].reference.base)
            if donor is None:
                return
            built = self._built[donor.name]
            below = built.stacks[number].sources
            sources = tuple(below[min(layer, len(below) - 1)] for layer in sources)

    # --- the tokenizer -----------------------------------------------------------------------------------------

    def _check_vocabularies(self, stage: Stage, built: BuiltGraph, tokenizer: FileSources) -> None:
        """Check that the models whose embeddings are merged have the vocabulary of the output's tokenizer."""
        if built.vocabulary is not None:
            return  # their rows are those of its tokens
        union = stage.tokenizer is not None and stage.tokenizer.union
        models = built.named if union else models_with_used_embeddings(built)
        rule = VocabularyRule(required=stage.tokenizer is not None, allowed=stage.allow_vocabulary_mismatch)
        if union:
            rule = VocabularyRule(
                required=True,
                equal=True,
                error=lambda text: self._recipe.error(stage.tokenizer.place if stage.tokenizer else (), text),
                advice="Remove `allow_vocabulary_mismatch`: a union merges embeddings token by token"
                if stage.allow_vocabulary_mismatch
                else "Add its tokenizer files, or use a model with them",
            )
        merged = models_with_merged_embeddings(built)
        owner = tokenizer_source(stage, built.models[built.donor].reference)
        self.warnings += check_vocabularies(
            TokenizerModel(
                tokenizer.tokenizer_from,
                tokenizer.tokenizer,
                new=tokenizer.new_tokens,
                located=partial(located, self._recipe, owner),
            ),
            [self._tokenizer_model(model, merged=model.number in merged) for model in models],
            rule,
        )

    def _tokenizer_model(self, model: Model, *, merged: bool) -> TokenizerModel:
        files, named = self.of(model.reference), partial(located, self._recipe, model.reference)
        rows = embedding_rows(model)
        return TokenizerModel(files.tokenizer_from, files.tokenizer, rows, merged, files.new_tokens, named)

    def _check_tokens(self, stage: Stage, built: BuiltGraph, files: FileSources) -> None:
        """Check the special tokens of a stage's models and, if it is written, those of its output."""
        donor = built.models[built.donor]
        models = [donor, *(model for model in built.named if model is not donor)]
        tokens = files.special_tokens()
        if stage.tokenizer is None or stage.tokenizer.union:  # otherwise the recipe chooses
            inputs = {}
            for reference in (model.reference for model in models):
                with located(self._recipe, reference):
                    inputs[reference.text] = self.of(reference).special_tokens(_renumbering(built, reference))
            self.warnings += check_input_tokens(tokens, inputs)
        if stage is not self._recipe.output and not stage.save:
            return
        template = tokens.template
        named = stage.chat_template.value if stage.chat_template and stage.chat_template.kind == "name" else ""
        if any(tokens.row(token) is None for token in BUILT_IN.get(named, ("", ()))[1]):
            template = None  # the missing tokens are reported already
        self.warnings += check_output_tokens(tokens, template)
        merged = models_with_used_embeddings(built)
        rows = max((embedding_rows(model) or 0 for model in merged), default=0)
        if not rows:
            return
        owners = [stage.files_from or donor.reference] * 2
        if stage.tokenizer is not None:
            owners[1] = stage.tokenizer.model or donor.reference
        config, tokenizer = (self._token_model(reference, merged) for reference in owners)
        allowed = stage.allow_vocabulary_mismatch
        self.warnings += check_tokenizer_rows(files.tokenizer, tokenizer, rows, allowed=allowed)
        for content, file, model in (
            (files.config or {}, CONFIG, config),
            (files.generation_config, GENERATION, tokenizer),
        ):
            self.warnings += check_stated_ids(content, file, model, rows, allowed=allowed)

    def _token_model(self, reference: ModelReference, merged: Iterable[Model]) -> TokenModel:
        files = self.of(reference)
        is_merged = any(model.reference == reference for model in merged)
        return TokenModel(reference.text, stated_vocabulary(files.config), merged=is_merged)

    # --- the chat template -------------------------------------------------------------------------------------

    def _template(self, stage: Stage, built: BuiltGraph, tokenizer: FileSources) -> str | None:
        """The chat template that replaces the tokenizer's; None to keep it."""
        wanted = stage.chat_template
        if wanted is None:
            return tokenizer.template
        if not tokenizer.has_tokenizer:
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
        vocabulary = read_vocabulary(tokenizer_directory(tokenizer.tokenizer)) if tokens else None
        known = set() if vocabulary is None else {*vocabulary.rows, *(token.text for token in tokenizer.new_tokens)}
        missing = [token for token in tokens if vocabulary is not None and token not in known]
        if missing:
            self._warn(
                ModelWarningKind.TEMPLATE,
                f"chat_template {wanted.value} needs the tokens {', '.join(missing)}, which are not in the vocabulary "
                f"of {tokenizer.tokenizer_from}: the model will see them as ordinary text",
            )
        return text

    def _most_common(self, built: BuiltGraph, tokenizer: FileSources) -> str | None:
        """The most common template of a stage's models; that of the first model if several are equally common."""
        templates = [template for model in built.named if (template := _own_template(self.of(model.reference)))]
        if not templates:
            self._warn(ModelWarningKind.TEMPLATE, "chat_template auto: none of the models has a chat template")
            return tokenizer.template
        counts = Counter(template.strip() for template in templates)
        chosen = max(templates, key=lambda template: counts[template.strip()])
        return tokenizer.template if chosen == _own_template(tokenizer) else chosen


def _own_template(files: FileSources) -> str | None:
    return files.template or find_template(tokenizer_directory(files.tokenizer))


def _renumbering(built: BuiltGraph, reference: ModelReference) -> Renumbering:
    """The rows of a model's tokens in a stage's output."""
    vocabulary = built.vocabulary
    model = next((model for model in built.models if model.reference == reference), None)
    return Renumbering(None if vocabulary is None or model is None else vocabulary.models.get(model.number))
