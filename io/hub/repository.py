"""Resolves Hub repositories to a commit and its files, and locates the files in huggingface_hub's cache.

All tools of the Hub share this cache. By its documented layout, each repository has a folder with ``refs`` (branch ->
commit), ``blobs`` (files by hash) and ``snapshots/COMMIT`` (links to blobs by file name). Data that only mergeloom uses
(file listings by commit, headers by hash) is in huggingface_hub's assets folder.
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

from ...errors import CheckpointError, ModelNotFound
from ..open_source import quoted
from .http import (
    NO_DIRECTORY,
    OFFLINE,
    HubLocation,
    describe_gated,
    endpoint,
    fetch_json,
    is_commit,
    is_logged_in,
    is_offline,
)

MAX_LISTING_BYTES = 64_000_000
"""The maximum size of a repository's file listing in bytes, enough for about 200,000 files."""

NOT_CACHED = f"{NO_DIRECTORY} here, and as a model of the Hub it {OFFLINE}"
"""The error for a model that is not cached while HF_HUB_OFFLINE is set."""

_LISTING_VERSION = 1
_MAX_FILE = 1 << 50  # bytes, far more than any file on the Hub


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at one commit, downloaded or not.

    Args:
        repo: the repository's id.
        commit: the commit hash.
        name: the path in the repository, with forward slashes.
        nbytes: the size in bytes.
        etag: the hash: SHA-256 (64 hex digits) for large files, the git blob hash (40 hex digits) for small ones.
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
        """The path in the cache, in the commit's snapshot. It exists once the file is downloaded."""
        return self.folder / "snapshots" / self.commit / self.name

    @property
    def blob(self) -> Path:
        """The path of the blob in the cache. `path` is a link to it."""
        return self.folder / "blobs" / self.etag

    @property
    def partial(self) -> Path:
        """The path of an unfinished download."""
        return self.folder / "blobs" / f"{self.etag}.mergeloom-partial"

    @property
    def location(self) -> HubLocation:
        """The location on the Hub, for requests and errors."""
        return HubLocation(self.repo, self.commit, self.name)

    @property
    def url(self) -> str:
        """The download URL."""
        return f"{endpoint()}/{self.repo}/resolve/{self.commit}/{quote(self.name)}"

    @property
    def present(self) -> bool:
        """Whether the file is downloaded completely."""
        return _size(self.path) == self.nbytes

    @property
    def blob_present(self) -> bool:
        """Whether the blob is downloaded completely, for example with another commit."""
        return _size(self.blob) == self.nbytes

    @property
    def to_fetch(self) -> int:
        """The number of bytes still to download."""
        if self.present or self.blob_present:
            return 0
        partial = _size(self.partial) or 0
        return self.nbytes - partial if partial <= self.nbytes else self.nbytes


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit.

    Args:
        repo: the repository's id.
        revision: the requested branch, tag or commit.
        commit: the commit hash of the revision.
        folder: the repository's folder in the cache.
        files: the files by name, without those whose names are unsafe as local paths.
    """

    repo: str
    revision: str
    commit: str
    folder: Path
    files: Mapping[str, HubFile]

    @property
    def snapshot(self) -> Path:
        """The directory of the commit in the cache."""
        return self.folder / "snapshots" / self.commit

    @property
    def location(self) -> HubLocation:
        """The location on the Hub, for requests and errors."""
        return HubLocation(self.repo, self.revision)


def is_hub_id(text: str) -> bool:
    """Whether `text` is a valid repository id, such as ``meta-llama/Llama-3.1-8B`` or ``gpt2``."""
    name = r"(?![-.])(?!.*(?:--|\.\.))[\w.-]{1,96}(?<![-.])"
    return re.fullmatch(rf"{name}(?:/{name})?", text, re.ASCII) is not None and not text.endswith(".git")


def find_repository(repo: str, revision: str | None) -> Repository | None:
    """Resolve a revision to its commit and list the commit's files, with one request or none for a known commit.

    Returns:
        The repository; None if HF_HUB_OFFLINE is set and the cache has the commit but no listing of its files.

    Raises:
        CheckpointError: the repository or revision does not exist or is not accessible, or it is not cached and
            HF_HUB_OFFLINE is set.
        EnvironmentFailure: the Hub is not reachable.
    """
    location = HubLocation(repo, revision or "main", implied=revision is None)
    revision = location.revision
    if not is_hub_id(repo):
        raise ModelNotFound(f"{quoted(repo)}: is neither a directory here nor a valid id of a model on the Hub")
    if not _is_safe(revision):
        raise ModelNotFound(f"{location}: {quoted(revision)} is not a valid git branch, tag or commit")
    folder = _cache() / f"models--{repo.replace('/', '--')}"
    commit = revision if is_commit(revision) else None
    if commit is None and is_offline():
        commit = _read_ref(folder, revision)
        if commit is None:
            raise ModelNotFound(f"{location}: {NOT_CACHED}")
    if commit is not None:
        entries = _read_listing(folder, commit)
        if entries is not None:
            return _repository(repo, revision, commit, folder, entries)
        if is_offline():
            return None
    url = f"{endpoint()}/api/models/{repo}/revision/{quote(commit or revision, safe='')}?blobs=true"
    resolved, entries = _parse_listing(location, fetch_json(location, url, MAX_LISTING_BYTES))
    if commit not in (None, resolved):
        raise CheckpointError(f"{location}: {endpoint()} answers with commit {resolved} instead: check HF_ENDPOINT")
    _write_listing(folder, resolved, entries)
    if not is_commit(revision):
        write_cache(folder / "refs" / revision, resolved.encode())
    return _repository(repo, revision, resolved, folder, entries)


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The snapshot of a revision that another tool downloaded to the cache; None if there is none."""
    folder = _cache() / f"models--{repo.replace('/', '--')}"
    revision = revision or "main"
    commit = revision if is_commit(revision) else _read_ref(folder, revision)
    path = folder / "snapshots" / commit if commit else None
    return path if path is not None and path.is_dir() else None


# ------------------------------------------------------------------------------------------------ listings

_Entries = dict[str, tuple[int, str]]


def _parse_listing(location: HubLocation, document: Any) -> tuple[str, _Entries]:
    """Parse the Hub's description of a model: its commit, and the size and hash of each file."""
    commit = document.get("sha") if isinstance(document, dict) else None
    siblings = document.get("siblings") if isinstance(document, dict) else None
    if not isinstance(commit, str) or not is_commit(commit) or not isinstance(siblings, list):
        raise CheckpointError(f"{location}: {endpoint()} is not a valid Hub API: check HF_ENDPOINT and the proxy")
    entries: _Entries = {}
    for sibling in siblings:
        name = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if not isinstance(name, str) or not _is_safe(name):
            continue  # unsafe as a local path; if it is needed, it is reported as missing
        large = sibling.get("lfs")
        large = large if isinstance(large, dict) else {}
        entry = _entry(large.get("size", sibling.get("size")), large.get("sha256", sibling.get("blobId")))
        if entry is None and document.get("gated"):
            raise CheckpointError(describe_gated(location, is_logged_in()))
        if entry is None:
            raise CheckpointError(
                f"{location}: {endpoint()} lists {quoted(name)} without its size and hash: if HF_ENDPOINT is a mirror, "
                "use the Hub itself, or download the model and use its directory"
            )
        entries[name] = entry
    return commit, entries


def _entry(nbytes: object, etag: object) -> tuple[int, str] | None:
    """Validate the size and hash of a file; None if either is invalid."""
    if type(nbytes) is not int or not 0 <= nbytes <= _MAX_FILE or not isinstance(etag, str):
        return None
    return (nbytes, etag) if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag) else None


def _is_safe(name: str) -> bool:
    """Whether a name from the Hub is safe as a relative path on any system: it stays below its directory."""
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


# ------------------------------------------------------------------------------------------------ caching


def header_cache(file: HubFile) -> Path:
    """The cache file for the header of a file. The key is the file's hash, so commits share unchanged headers."""
    return _assets() / "headers" / file.etag


def write_cache(file: Path, data: bytes) -> None:
    """Write a cache file atomically. Errors of the file system are ignored: the data can be fetched again."""
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
    write_cache(_listing_file(folder, commit), json.dumps(document).encode())


def _read_listing(folder: Path, commit: str) -> _Entries | None:
    """Read a cached listing; None if it is missing or damaged."""
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
