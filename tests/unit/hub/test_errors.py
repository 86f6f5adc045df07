"""Errors of the Hub say what to do: gated models, bad tokens, missing revisions, rate limits, offline mode."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

from mergeloom import __main__
from mergeloom.errors import CheckpointError, EnvironmentFailure, HubUnreachable, ModelNotFound
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.hub import http as hub_http
from mergeloom.io.hub.checkpoint import HubCheckpoint, needed_files, open_hub_model
from mergeloom.io.hub.download import download
from tests.support.hub.fixtures import ID, description, layer_files, refused
from tests.support.hub.server import HubServer


def test_a_gated_model(hub: HubServer, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, contents)
    hub.repos[ID].access = "gated"
    text = refused()
    assert "is gated, and no token was found" in text
    assert f"accept its licence at {hub.url}/{ID}" in text
    assert "hf auth login" in text
    assert "HF_TOKEN" in text
    hub.tokens |= {"hf_stranger", "hf_friend"}
    hub.repos[ID].readers = {"hf_friend"}
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    text = refused()
    assert "your account may not read it" in text
    assert f"{hub.url}/{ID}" in text
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    checkpoint = open_hub_model(ID)
    download(layer_files(checkpoint, 0))
    assert all(served.authorization is None for served in hub.log if served.cdn)
    assert hub.log[-1].cdn
    assert any(served.authorization == "Bearer hf_friend" for served in hub.log)


def test_a_gated_model_whose_listing_hides_its_hashes(hub: HubServer, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents).alter = lambda listing: listing | {"siblings": [{"rfilename": "config.json"}]}
    assert "without its size and hash" in refused()
    hub.repos[ID].access = "gated"
    assert "is gated" in refused()


def test_a_private_model(hub: HubServer, contents: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(ID, contents)
    hub.repos[ID].access = "private"
    assert "check its name; or it is private: log in with `hf auth login`" in refused(error=ModelNotFound)
    hub.tokens |= {"hf_mine"}
    hub.repos[ID].readers = {"hf_mine"}
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_mine\n")
    assert len(open_hub_model(ID).files) == 14


def test_a_bad_token(hub: HubServer, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, contents)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "the Hub rejects the token in HF_TOKEN" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_ünïcode")
    assert "contains invalid characters" in refused()


@pytest.mark.parametrize("token", [None, "hf_mine"])
def test_no_such_model(hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    if token:
        hub.tokens.add(token)
        monkeypatch.setenv("HF_TOKEN", token)
    text = refused("acme/lama", error=ModelNotFound)
    assert "acme/lama: there is no such directory here, and no such model" in text
    assert ("your token has no access" in text) == bool(token)


def test_no_such_revision(hub: HubServer, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents)
    assert "has no branch, tag or commit 'v9'" in refused(revision="v9", error=ModelNotFound)
    assert "has no branch, tag or commit" in refused(revision="0" * 40, error=ModelNotFound)
    for bad in ("../../x", "a//b", "", "a\\b", "/etc"):
        if bad:
            assert "not a valid git branch, tag or commit" in refused(revision=bad, error=ModelNotFound)


def test_a_file_missing_on_the_hub(hub: HubServer, model: HubCheckpoint) -> None:
    files = layer_files(model, 0)
    hub.repos[ID].commits[model.repository.commit].files.clear()
    with pytest.raises(CheckpointError, match="no such file at this revision"):
        download(files)


@pytest.mark.parametrize(
    ("status", "headers"), [(429, {"Retry-After": "0"}), (429, {"RateLimit": '"api";r=0;t=0'}), (503, {}), (408, {})]
)
def test_a_busy_hub_is_retried(
    hub: HubServer, contents: dict[str, bytes], status: int, headers: dict[str, str]
) -> None:
    hub.add(ID, contents)
    hub.fail("GET /api/models/", status=status, headers=headers, times=2)
    hub.fail("GET /.*/resolve/.*safetensors$", status=status, headers=headers, times=3)
    assert len(open_hub_model(ID).files) == 14


def test_a_missing_directory_is_named_as_it_was_typed(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """`merged` is hardly a model of the Hub: whether the Hub answers changes neither the exit code nor the problem."""
    assert __main__.main(["inspect", "merged"]) == 4
    said = capsys.readouterr().err
    assert said.startswith("mergeloom: merged: there is no such directory here, and no such model at ")
    hub.fail("GET /api/models/", status=429, headers={"Retry-After": "300"})
    assert __main__.main(["inspect", "merged"]) == 4
    asked = "merged: there is no such directory here; the Hub can't be asked for a model of this name"
    assert capsys.readouterr().err == f"mergeloom: {asked}\n"
    hub.fail("GET /api/models/", status=429, headers={"Retry-After": "300"})
    assert __main__.main(["inspect", "acme/merged"]) == 5
    assert capsys.readouterr().err.startswith("mergeloom: acme/merged: there is no such directory here: check the path")


@pytest.mark.parametrize("headers", [{"Retry-After": "300"}, {"RateLimit": '"api";r=0;t=300'}])
def test_too_many_requests(hub: HubServer, contents: dict[str, bytes], headers: dict[str, str]) -> None:
    hub.add(ID, contents)
    hub.fail("GET /api/models/", status=429, headers=headers)
    text = refused(error=HubUnreachable)
    assert "too many requests (a token raises the limit)" in text
    assert "run the same command again in 300 seconds" in text
    assert len(hub.log) == 1


def test_the_requested_wait_is_respected(
    hub: HubServer, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return self.is_set()

    monkeypatch.setattr(hub_http._Retry.__init__, "__defaults__", (Stop(),))
    hub.add(ID, contents)
    hub.fail("GET /api/models/", status=429, headers={"Retry-After": "17"})
    open_hub_model(ID)
    assert waits == [17]


def test_a_hub_that_stays_broken(hub: HubServer, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents)
    hub.fail("GET /api/models/", status=502, times=99)
    assert "fails with status 502: run the same command again later" in refused(error=HubUnreachable)
    assert len(hub.log) == hub_http.RETRIES + 1
    hub.faults.clear()
    hub.fail("GET /api/models/", cut=10, times=99)
    assert "the connection failed" in refused(error=HubUnreachable)
    hub.faults.clear()
    hub.fail("GET /api/models/", status=418)
    assert "answers with status 418" in refused(error=EnvironmentFailure)
    assert len(open_hub_model(ID).files) == 14


def test_no_network(hub: HubServer, model: HubCheckpoint) -> None:
    hub.close()
    close_session()
    assert "the connection failed" in refused(error=HubUnreachable)
    assert open_hub_model(ID, model.repository.commit).tensors == model.tensors


def test_an_invalid_endpoint(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "hub.example")
    assert "HF_ENDPOINT" in refused(error=EnvironmentFailure)


def test_offline(hub: HubServer, model: HubCheckpoint, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = layer_files(model, 1)
    download(here)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", model.repository.commit):
        assert open_hub_model(ID, revision).tensors == model.tensors
    download(here)
    missing = [file for file in needed_files(model, model.tensors.values()) if not file.present]
    with pytest.raises(CheckpointError, match=r"isn't in the cache, and HF_HUB_OFFLINE"):
        download(missing)
    for repo, revision in (("acme/other", None), (ID, "0" * 40)):
        text = refused(repo, revision, ModelNotFound)
        assert "there is no such directory here, and as a model of the Hub it isn't in the cache" in text
    assert hub.log == []


def test_offline_with_what_another_program_downloaded(
    hub: HubServer, local: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, contents)
    snapshot = Path(snapshot_download(ID))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = open_hub_model(ID)
    assert description(checkpoint, snapshot) == description(open_checkpoint(local), local)
    assert needed_files(checkpoint, checkpoint.tensors.values()) == ()
