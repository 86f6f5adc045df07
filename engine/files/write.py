"""Writes the non-weight files of a model: config.json, tokenizer, other companion files and the model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...io.checkpoint.checkpoint import INDEX_SUFFIX, Checkpoint
from ...io.companions import FileKind, companion_files
from ...io.output.directory import OutputDirectory
from ...io.output.shards import index_bytes
from ...io.tensors.dtypes import DTYPES
from ...version import __version__
from ..graph.encoding.output_values import labels, output_counts
from ..graph.graph import MergeGraph
from ..graph.layout import Layout
from ..model.contents.diffusion import is_diffusion
from ..model.inputs import Model
from ..model.vocabularies.tokenizer_files import GENERATION, directory_of, tokenizer_directory
from ..recipe.local import is_local
from ..recipe.types import Recipe
from .card import CardMethod, CardModel, model_card
from .chat_templates import REPLACED
from .licenses import license_of
from .published import published_names, published_recipe
from .sources import FileSources, OutputModel
from .token_ids import changed_ids
from .tokenizer_output import changed_tokenizer_files

CARD = "README.md"
RECIPE = "mergekit_config.yml"
"""The recipe in the output, under the name that mergekit and the Hub use."""
DESCRIPTIONS = (CARD, RECIPE)
"""Files that describe the merge in words of its time and place; their content may differ when it is repeated."""
CONFIG = "config.json"


CompanionLister = Callable[[Checkpoint, FileKind], Iterable[tuple[str, Path]]]
"""Lists a model's companion files of one kind: path relative to the model, and source file."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that a merge writes next to the shards.

    Args:
        name: path relative to OUT.
        content: bytes to write, or file to copy.
        last: whether the file is renamed to its final name after the shards, so loaders never see a partial model.
    """

    name: str
    content: bytes | Path
    last: bool = False


@dataclass(frozen=True, slots=True)
class OutputContent:
    """The information about the weights that the other files contain.

    Args:
        recipe: recipe of the merge.
        graph: output tensors and their sources.
        layout: shard and offset of each output tensor.
        inputs: models that are read.
        dtype: torch dtype name of the output in config.json, or None.
        papers: URL of the publication of each merge method that has one.
        command: command that repeats the merge.
        versions: version of each program by its name.
        keep_paths: whether local paths stay in the recipe that is published.
    """

    recipe: Recipe
    graph: MergeGraph
    layout: Layout
    inputs: Sequence[Model]
    dtype: str | None
    papers: Mapping[str, str] = field(default_factory=dict)
    command: str = "mergeloom merge mergekit_config.yml merged"
    versions: Mapping[str, str] = field(default_factory=lambda: {"mergeloom": __version__})
    keep_paths: bool = False

    @property
    def published(self) -> str:
        """The recipe in the form that the output's files contain."""
        return self.recipe.text if self.keep_paths else published_recipe(self.recipe.text, self.local_names)

    @property
    def lengthened_names(self) -> list[str]:
        """The published names of local inputs that are more than the last component, since others have the same."""
        if self.keep_paths:
            return []
        named = self.local_names.items()
        return list(dict.fromkeys(name for path, name in named if name != published_names([path])[path]))

    @property
    def local_names(self) -> dict[str, str]:
        """The name of each local input in the output's files, by its path in the recipe."""
        paths = [model.reference.path for model in self.inputs]
        local = [path for path in paths if is_local(path)]
        if self.keep_paths:
            return {path: path for path in local}
        stages = [stage.name for stage in self.recipe.stages if stage.name]
        return published_names(local, {*stages, *paths} - set(local))


def write_model_files(models: Sequence[OutputModel], content: OutputContent, out: OutputDirectory) -> list[str]:
    """Write all files except the weights to OUT, and return the names of those to publish last."""
    last = []
    for file in model_files(models, content):
        if isinstance(file.content, Path):
            out.copy_file(file.name, file.content)
        else:
            out.write_file(file.name, file.content)
        if file.last:
            last.append(file.name)
    return last


def local_companions(checkpoint: Checkpoint, kind: FileKind) -> Iterator[tuple[str, Path]]:
    """List the companion files in a model directory."""
    for file in companion_files(directory_of(checkpoint), (kind,)):
        yield file.path, file.source


def model_files(
    models: Sequence[OutputModel], content: OutputContent, companions: CompanionLister = local_companions
) -> Iterator[ModelFile]:
    """Yield all files that a merge writes next to the shards, except the manifest.

    Args:
        models: models that the merge writes, the output first.
        content: information about the weights.
        companions: lists the companion files of a model.

    Raises:
        MergeloomError: a source cannot be read.
    """
    for output in reversed(models):
        within = f"{output.folder}/" if output.folder else ""
        for name, data in _companions(output.files, companions):
            yield ModelFile(f"{within}{name}", data)
        yield ModelFile(f"{within}{CARD}", _card(content, output).encode())
        if content.published.strip():
            yield ModelFile(f"{within}{RECIPE}", content.published.encode())
        if output.files.config is not None:
            config = (json.dumps(output.files.config, indent=2) + "\n").encode()
            yield ModelFile(f"{within}{CONFIG}", config, last=True)
        if len(shards := content.layout.shards_in(output.folder)) > 1:
            stem = shards[0].name.rpartition("-00001-of-")[0]
            yield ModelFile(f"{stem}{INDEX_SUFFIX}", _index(content, output), last=True)


def _index(content: OutputContent, output: OutputModel) -> bytes:
    """The content of a model's shard index."""
    graph, layout = content.graph, content.layout
    numbers = graph.outputs_in(output.folder)
    names = {graph.outputs[n].name: layout.shards[layout.shard_of[n]].name.rpartition("/")[2] for n in numbers}
    return index_bytes(names, sum(graph.nbytes(graph.outputs[number].node) for number in numbers))


def _companions(files: FileSources, listed: CompanionLister) -> Iterator[tuple[str, bytes | Path]]:
    """The tokenizer files with the chat template inserted, and the other companion files."""
    for name, source in listed(files.generation, FileKind.GENERATION):
        renumbered = name == GENERATION and files.generation_ids
        yield name, changed_ids(files.generation_config, files.generation_ids) if renumbered else source
    yield from listed(files.others, FileKind.OTHER)
    changed: dict[str, bytes] = {}
    if files.template is not None or files.new_tokens:
        changed = changed_tokenizer_files(tokenizer_directory(files.tokenizer), files.new_tokens, files.template)
    for name, source in listed(files.tokenizer, FileKind.TOKENIZER):
        if name not in changed and not (files.template is not None and REPLACED.fullmatch(name)):
            yield name, source
    yield from changed.items()


def _card(content: OutputContent, output: OutputModel) -> str:
    graph = content.graph
    nodes = [graph.outputs[number].node for number in graph.outputs_in(output.folder)]
    used = {graph.read_models[read] for node in nodes for read in graph.reads_of(node)}
    local = content.local_names
    cards = {
        model.number: CardModel(
            model.reference.path,
            revision=model.reference.revision,
            local=local.get(model.reference.path),
            license_name=license_of(directory_of(model.checkpoint)),
        )
        for model in content.inputs
        if not output.folder or model.number in used
    }
    base = next(
        (
            cards[m.number]
            for m in content.inputs
            if output.stage.base_model and m.reference == output.stage.base_model.base and m.number in cards
        ),
        None,
    )
    methods = [output.stage.merge_method] if output.folder else [stage.merge_method for stage in content.recipe.stages]
    return model_card(
        name=output.stage.name or "Merged model",
        methods=[CardMethod(method, content.papers.get(method)) for method in dict.fromkeys(methods)],
        models=list(cards.values()),
        recipe=content.published,
        command=content.command,
        versions=content.versions,
        layers=output.layers,
        parameters=output_counts(graph, content.inputs, output.folder).parameters,
        dtype=", ".join(_dtypes(content, output.folder)),
        base_model=base,
        library_name=_library(output.files, [graph.outputs[number].name for number in graph.outputs_in(output.folder)]),
    )


def _dtypes(content: OutputContent, folder: str) -> list[str]:
    """The formats of a model that is written and torch's names of its dtypes, or the one that config.json states."""
    found = labels(content.graph, content.inputs, folder)
    if content.dtype is not None and not folder and all(name in DTYPES for name in found):
        return [content.dtype]
    return sorted({(DTYPES[name].torch_name or "packed") if name in DTYPES else name for name in found})


def _library(files: FileSources, names: Sequence[str]) -> str | None:
    """The Hub's name of the library that loads a model with these tensors; None for other weights without a config."""
    if "_class_name" in files.config if files.config is not None else is_diffusion(names):
        return "diffusers"
    if files.config is None and files.others.bare:
        return None
    is_embedder = (directory_of(files.others) / "modules.json").is_file()
    return "sentence-transformers" if is_embedder else "transformers"
