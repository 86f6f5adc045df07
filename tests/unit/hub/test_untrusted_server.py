"""Answers of a broken or malicious server are rejected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mergeloom.errors import CheckpointError, EnvironmentFailure
from mergeloom.io.hub.checkpoint import HubCheckpoint, open_hub_model
from tests.support.hub.fixtures import ID, INDEX, index_of, refused, single
from tests.support.hub.server import HubServer


@pytest.mark.parametrize(
    "listing",
    [b"", b"<html>", b"[]", b"{}", b'{"sha": "main", "siblings": []}', b'{"sha": 1, "siblings": []}', b"[" * 100_000],
)
def test_a_server_that_is_not_a_hub(hub: HubServer, listing: bytes) -> None:
    hub.add(ID, {}).alter = lambda document: listing
    assert "is not a valid Hub API" in refused()


@pytest.mark.parametrize(
    "sibling",
    [
        {"size": -1}, {"size": 1 << 60}, {"size": "1"}, {"size": True}, {"size": None}, {"blobId": "../../x"},
        {"blobId": None}, {"blobId": ["a"]}, {"lfs": {"size": 8, "sha256": "../x"}},
    ],
)  # fmt: skip
def test_sizes_and_hashes_are_checked(hub: HubServer, sibling: dict[str, Any]) -> None:
    entry = {"rfilename": "model.safetensors", "size": 8, "blobId": "a" * 40} | sibling
    hub.add(ID, {}).alter = lambda document: document | {"siblings": [entry]}
    assert "without its size and hash" in refused()


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/passwd",
        "a/../../b",
        "..\\x",
        "C:\\x",
        "c:x",
        "a\0b",
        "a\nb",
        "x" * 300,
        "",
        "./a",
        "a//b",
    ],
)
def test_names_that_lead_out_of_their_directory_are_ignored(hub: HubServer, tmp_path: Path, name: str) -> None:
    good = {"config.json": b"{}", "model.safetensors": single("a")}
    evil = [{"rfilename": name, "size": 2, "blobId": "a" * 40}, {"rfilename": 7}, 7]
    hub.add(ID, good).alter = lambda document: document | {"siblings": document["siblings"] + evil}
    checkpoint = open_hub_model(ID)
    assert isinstance(checkpoint, HubCheckpoint)
    assert set(checkpoint.repository.files) == set(good)


def test_an_answer_for_another_commit(hub: HubServer, contents: dict[str, bytes]) -> None:
    commit = hub.add(ID, contents)
    commit.alter = lambda document: document | {"sha": "f" * 40}
    assert f"answers with commit {'f' * 40} instead" in refused(revision=commit.sha)


def test_an_endless_listing(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeloom.io.hub import repository as hub_files

    monkeypatch.setattr(hub_files, "MAX_LISTING_BYTES", 1000)
    hub.add(ID, {}).alter = lambda document: b'{"sha": "' + b"0" * 10_000_000
    assert "more than 1,000 bytes" in refused()


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 0-7/99"}, {"Content-Range": "bytes 5-9/{size}"}, {"Content-Range": "nonsense"},
        {"Content-Encoding": "gzip"},
    ],
)  # fmt: skip
def test_an_answer_for_other_bytes(hub: HubServer, headers: dict[str, str]) -> None:
    data = single("a")
    hub.add(ID, {"model.safetensors": data})
    hub.fail("GET /blobs/", headers={key: value.format(size=len(data)) for key, value in headers.items()})
    error = EnvironmentFailure if "Content-Encoding" in headers else CheckpointError
    assert re.search("the server sends something else|is compressed", refused(error=error))


def test_endless_redirects(hub: HubServer) -> None:
    hub.add(ID, {"model.safetensors": single("a")})
    hub.fail("GET /", times=99, status=302, headers={"Location": "/again"})
    assert "is not usable" in refused(error=EnvironmentFailure)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_huge_files_where_small_ones_belong(hub: HubServer, name: str) -> None:
    def inflate(document: dict[str, Any]) -> dict[str, Any]:
        for entry in document["siblings"]:
            entry["size"] = 10**12 if entry["rfilename"] == name else entry["size"]
        return document

    files = {INDEX: index_of({"a": "1.safetensors"}), "1.safetensors": single("a"), "config.json": b"{}"}
    hub.add(ID, files).alter = inflate
    assert f"{ID}@main/{name}: has 1,000,000,000,000 bytes, more than the limit" in refused()


def test_the_total_size_of_headers_is_limited(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeloom.io.hub import checkpoint as opening

    monkeypatch.setattr(opening, "MAX_HEADERS_BYTES", 100)
    hub.add(ID, {f"{number}.safetensors": single(str(number)) for number in range(3)})
    assert "exceed the limit of 100 bytes" in refused()
