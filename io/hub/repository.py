"""The files of a Hub repository at one commit: which there are, and where huggingface_hub's cache keeps them.

The cache is the one that all tools of the Hub share, by its documented layout: for each repository a folder with
``refs`` (branch -> commit), ``blobs`` (files by their hash) and ``snapshots/COMMIT`` (links to blobs by file name).
What only mergeloom keeps (listings by commit, headers by hash) is in huggingface_hub's folder for such: assets.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from ...errors import CheckpointError
from ..open_source import quoted
from .http import OFFLINE, Place, describe_gated, endpoint, is_commit, is_logged_in, is_offline, read_json

MAX_LISTING_BYTES = 64_000_000
"""The largest list of a repository's files that is read, in bytes: some 200,000 files."""

NOT_HERE = f"there is no such directory here, and as a model of the Hub it {OFFLINE}"
"""What is said of a model that isn't here while requests are forbidden."""

_LISTING_VERSION = 1
_MAX_FILE = 1 << 50  # bytes: no file of the Hub is near it


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at one commit; it needn't be here yet.

    Args:
        repo: the repository's id.
        commit: the commit hash.
        name: its name in the repository, with forward slashes.
        nbytes: its size.
        etag: its hash: SHA-256 of its bytes (64 hex digits) for large files, git's for small ones (40).
        folder: the repository's folder in the cache.
    """

    repo: str
    commit: str
    name: str
    nbytes: int
    etag: str
    folder: Path

    @property
    def path(self) -> Path:
        """Where it is once it is here: in the snapshot of its commit."""
        return self.folder / "snapshots" / self.commit / self.name

    @property
    def blob(self) -> Path:
        """Where the cache keeps its bytes; `path` is a link to there."""
        return self.folder / "blobs" / self.etag

    @property
    def partial(self) -> Path:
        """Where an unfinished download of it is."""
        return self.folder / "blobs" / f"{self.etag}.mergeloom-partial"

    @property
    def place(self) -> Place:
        """What errors call it."""
        return Place(self.repo, self.commit, self.name)

    @property
    def url(self) -> str:
        """Where it is on the Hub."""
        return f"{endpoint()}/{self.repo}/resolve/{self.commit}/{quote(self.name)}"

    @property
    def present(self) -> bool:
        """Whether it is here, whole."""
        return _size(self.path) == self.nbytes

    @property
    def blob_present(self) -> bool:
        """Whether its bytes are here, by its own name or, as after another commit's download, by none yet."""
        return _size(self.blob) == self.nbytes

    @property
    def to_fetch(self) -> int:
        """How many of its bytes a download must still transfer."""
        if self.present or self.blob_present:
            return 0
        begun = _size(self.partial) or 0
        return self.nbytes - begun if begun <= self.nbytes else self.nbytes


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit.

    Args:
        repo: its id.
        revision: the branch, tag or commit that was asked for.
        commit: the commit that it stands for.
        folder: its folder in the cache.
        files: its files by name; without those whose names no directory could hold safely.
    """

    repo: str
    revision: str
    commit: str
    folder: Path
    files: Mapping[str, HubFile]

    @property
    def snapshot(self) -> Path:
        """The directory that holds the files of the commit."""
        return self.folder / "snapshots" / self.commit

    @property
    def place(self) -> Place:
        """What errors call it."""
        return Place(self.repo, self.revision)


def is_hub_id(text: str) -> bool:
    """Whether `text` can be a model's id, such as ``meta-llama/Llama-3.1-8B`` or ``gpt2``."""
    name = r"(?![-.])(?!.*(?:--|\.\.))[\w.-]{1,96}(?<![-.])"
    return re.fullmatch(rf"{name}(?:/{name})?", text, re.ASCII) is not None and not text.endswith(".git")


def find_repository(repo: str, revision: str | None) -> Repository | None:
    """Resolve a revision to its commit, and list the commit's files: at most one request, none for a known commit.

    Returns:
        None where requests are forbidden and only the cache knows the commit, so that its files can't be listed.

    Raises:
        CheckpointError: there is no such repository or revision, it may not be read, or requests are forbidden.
        EnvironmentFailure: the Hub can't be reached.
    """
    revision = revision or "main"
    place = Place(repo, revision)
    if not is_hub_id(repo):
        raise CheckpointError(f"{quoted(repo)}: is no directory here, and no id that a model of the Hub can have")
    if not _is_safe(revision):
        raise CheckpointError(f"{place}: {quoted(revision)} is no branch, tag or commit that git could have")
    folder = _cache() / f"models--{repo.replace('/', '--')}"
    commit = revision if is_commit(revision) else None
    if commit is None and is_offline():
        commit = _read_ref(folder, revision)
        if commit is None:
            raise CheckpointError(f"{place}: {NOT_HERE}")
    if commit is not None:
        entries = _read_listing(folder, commit)
        if entries is not None:
            return _repository(repo, revision, commit, folder, entries)
        if is_offline():
            return None
    url = f"{endpoint()}/api/models/{repo}/revision/{quote(commit or revision, safe='')}?blobs=true"
    found, entries = _parse_listing(place, read_json(place, url, MAX_LISTING_BYTES))
    if commit not in (None, found):
        raise CheckpointError(f"{place}: {endpoint()} answers with commit {found} instead: check HF_ENDPOINT")
    _write_listing(folder, found, entries)
    if not is_commit(revision):
        write_whole(folder / "refs" / revision, found.encode())
    return _repository(repo, revision, found, folder, entries)


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The directory in the cache that other tools downloaded a revision to; None where there is none."""
    folder = _cache() / f"models--{repo.replace('/', '--')}"
    revision = revision or "main"
    commit = revision if is_commit(revision) else _read_ref(folder, revision)
    path = folder / "snapshots" / commit if commit else None
    return path if path is not None and path.is_dir() else None


# ------------------------------------------------------------------------------------------------ the listing

_Entries = dict[str, tuple[int, str]]


def _parse_listing(place: Place, document: Any) -> tuple[str, _Entries]:
    """The commit, and the size and hash of each file, in what the Hub says of a model."""
    commit = document.get("sha") if isinstance(document, dict) else None
    siblings = document.get("siblings") if isinstance(document, dict) else None
    if not isinstance(commit, str) or not is_commit(commit) or not isinstance(siblings, list):
        raise CheckpointError(f"{place}: {endpoint()} doesn't answer as the Hub does: check HF_ENDPOINT and the proxy")
    entries: _Entries = {}
    for sibling in siblings:
        name = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if not isinstance(name, str) or not _is_safe(name):
            continue  # never to be a path here; what needs it will find it missing
        large = sibling.get("lfs")
        large = large if isinstance(large, dict) else {}
        entry = _entry(large.get("size", sibling.get("size")), large.get("sha256", sibling.get("blobId")))
        if entry is None and document.get("gated"):
            raise CheckpointError(describe_gated(place, is_logged_in()))
        if entry is None:
            raise CheckpointError(
                f"{place}: {endpoint()} lists {quoted(name)} without its size and hash, which the Hub gives: if "
                "HF_ENDPOINT is a mirror, use the Hub itself, or download the model and give its directory"
            )
        entries[name] = entry
    return commit, entries


def _entry(nbytes: object, etag: object) -> tuple[int, str] | None:
    """A file's size and hash; None where they are nothing of the kind."""
    if type(nbytes) is not int or not 0 <= nbytes <= _MAX_FILE or not isinstance(etag, str):
        return None
    return (nbytes, etag) if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag) else None


def _is_safe(name: str) -> bool:
    """Whether a name from elsewhere stays below the directory that it is put in, on any system."""
    parts = name.split("/")
    return (
        name.isprintable()
        and len(name.encode()) <= 1024
        and "\\" not in name
        and not PureWindowsPath(name).drive
        and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
    )


def _repository(repo: str, revision: str, commit: str, folder: Path, entries: _Entries) -> Repository:
    files = {name: HubFile(repo, commit, name, nbytes, etag, folder) for name, (nbytes, etag) in entries.items()}
    return Repository(repo, revision, commit, folder, MappingProxyType(files))


# ------------------------------------------------------------------------------------------------ what is kept


def header_cache(file: HubFile) -> Path:
    """Where the header of a file is kept; by its hash, so that a new commit asks only for what it changed."""
    return _assets() / "headers" / file.etag


def write_whole(file: Path, data: bytes) -> None:
    """Keep something that can be fetched again: whole, or not at all where the disk doesn't let us."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
            Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _assets() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "mergeloom"


def _read_ref(folder: Path, revision: str) -> str | None:
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if is_commit(commit) else None


def _listing_file(folder: Path, commit: str) -> Path:
    return _assets() / "listings" / folder.name / f"{commit}.json"


def _write_listing(folder: Path, commit: str, entries: _Entries) -> None:
    document = {"version": _LISTING_VERSION, "files": entries}
    write_whole(_listing_file(folder, commit), json.dumps(document).encode())


def _read_listing(folder: Path, commit: str) -> _Entries | None:
    """What `_write_listing` kept; None where it isn't there or isn't whole."""
    try:
        document = json.loads(_listing_file(folder, commit).read_bytes())
        if document["version"] != _LISTING_VERSION:
            return None
        entries: _Entries = {}
        for name, (nbytes, etag) in document["files"].items():
            entry = _entry(nbytes, etag)
            if entry is None or not _is_safe(name):
                return None
            entries[name] = entry
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entries


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
