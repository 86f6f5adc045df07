"""The manifest: everything that determines the output's bytes, and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...io.checkpoint.checkpoint import Checkpoint
from ...io.checkpoint.identity import file_identity
from ...io.hub.checkpoint import HubCheckpoint
from ...io.output.digests import BLOCK_BYTES, bytes_digest, tensor_digest
from ...io.output.lock import MANIFEST
from ...io.output.manifest_file import read_manifest, signed_pieces
from ...io.tensors.assembled import files_of
from ...methods.kernel.spec import ARITHMETIC_VERSION
from ...methods.registry import code_of
from ...version import __version__
from ..graph.exports.facts import operation_facts
from ..graph.graph import MergeGraph
from ..graph.layout import LAYOUT_VERSION
from ..recipe.overrides import recipe_difference
from ..recipe.types import ModelReference

if TYPE_CHECKING:
    from .plan import Plan

__all__ = [
    "MANIFEST",
    "differences",
    "facts_of",
    "identity_of",
    "manifest_pieces",
    "model_names",
    "model_numbers",
    "model_references",
    "read_manifest",
    "source_name",
    "tensor_entries",
    "used_files",
]

_WORDS = {
    "mergeloom": "the version of mergeloom",
    "seed": "the seed",
    "shard_size": "the shard size",
    "arithmetic": "the arithmetic version of mergeloom",
    "layout": "the layout version of mergeloom",
    "methods": "the code of user-defined methods",
    "sources": "the source files",
    "outputs": "the recipe",
}


def facts_of(plan: Plan) -> dict[str, Any]:
    """Return everything that determines the output's bytes, as plain data.

    Reads samples of every source file. Raises CheckpointError if a file can't be read.
    """
    graph = plan.built.graph
    numbers = model_numbers(plan)
    used = used_files(graph)
    checkpoints = [model.checkpoint for model in plan.built.models]
    with ThreadPoolExecutor(8) as pool:
        identities = list(pool.map(lambda entry: identity_of(checkpoints[entry[0]], entry[1]), used))
    sources: dict[str, dict[str, str]] = {}
    for (model, file), identity in zip(used, identities, strict=True):
        sources.setdefault(str(numbers[model]), {})[source_name(plan, model, file)] = identity
    methods = {name: code for stage in plan.recipe.stages if (code := code_of(name := stage.merge_method))}
    return {
        **({"methods": methods} if methods else {}),
        "mergeloom": __version__,
        "recipe": plan.recipe.text,
        "seed": plan.options.seed,
        "shard_size": plan.options.shard_size,
        "arithmetic": ARITHMETIC_VERSION,
        "layout": LAYOUT_VERSION,
        "sources": sources,
        **({"renames": renames} if (renames := _renames(plan)) else {}),
        "outputs": _outputs_digest(plan),
    }


def used_files(graph: MergeGraph) -> list[tuple[int, Path]]:
    """Return the files that a graph reads, each with the number of its model in the graph."""
    pairs = zip(graph.read_models, graph.reads, strict=True)
    return sorted({(model, file) for model, ref in pairs for file in files_of(ref)})


def model_numbers(plan: Plan) -> tuple[int, ...]:
    """Return the number of each input model in the facts.

    Spellings of one path, such as `a` and `./a`, share one, unless the recipe gives their tensors different names.
    """
    numbers: dict[tuple[Path, object], int] = {}
    renames = plan.recipe.renames
    keys = ((model.checkpoint.path.resolve(), renames.get(model.reference.base)) for model in plan.built.models)
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def _renames(plan: Plan) -> dict[str, list[list[str]]]:
    """Return the pairs of prefix and replacement of each renamed model, by its number in the facts."""
    found: dict[str, list[list[str]]] = {}
    for number, model in zip(model_numbers(plan), plan.built.models, strict=True):
        if (rename := plan.recipe.renames.get(model.reference.base)) is not None:
            found[str(number)] = [list(pair) for pair in rename.pairs]
    return found


def model_references(plan: Plan) -> list[ModelReference]:
    """Return how the recipe first names each model, in the order of `model_numbers`."""
    named: dict[int, ModelReference] = {}
    for number, model in zip(model_numbers(plan), plan.built.models, strict=True):
        named.setdefault(number, model.reference.base)
    return list(named.values())


def model_names(plan: Plan) -> list[str]:
    """Return the text with which the recipe first names each model, in the order of `model_numbers`."""
    return [reference.text for reference in model_references(plan)]


def identity_of(checkpoint: Checkpoint, file: Path) -> str:
    """Return the identity of a file of a checkpoint. Raises CheckpointError if it can't be read."""
    return checkpoint.identity(file) if isinstance(checkpoint, HubCheckpoint) else file_identity(file)


def source_name(plan: Plan, model: int, file: Path) -> str:
    """Return the path of a source file relative to its model's directory."""
    root = plan.built.models[model].checkpoint.path
    return str(file.relative_to(root)) if file.is_relative_to(root) and file != root else file.name


def _outputs_digest(plan: Plan) -> str:
    """Digest every output tensor's name, dtype, shape, operation and sources.

    The digested JSON has keys and values of its own. It must not contain the name of a class, enum member or attribute:
    renaming one would make every unfinished merge a different merge.
    """
    graph = plan.built.inlined
    numbers = model_numbers(plan)
    digest = hashlib.blake2b(digest_size=16)
    if renames := _renames(plan):  # other tensors may have the same names with other pairs
        digest.update(json.dumps({"renames": renames}, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    for output in graph.outputs:
        results = graph.results_with(output.node)
        reads = graph.node_sources[results[0]]
        sources = [(numbers[graph.read_models[read]], graph.read_names[read]) for read in reads]
        entry = {
            "tensor": output.label,
            "dtype": graph.node_dtype[output.node].name,
            "shape": graph.shape(output.node),
            "key": graph.node_key[results[0]],
            "sources": sources,
            **({"result": results.index(output.node)} if len(results) > 1 else {}),
            **operation_facts(graph.operation(results[0])),
        }
        digest.update(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def other_version(before: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Describe both versions of mergeloom if a merge was started by a different one; otherwise return "".

    Args:
        before: facts of the earlier merge.
        now: facts of this merge.
        keys: facts that distinguish versions.
    """
    if all(before.get(key) == now.get(key) for key in keys):
        return ""
    return f"{_version(before)}, and this is {_version(now)}"


def _version(facts: Mapping[str, Any]) -> str:
    parts = [f"{key} version {facts[key]}" for key in ("arithmetic", "layout") if key in facts]
    journal = [f"journal format {facts['format']}"] if "format" in facts else []
    return f"mergeloom {facts.get('mergeloom', 'of an unknown version')} ({', '.join([*parts, *journal])})"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Describe how the facts of two merges differ.

    Args:
        before: facts of the earlier merge.
        now: facts of this merge.
        models: names of the models in this merge's recipe.

    Returns:
        One text for each difference.
    """
    changes = []
    for key, words in _WORDS.items():
        if before.get(key) == now.get(key):
            continue
        if key == "sources":
            same_recipe = before.get("outputs") == now.get("outputs")
            changes += list(_source_differences(before.get(key), now.get(key), models, same_recipe=same_recipe))
        elif key != "outputs":
            changes.append(f"{words}: it was {before.get(key)}, and is {now.get(key)}")
        else:
            changes.append(f"{words}{recipe_difference(*(str(facts.get('recipe', '')) for facts in (before, now)))}")
    return changes


def _source_differences(before: object, now: object, models: Sequence[str], *, same_recipe: bool) -> Iterator[str]:
    old, new = _flat(before), _flat(now)
    # another recipe may list the same models in another order: their files have not changed
    known_files = set() if same_recipe else {(name, identity) for (_, name), identity in old.items()}
    for model, name in sorted({*old, *new}):
        changed = old.get((model, name)) != new.get((model, name))
        if changed and (name, new.get((model, name))) not in known_files:
            known = model.isdecimal() and int(model) < len(models)
            yield f"the source file {name} of {models[int(model)] if known else f'model {model}'}"


def _flat(sources: object) -> dict[tuple[str, str], object]:
    """Return the identity of each source file by model and name."""
    models = sources if isinstance(sources, dict) else {}
    return {
        (str(model), str(name)): identity
        for model, files in models.items()
        if isinstance(files, dict)
        for name, identity in files.items()
    }


def manifest_pieces(
    plan: Plan, facts: Mapping[str, Any], tensors: Mapping[str, str | Mapping[str, Any]], files: Mapping[str, str]
) -> Iterator[bytes]:
    """Yield the bytes of ``mergeloom.json``: the facts of the merge, and a digest of everything in the output.

    Args:
        plan: plan of the merge.
        facts: facts of the merge, see `facts_of`.
        tensors: digest of each output tensor by label, or its origin if the process never read its bytes: the source's
            `model`, `file` and `offset`, and ``copied`` if the kernel copied it instead of sharing its blocks.
        files: digest of each file other than the shards.
    """
    references = model_references(plan)
    local = plan.content.local_names
    content = {
        **facts,
        "recipe": plan.content.published,
        "models": [local.get(reference.path, reference.text) for reference in references],
        "local_models": [number for number, reference in enumerate(references) if reference.path in local],
        "files": dict(files),
        "shards": {shard.name: [shard.nbytes, bytes_digest(shard.header)] for shard in plan.layout.shards},
        "tensors": tensors,
    }
    return signed_pieces(content)


def tensor_entries(plan: Plan, digests: Mapping[int, list[bytes]]) -> dict[str, str | dict[str, Any]]:
    """Return the manifest's entries of all output tensors, by label.

    Args:
        plan: plan of the finished merge.
        digests: block digests by node.
    """
    sharing = {transfer.file for transfer in plan.transfers if transfer.shares}
    numbers = model_numbers(plan)
    outputs = plan.built.graph.outputs
    return {output.label: _digest_or_origin(plan, output.node, digests, sharing, numbers) for output in outputs}


def _digest_or_origin(
    plan: Plan, node: int, digests: Mapping[int, list[bytes]], sharing: Collection[Path], numbers: Sequence[int]
) -> str | dict[str, Any]:
    """The entry of a tensor: its digest, or the origin of bytes that the process never read.

    Args:
        plan: plan of the merge.
        node: node that makes the tensor.
        digests: block digests by node.
        sharing: source files whose blocks are shared with OUT; tensors of other files are copied by the kernel.
        numbers: number of each input model in the manifest.
    """
    graph = plan.built.graph
    nbytes = graph.nbytes(node)
    if node in digests or not nbytes:
        blocks = digests.get(node, [])
        if len(blocks) != -(-nbytes // BLOCK_BYTES):
            raise RuntimeError(f"node {node}: {len(blocks)} blocks of {nbytes} bytes were digested")
        return tensor_digest(blocks)
    read = graph.node_sources[node][0]
    ref = graph.reads[read]
    model = graph.read_models[read]
    origin = {"model": numbers[model], "file": source_name(plan, model, ref.file), "offset": ref.offset}
    return origin if ref.file in sharing else origin | {"copied": True}
