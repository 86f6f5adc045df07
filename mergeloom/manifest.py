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
from .engine.layout import LAYOUT_VERSION
from .errors import CheckpointError
from .io.digests import bytes_digest
from .io.identity import file_identity

if TYPE_CHECKING:
    from .planning import Plan

MANIFEST = "mergeloom.json"
_WORDS = {
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
    with ThreadPoolExecutor(8) as pool:
        identities = list(pool.map(file_identity, [file for _, file in used]))
    sources: dict[str, dict[str, str]] = {}
    for (model, file), identity in zip(used, identities, strict=True):
        sources.setdefault(str(model), {})[file.name] = identity
    return {
        "recipe": plan.recipe.text,
        "seed": plan.options.seed,
        "shard_size": plan.options.shard_size,
        "layout": LAYOUT_VERSION,
        "sources": sources,
        "outputs": _outputs_digest(plan),
    }


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
            graph.node_key[output.node],
            sources,
        )
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the facts has changed, in words; empty where nothing has."""
    found = []
    for key, words in _WORDS.items():
        if before.get(key) == now.get(key):
            continue
        if key == "sources":
            found += list(_source_differences(before.get(key) or {}, now.get(key) or {}))
        elif key in ("seed", "shard_size", "layout"):
            found.append(f"{words}: it was {before.get(key)}, and is {now.get(key)}")
        else:
            found.append(f"{words}{_recipe_difference(before, now)}")
    return found


def _recipe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first lines in which the recipes differ. Paths and comments may differ without changing what comes out."""
    old, new = str(before.get("recipe", "")).splitlines(), str(now.get("recipe", "")).splitlines()
    lines = [line for line in difflib.unified_diff(old, new, lineterm="", n=0) if line[:3] not in ("---", "+++", "@@ ")]
    return ": " + " | ".join(lines[:4]) if lines else ""


def _source_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for model in sorted({*before, *now}):
        old, new = before.get(model, {}), now.get(model, {})
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                yield f"the source file {name} of model {int(model) + 1}"


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
        "mergeloom": __version__,
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
