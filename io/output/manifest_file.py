"""Manifests: JSON files that hold the digest of everything in an output directory, and of themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..companions import LOADER_FOLDERS, is_loader_file
from ..json_pieces import equals_pieces, json_pieces
from ..open_source import open_source, read_range
from ..os_errors import translating_os_errors
from .digests import pieces_digest
from .lock import EXTRACTION, MANIFEST, TO_FINISH, Content, classify, is_complete, is_inside

_MAX_BYTES = 128 << 20


def signed_pieces(content: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the bytes of a manifest with this content and its digest.

    Args:
        content: plain data, with these keys among others:
            ``models``: the name of each source model;
            ``local_models``: the numbers of those that were local;
            ``sources``: for each model, by its number, the identity of each file that was read;
            ``files``: the digest of each file of the output other than the weights;
            ``shards``: the size of each file of weights in bytes, and the digest of its header;
            ``tensors``: the digest of each tensor, or its origin.
    """
    return _pieces({**content, "digest": _self_digest(content)})


def _self_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of a manifest without its own ``digest``."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return pieces_digest(json_pieces(rest, sort_keys=True))


def read_manifest(out: Path) -> dict[str, Any]:
    """Read and validate the manifest of a merge or of an extracted adapter. It may come from an untrusted source.

    All values have the expected types, and all names of files are inside the directory.

    Raises:
        MergeloomError: the directory holds neither; see `lock.classify`.
        CheckpointError: the manifest was changed since it was written.
        EnvironmentFailure: the disk failed.
    """
    marker = MANIFEST if made_by(out) == "merge" else EXTRACTION
    status = classify(out, marker)
    if status.content is not Content.FINISHED:
        raise status.error(TO_FINISH[status.content])
    file = out / marker
    with open_source(file) as (descriptor, size):
        if size > _MAX_BYTES:
            raise CheckpointError(f"{file}: is larger than {_MAX_BYTES} bytes, so it can't be a manifest")
        data = read_range(descriptor, 0, size, file=file)
    try:
        content = json.loads(data)
        intact = isinstance(content, dict) and content.get("digest") == _self_digest(content)
        intact = intact and equals_pieces(data, _pieces(content))
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(
            f"{file}: was changed since it was written and cannot be used for verification: restore it, or run the "
            "command that wrote it again, with another OUT"
        )
    if not _is_manifest(content):
        raise CheckpointError(
            f"{file}: has an invalid structure and cannot be used for verification: run the command that wrote it "
            "again, with another OUT"
        )
    return dict(content)


def made_by(out: Path) -> str:
    """Return what wrote a directory with a manifest: ``merge`` or ``extraction``."""
    return "extraction" if is_complete(out, EXTRACTION) and not is_complete(out, MANIFEST) else "merge"


def added_files(out: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files that loaders would use and that the manifest does not list, sorted by name.

    Loaders look into the directory of a model, into the folders in which it has files, and into `LOADER_FOLDERS`.
    Folders with other names, and hidden ones, are not searched. `is_loader_file` decides by a file's name.

    Raises:
        EnvironmentFailure: a directory can't be read.
    """
    known = {*manifest["files"], *manifest["shards"], MANIFEST}
    models = {name.rpartition("/")[0] for name in manifest["shards"]}
    folders = {"", *models, *(name.rpartition("/")[0] for name in known)}
    folders.update(f"{model}/{folder}".lstrip("/") for model in models for folder in LOADER_FOLDERS)
    added = []
    with translating_os_errors(out, "listing the files"):
        for folder in folders:
            if (out / folder).is_dir():
                names = (f"{folder}/{file.name}".lstrip("/") for file in (out / folder).iterdir() if file.is_file())
                added += [name for name in names if name not in known and is_loader_file(name)]
    return sorted(added)


def _pieces(content: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the bytes of a manifest."""
    yield from json_pieces(content, indent=1, ensure_ascii=False)
    yield b"\n"


def _is_manifest(content: Mapping[str, Any]) -> bool:
    """Whether all values in a manifest have the expected types, and all file names are inside the directory."""
    models = content.get("models")
    texts = isinstance(models, list) and all(isinstance(model, str) for model in models)
    local = content.get("local_models", [])  # older manifests have no such list
    numbers = isinstance(local, list) and all(isinstance(number, int) for number in local)
    if not isinstance(models, list) or not texts or not numbers:
        return False

    def is_file(name: object) -> bool:
        return isinstance(name, str) and is_inside(name)

    def is_model(number: object) -> bool:
        return isinstance(number, int) and 0 <= number < len(models)

    def is_digest(value: object) -> bool:
        if not isinstance(value, dict):
            return isinstance(value, str)
        offset = value.get("offset")
        is_origin = isinstance(offset, int) and 0 <= offset < 1 << 63 and isinstance(value.get("copied", False), bool)
        return is_origin and is_model(value.get("model")) and is_file(value.get("file"))

    def is_shard(value: object) -> bool:
        return isinstance(value, list) and [type(part) for part in value] == [int, str]

    def is_source(files: object) -> bool:
        return isinstance(files, dict) and all(is_file(name) for name in files)

    checks: dict[str, tuple[Callable[[str], bool], Callable[[object], bool]]] = {
        "shards": (is_file, is_shard),
        "files": (is_file, lambda digest: isinstance(digest, str)),
        "tensors": (lambda name: True, is_digest),
        "sources": (lambda number: number.isdecimal() and len(number) < 9 and is_model(int(number)), is_source),
    }
    return all(
        isinstance(part := content.get(key), dict)
        and all(is_name(name) and is_value(value) for name, value in part.items())
        for key, (is_name, is_value) in checks.items()
    )
