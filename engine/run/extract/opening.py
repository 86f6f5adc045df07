"""Opens the two models of an extraction, pairs their tensors, and rejects models that are not of one architecture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....errors import CheckpointError, UsageError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.checkpoint.identity import file_identity
from ....io.hub.repository import HubFile
from ....io.reading import FileStamps, stat_fingerprints
from ....io.tensors.assembled import files_of
from ....io.tensors.refs import TensorRef
from ....io.units import listed, plural
from ...files.published import published_names
from ...model.experts.mapping import NamedCheckpoint, in_layout_of
from ...model.layers import find_layers
from ...model.open import is_remote, open_adapters, open_named
from ...model.roles import is_buffer, is_head, tied_embedding
from ...recipe.local import is_local
from ..diff.pairs import Opened, Pairing, pair_tensors
from ..diff.parts import with_names_of
from ..manifest import identity_of
from .adapter_files import CONFIG, BaseModel
from .names import has_head, module_of, module_prefix, tied_head
from .options import ExtractOptions
from .targets import LeftOut, Targets, Tie, find_targets

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class OpenedModels:
    """The models of an extraction.

    Args:
        base: the base model.
        model: the model, with the names and the layout of the base model.
        pairing: tensors of both, the base model first.
        targets: what is to be done with the tensors.
        described: what adapter_config.json says about the base model.
        tie: tied head of the base model; None if its head has a matrix of its own, or it has none.
    """

    base: Opened
    model: Opened
    pairing: Pairing
    targets: Targets
    described: BaseModel
    tie: Tie | None

    @property
    def stamps(self) -> FileStamps:
        """The stamps of all files before their headers were read."""
        return {file: stamp for source in self._sources for file, stamp in source.stamps.items()}

    @property
    def _sources(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that values are computed from."""
        return (*self.base.sources, *self.model.sources)

    @property
    def refs(self) -> list[TensorRef]:
        """The stored tensors that are read."""
        pairs = [pair for job in self.targets.jobs for pair in job.pairs]
        pairs += [each.pair for each in self.targets.left_out if each.pair is not None]
        tensors = [tensor for pair in pairs for tensor in (pair.base, pair.model)]
        return [ref for each in tensors for ref in ((each,) if isinstance(each, TensorRef) else each.refs)]

    def downloads(self) -> tuple[HubFile, ...]:
        """The files of Hub models that are needed and not in the cache."""
        remote = [source for source in self._sources if is_remote(source)]
        if not remote:
            return ()
        from ....io.hub.checkpoint import needed_files

        refs = self.refs
        found = {file.path: file for checkpoint in remote for file in needed_files(checkpoint, refs)}
        return tuple(file for file in found.values() if not file.present)

    @property
    def files(self) -> dict[str, dict[str, Path]]:
        """The files that are read, by model (``model``, ``base``), number of the checkpoint or adapter, and name."""
        used = {file for ref in self.refs for file in files_of(ref)}
        return {
            key: {
                f"{number}/{file.name}": file
                for number, source in enumerate(model.sources)
                for file in source.files
                if file in used
            }
            for key, model in (("model", self.model), ("base", self.base))
        }

    def identities(self) -> dict[str, dict[str, str]]:
        """Return the identity of each file that is read, like `files`, and of adapter configs. Reads samples."""
        found = {key: {name: file_identity(file) for name, file in files.items()} for key, files in self.files.items()}
        for number, adapter in enumerate(self.model.adapters, 1):
            found["model"][f"{number}/{CONFIG}"] = adapter.config.digest
        return found

    def named_sources(self) -> dict[str, Any]:
        """Return what the manifest says about the files that are read: their models and identities.

        Of a local model, the name is the last component of its path.
        """
        files, named = self.files, dict[str, dict[str, str]]()
        for key, model in (("model", self.model), ("base", self.base)):
            names = model.base, *(adapter.name for adapter in model.adapters)
            for number, (name, source) in enumerate(zip(names, model.sources, strict=True)):
                own = [file for entry, file in files[key].items() if entry.startswith(f"{number}/")]
                named.setdefault(name, {}).update((file.name, identity_of(source, file)) for file in own)
        local = published_names(
            [name for name in named if is_local(name)], {each for each in named if not is_local(each)}
        )
        return {
            "models": [local.get(name, name) for name in named],
            "local_models": [number for number, name in enumerate(named) if name in local],
            "sources": {str(number): found for number, found in enumerate(named.values()) if found},
        }

    def current_stamps(self) -> dict[str, list[int]]:
        """Return the stamp of each file that is read as it is now, by model and name."""
        files = {f"{key}/{name}": file for key, files in self.files.items() for name, file in files.items()}
        stamps = stat_fingerprints(files.values())
        return {name: list(stamps[file]) for name, file in files.items()}

    @property
    def remarks(self) -> Iterator[str]:
        """Warnings about the files of the models."""
        for model in {each.name: each for each in (self.model, self.base)}.values():
            yield from (f"{model.name}: {remark}" for remark in model.checkpoint.remarks)
            yield from filter(None, (each.remark(model.base, model.checkpoint) for each in model.adapters))


def open_models(model: str | os.PathLike[str], base: str | os.PathLike[str], options: ExtractOptions) -> OpenedModels:
    """Open a model and its base, and find out what is to be extracted.

    Raises:
        CheckpointError: a model is missing or damaged, their tensors have different shapes, one of them has other
            layers, or the options leave nothing to extract.
        UsageError: a name is not valid.
    """
    named = [open_named(os.fspath(each)) for each in (base, model)]
    reference = named[0][0]
    if reference.adapters:
        raise UsageError(
            f"BASE {reference.text} has an adapter, and PEFT can't load another one on it: merge the adapter into its "
            "base first"
        )
    named[1] = named[1][0], with_names_of(named[1][1], named[0][1])
    ours, theirs = (Opened(each.text, checkpoint, open_adapters(each)) for each, checkpoint in named)
    mapped = in_layout_of(*(NamedCheckpoint(each.name, each.checkpoint) for each in (ours, theirs)))
    theirs = replace(theirs, checkpoint=mapped.checkpoint)
    pairing = pair_tensors(ours, theirs)
    _check_layers(ours, theirs)
    config = ours.checkpoint.config
    tie = _find_tie(ours, pairing)
    targets = find_targets(pairing.pairs, options, config, tie)
    targets = _with_unpaired(targets, pairing, ours, theirs, options)
    weights = frozenset(
        module_of(pair.name)[0] for pair in pairing.pairs if pair.name.endswith(".weight") and len(pair.a.shape) > 1
    )
    described = BaseModel(
        reference.path,
        reference.revision,
        config,
        module_prefix(ours.checkpoint),
        tie is not None and not tie.stored,
        weights,
    )
    if not targets.jobs:
        raise CheckpointError(
            f"{ours.name} and {theirs.name} have no tensor that the options select: check --include and --exclude"
        )
    return OpenedModels(ours, theirs, pairing, targets, described, tie)


def _check_layers(base: Opened, model: Opened) -> None:
    """Raise CheckpointError if the models have stacks of layers of different lengths."""
    counts = [_layer_counts(each) for each in (base, model)]
    for prefix in counts[0].keys() & counts[1].keys():
        ours, theirs = counts[0][prefix], counts[1][prefix]
        if ours != theirs:
            raise CheckpointError(
                f"{base.name} has {plural(ours, 'layer')} in {prefix}, but {model.name} has {theirs}: an adapter "
                "can't add or remove layers; BASE must be the model that MODEL was fine-tuned from"
            )


def _layer_counts(model: Opened) -> Mapping[str, int]:
    try:
        layers = find_layers(model.checkpoint.tensors, model.checkpoint.config)
    except CheckpointError:  # the shapes and names are compared without
        return {}
    return {stack.prefix: stack.count for stack in layers.mains}


def _find_tie(base: Opened, pairing: Pairing) -> Tie | None:
    """Return the tied head of the base model; None if its head has a matrix of its own, or it has none.

    It is tied if config.json says so, or if the architecture has a head and the checkpoint doesn't.
    """
    config: Mapping[str, Any] = base.checkpoint.config or {}
    stated = config.get("tie_word_embeddings")
    heads = [name for name in base.checkpoint.tensors if is_head(name)]
    if stated is False or (heads and stated is not True) or not has_head(config):
        return None
    names = [pair.name for pair in pairing.pairs]
    stored = next((name for name in names if is_head(name)), "")
    embedding = tied_embedding(stored or "lm_head.weight", names)
    if embedding is None:
        return None
    head = tied_head(config)
    return Tie(embedding, stored or (f"{head}.weight" if head else ""), bool(stored))


def _with_unpaired(targets: Targets, pairing: Pairing, base: Opened, model: Opened, options: ExtractOptions) -> Targets:
    """Add the tensors that can't be compared, unless they are an error."""
    shapes = [each for each in pairing.not_compared if each.reason.startswith("shape") and options.selects(each.name)]
    if shapes:
        shown = "; ".join(f"{each.name}: {_in_words(each.reason)}" for each in shapes[:_SHOWN])
        more = f", and {len(shapes) - _SHOWN} more" if len(shapes) > _SHOWN else ""
        raise CheckpointError(
            f"{model.name} was not fine-tuned from {base.name}: tensors have other shapes ({shown}{more}); choose "
            "another BASE, or leave these tensors out with --exclude"
        )
    left_out = list(targets.left_out)
    left_out += [
        LeftOut(None, each.name, _in_words(each.reason)) for each in pairing.not_compared if options.selects(each.name)
    ]
    left_out += [LeftOut(None, name, "only in MODEL") for name in pairing.only_in_b if options.selects(name)]
    return Targets(targets.jobs, tuple(left_out), targets.excluded)


def _in_words(reason: str) -> str:
    """A reason of `diff`, which calls the base model A and the model B, in the words of this command."""
    return reason.replace(" in A", " in BASE").replace(" in B,", " in MODEL,").removesuffix(" in B") + (
        " in MODEL" if reason.endswith(" in B") else ""
    )


def missing_in_model(pairing: Pairing) -> str:
    """The sentence about tensors that only the base model has; empty if there are none."""
    missing = [name for name in pairing.only_in_a if not is_buffer(name)]
    return f"only in BASE, so the adapter does not change them: {listed(missing)}" if missing else ""
