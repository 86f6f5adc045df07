"""A server on 127.0.0.1 with the metadata and file endpoints of the Hugging Face Hub, and injected faults.

Large files are redirected to a second server, on another port, as the Hub redirects to its content delivery network;
small ones to another path of the same. Every request is logged with the bytes of its body that were sent.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.waiting import HANG_SECONDS

PIECE = 1 << 16
LARGE = (".safetensors", ".bin", ".model")


@dataclass(slots=True)
class Served:
    """A request and its answer: `file` is the path in the repository, `start` the first requested byte."""

    method: str
    target: str
    file: str = ""
    start: int = 0
    status: int = 0
    nbytes: int = 0
    authorization: str | None = None
    cdn: bool = False


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file at one commit; `sha256` is None for files that are not in LFS."""

    name: str
    data: bytes
    blob: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


@dataclass(slots=True)
class Commit:
    """A repository at one commit; `alter` modifies its listing."""

    sha: str
    files: dict[str, StoredFile]
    alter: Callable[[dict[str, Any]], Any] = lambda document: document


@dataclass(slots=True)
class Repo:
    """A repository: its access is ``open``, ``gated`` or ``private``; `readers` are the tokens that may read it."""

    commits: dict[str, Commit]
    revisions: dict[str, str]
    access: str = "open"
    readers: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Fault:
    """A fault of the next `times` requests whose method and target match.

    Args:
        pattern: searched in ``GET /the/target``.
        times: how often it happens.
        status: answered instead, where it isn't 0.
        headers: sent along; on a good answer, instead of its own.
        cut: the connection ends after so many bytes of the body.
        hold: waited for before it ends.
        body: sent instead.
    """

    pattern: str
    times: int = 1
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    hold: threading.Event | None = None
    body: bytes | None = None
    happened: threading.Event = field(default_factory=threading.Event)


def git_hash(data: bytes) -> str:
    """The git blob hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@cache
def store(name: str, data: bytes) -> StoredFile:
    """A file with its hashes."""
    return StoredFile(name, data, git_hash(data), hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else None)


class HubServer:
    """The server; `url` is what HF_ENDPOINT should be. Use it with `serving`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.log: list[Served] = []
        self.blobs: dict[str, StoredFile] = {}
        self.ranges = True
        self.lock = threading.Lock()
        self._servers = [_listen(self, cdn) for cdn in (False, True)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def add(self, repo: str, source: Mapping[str, bytes], *, revision: str = "main") -> Commit:
        """Commit files by name, and make `revision` refer to the commit."""
        files = {name: store(name, data) for name, data in sorted(source.items())}
        self.blobs |= {file.etag: file for file in files.values()}
        sha = hashlib.sha1("".join(name + file.etag for name, file in files.items()).encode()).hexdigest()
        stored = self.repos.setdefault(repo, Repo({}, {}))
        stored.revisions[revision] = sha
        return stored.commits.setdefault(sha, Commit(sha, files))

    def fail(self, pattern: str, **what: Any) -> Fault:
        """Inject a fault into the next matching requests; see `Fault`."""
        self.faults.append(Fault(pattern, **what))
        return self.faults[-1]

    def sent(self, pattern: str = "") -> int:
        """The number of body bytes sent for files whose names match."""
        return sum(served.nbytes for served in self.log if re.search(pattern, served.file or served.target))

    def fetched(self) -> set[str]:
        """The files of which any bytes were sent."""
        return {served.file for served in self.log if served.file and served.nbytes}

    def close(self) -> None:
        """Stop serving: connections are refused from then on."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def take_fault(self, line: str) -> Fault | None:
        """The fault to inject into a request, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serving() -> Iterator[HubServer]:
    """A running server."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed the connection."""


def _listen(hub: HubServer, cdn: bool) -> _Server:
    handler = type("Handler", (_Handler,), {"hub": hub, "cdn": cdn})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer
    cdn: bool

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        authorization = self.headers.get("Authorization")
        self.served = Served(self.command, self.path, authorization=authorization, cdn=self.cdn)
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        with self.hub.lock:
            self.hub.log.append(self.served)
        self.fault = self.hub.take_fault(f"{self.command} {self.path}")
        target = urlsplit(self.path).path
        if self.fault and self.fault.status:
            self._send(self.fault.status, self.fault.body or b"", dict(self.fault.headers))
        elif self.cdn:
            self._send_file(self.hub.blobs[target.removeprefix("/blobs/")], {})
        elif self.token is not None and self.token not in self.hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/resolve-cache/(\w+)", target):
            self._send_file(self.hub.blobs[match[1]], {})
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+))?", target):
            self._send_listing(match[1], unquote(match[3] or "main"), tree=match[2] == "tree")
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", target):
            self._resolve(*map(unquote, match.groups()))
        else:
            self._refuse(404, "", "not an endpoint")

    # -------------------------------------------------------------------------------------------- endpoints

    def _find(self, name: str, revision: str) -> tuple[Repo, Commit] | None:
        """The requested commit of a repository; None after an error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.access == "private" and self.token not in repo.readers):
            self._refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        commit = repo.commits.get(repo.revisions.get(revision, revision))
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    def _send_listing(self, name: str, revision: str, *, tree: bool) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        repo, commit = found
        entries = []
        for file in commit.files.values():
            size = len(file.data)
            lfs = {"sha256": file.sha256, "oid": file.sha256, "size": size, "pointerSize": 134}
            entry = {"rfilename": file.name, "size": size, "blobId": file.blob}
            if tree:
                entry = {"type": "file", "path": file.name, "size": size, "oid": file.blob}
            entries.append(entry | ({"lfs": lfs} if file.sha256 else {}))
        gated = "manual" if repo.access == "gated" else False
        document = {"id": name, "sha": commit.sha, "gated": gated, "private": False, "siblings": entries}
        answer = entries if tree else commit.alter(document)
        self._send(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def _resolve(self, name: str, revision: str, path: str) -> None:
        self.served.file = path
        found = self._find(name, revision)
        if found is None:
            return
        repo, commit = found
        if repo.access == "gated" and self.token not in repo.readers:
            self._refuse(403 if self.token else 401, "GatedRepo", f"Access to model {name} is restricted.")
            return
        file = commit.files.get(path)
        if file is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
            return
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha}
        if file.sha256:
            linked = {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.sha256}"'}
            self._send(302, b"", headers | linked | {"Location": f"{self.hub.cdn}/blobs/{file.etag}"})
        else:
            self._send(307, b"", headers | {"Location": f"/api/resolve-cache/{file.etag}"})

    def _send_file(self, file: StoredFile, headers: dict[str, str]) -> None:
        self.served.file = file.name
        size = len(file.data)
        headers |= {"ETag": f'"{file.etag}"', "X-Repo-Commit": self._commit_of(file), "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or not self.hub.ranges:
            self._send(200, file.data, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        self.served.start = first
        if first > last:
            self._send(416, b"", headers | {"Content-Range": f"bytes */{size}"})
            return
        self._send(206, file.data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"})

    def _commit_of(self, file: StoredFile) -> str:
        commits = (commit for repo in self.hub.repos.values() for commit in repo.commits.values())
        return next(commit.sha for commit in commits if file in commit.files.values())

    # -------------------------------------------------------------------------------------------- answers

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] = {}) -> None:
        told = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), {**told, **headers})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        fault = self.fault
        if fault and fault.body is not None:
            body = fault.body
        self.served.status = status
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(body))} | dict(headers) | dict(fault.headers if fault else {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(body) if fault is None or fault.cut is None else min(fault.cut, len(body))
        for start in range(0, end, PIECE):
            piece = body[start : min(start + PIECE, end)]
            self.wfile.write(piece)
            self.served.nbytes += len(piece)
        if fault and fault.cut is not None:
            fault.happened.set()
            if fault.hold:
                fault.hold.wait(HANG_SECONDS)
            self.close_connection = True
