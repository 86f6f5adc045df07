"""What the bytes of an output follow from, and the manifest that stays in OUT and says so."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .engine.fuse import FusedKernel
from .engine.layout import LAYOUT_VERSION
from .errors import CheckpointError
from .io.digests import bytes_digest
from .io.hub import HubCheckpoint
from .io.identity import file_identity
from .methods.contract import Kernel

if TYPE_CHECKING:
    from .planning import Plan

MANIFEST = "mergeloom.json"
_WORDS = {
    "mergeloom": "the version of mergeloom",
    "seed": "the seed",
    "shard_size": "the shard size",
    "layout": "the layout version of mergeloom",
    "sources": "the source files",
    "outputs": "the recipe",
}


def facts_of(plan: Plan) -> dict[str, Any]:
    """Everything that the output's bytes are a function of, as plain data.

    Reads samples of every source file. Raises CheckpointError where one can't be read.
    """
    graph = plan.built.graph
    used = sorted({(graph.read_models[number], ref.file) for number, ref in enumerate(graph.reads)})
    checkpoints = [model.checkpoint for model in plan.built.models]

    def identity(entry: tuple[int, Path]) -> str:
        model, file = entry
        found = checkpoints[model]
        return str(found.identity(file)) if isinstance(found, HubCheckpoint) else file_identity(file)

    with ThreadPoolExecutor(8) as pool:
        identities = list(pool.map(identity, used))
    sources: dict[str, dict[str, str]] = {}
    for (model, file), found in zip(used, identities, strict=True):
        sources.setdefault(str(model), {})[source_name(plan, model, file)] = found
    return {
        "mergeloom": __version__,
        "recipe": plan.recipe.text,
        "seed": plan.options.seed,
        "shard_size": plan.options.shard_size,
        "layout": LAYOUT_VERSION,
        "sources": sources,
        "outputs": _outputs_digest(plan),
    }


def source_name(plan: Plan, model: int, file: Path) -> str:
    """A source file, relative to its model's directory."""
    root = plan.built.models[model].checkpoint.path
    return str(file.relative_to(root)) if file.is_relative_to(root) and file != root else file.name


def _outputs_digest(plan: Plan) -> str:
    """A digest of every output tensor: name, type, shape, what makes it from which sources."""
    graph = plan.built.graph
    digest = hashlib.blake2b(digest_size=16)
    for output in graph.outputs:
        operation = graph.operation(output.node)
        sources = [(graph.read_models[read], graph.read_names[read]) for read in graph.node_sources[output.node]]
        entry = (
            output.name,
            graph.node_dtype[output.node].name,
            graph.shape(output.node),
            operation.kind.value,
            operation.method,
            sorted(operation.parameters),
            operation.base,
            operation.positions,
            _parts(operation.kernel),
            graph.node_key[output.node],
            sources,
        )
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def _parts(kernel: Kernel | None) -> list[Any]:
    """How the stages of a fused kernel hang together, beside the methods and parameters that its operation names."""
    if not isinstance(kernel, FusedKernel):
        return []
    return [
        (part.sources, part.key, part.positions, part.round_to and part.round_to.name, part.kernel.inputs)
        for part in kernel.parts
    ]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the facts has changed, in words; empty where nothing has."""
    found = []
    for key, words in _WORDS.items():
        if before.get(key) == now.get(key):
            continue
        if key == "sources":
            found += list(_source_differences(before.get(key), now.get(key)))
        elif key in ("mergeloom", "seed", "shard_size", "layout"):
            found.append(f"{words}: it was {before.get(key)}, and is {now.get(key)}")
        else:
            found.append(f"{words}{_recipe_difference(before, now)}")
    return found


def _recipe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first lines in which the recipes differ. Paths and comments may differ without changing what comes out."""
    old, new = str(before.get("recipe", "")).splitlines(), str(now.get("recipe", "")).splitlines()
    lines = [line for line in difflib.unified_diff(old, new, lineterm="", n=0) if line[:3] not in ("---", "+++", "@@ ")]
    return ": " + " | ".join(lines[:4]) if lines else ""


def _source_differences(before: object, now: object) -> Iterator[str]:
    old, new = (_flat(found) for found in (before, now))
    for model, name in sorted({*old, *new}):
        if old.get((model, name)) != new.get((model, name)):
            yield f"the source file {name} of model {int(model) + 1 if model.isdecimal() else model}"


def _flat(sources: object) -> dict[tuple[str, str], object]:
    """The identity of each source file by its model and name."""
    models = sources if isinstance(sources, dict) else {}
    return {
        (str(model), str(name)): identity
        for model, files in models.items()
        if isinstance(files, dict)
        for name, identity in files.items()
    }


def manifest_bytes(
    plan: Plan, facts: Mapping[str, Any], tensors: Mapping[str, str | None], files: Mapping[str, str]
) -> bytes:
    """``mergeloom.json``: what the output was made from, and the digest of everything in it.

    Args:
        plan: what was made.
        facts: of it.
        tensors: the digest of each output tensor; None where its bytes never came through the process.
        files: the digest of each file beside the shards.
    """
    content = {
        **facts,
        "models": [model.reference.text for model in plan.built.models],
        "files": dict(files),
        "shards": {shard.name: [shard.nbytes, bytes_digest(shard.header)] for shard in plan.layout.shards},
        "tensors": dict(tensors),
    }
    content["digest"] = _self_digest(content)
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _self_digest(content: Mapping[str, Any]) -> str:
    """The digest of a manifest without its own ``digest``."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return bytes_digest(json.dumps(rest, sort_keys=True).encode())


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest in a directory.

    Raises:
        CheckpointError: where there is none, or it was changed since it was written.
    """
    file = out / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{out}: has no {MANIFEST}: only what mergeloom has made whole can be verified"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error
    try:
        content = json.loads(text)
        whole = isinstance(content, dict) and content.get("digest") == _self_digest(content)
    except (ValueError, RecursionError):
        whole = False
    if not whole or text != json.dumps(content, indent=1, ensure_ascii=False) + "\n":
        raise CheckpointError(f"{file}: was changed since it was written, and vouches for nothing")
    return dict(content)
