"""A model of the Hub is planned from its headers, downloaded as far as it is needed, and what goes wrong is said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

import mergeloom
from mergeloom.engine.execute.tasks import Progress
from mergeloom.engine.run import planning
from mergeloom.engine.run.finished import check_finished
from mergeloom.engine.run.merge import fetch
from mergeloom.errors import CheckpointError, DiskSpaceError, EnvironmentFailure, MergeloomError, UsageError
from mergeloom.io.companions import companion_files
from mergeloom.io.hub import download as hub_download
from mergeloom.io.hub import http as hub_http
from mergeloom.io.hub.checkpoint import HubCheckpoint, companions, needed_files, open_hub_model
from mergeloom.io.hub.download import Transfer, download
from mergeloom.io.hub.repository import HubFile, is_hub_id
from mergeloom.io.output.lock import classify
from mergeloom.io.safetensors.checkpoint import Checkpoint, open_checkpoint
from mergeloom.io.safetensors.dtypes import F32
from mergeloom.io.safetensors.header import build_header
from mergeloom.io.wording import data_size, plural
from tests.support import models
from tests.support.hub_server import HubServer, serving
from tests.support.waiting import HANG_SECONDS

ID = "acme/llama"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 36 MB in 14 shards, as its maker has it."""
    shape = models.tiny_llama(layers=12, hidden=384, vocabulary=2048)
    directory = models.write_checkpoint(tmp_path_factory.mktemp("hub") / "llama", shape, shard_bytes=3_000_000)
    (directory / "LICENSE").write_text("Apache-2.0")
    (directory / "README.md").write_text("# A model")
    return models.write_tokenizer(directory)


@pytest.fixture(scope="module")
def contents(local: Path) -> dict[str, bytes]:
    """Its files."""
    return {path.name: path.read_bytes() for path in local.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub without models, a user without a token, and an empty cache."""
    with serving() as server:
        close_session()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "hf" / "assets"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setattr(hub_http, "FIRST_WAIT", 0.001)
        yield server
        close_session()


@pytest.fixture
def model(hub: HubServer, contents: dict[str, bytes]) -> HubCheckpoint:
    """The model, opened; the log is empty again."""
    hub.add(ID, contents)
    checkpoint = open_hub_model(ID)
    assert isinstance(checkpoint, HubCheckpoint)
    hub.log.clear()
    return checkpoint


def single(*names: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file of float32 vectors of two elements."""
    return build_header([(name, F32, (2,)) for name in names], metadata or {}) + bytes(8 * len(names))


def index_of(weight_map: Mapping[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def refused(repo: str = ID, revision: str | None = None, error: type[MergeloomError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        open_hub_model(repo, revision)
    assert type(caught.value) is error
    assert not isinstance(caught.value.__context__, AssertionError)
    return str(caught.value)


def description(checkpoint: Checkpoint, root: Path) -> dict[str, Any]:
    """All that a checkpoint says, its files relative to `root`."""
    return {
        "tensors": [
            (name, str(ref.file.relative_to(root)), ref.offset, ref.nbytes, ref.dtype, ref.shape)
            for name, ref in checkpoint.tensors.items()
        ],
        "config": checkpoint.config,
        "metadata": dict(checkpoint.metadata),
        "files": [str(file.relative_to(root)) for file in checkpoint.files],
        "ignored": [str(file.relative_to(root)) for file in checkpoint.ignored],
        "remarks": checkpoint.remarks,
    }


def layer_files(checkpoint: Checkpoint, *layers: int) -> tuple[HubFile, ...]:
    used = [ref for name, ref in checkpoint.tensors.items() if any(f"layers.{layer}." in name for layer in layers)]
    return needed_files(checkpoint, used)


# ------------------------------------------------------------------------------------------- opening


def test_opening_transfers_less_than_a_hundredth(hub: HubServer, local: Path, contents: dict[str, bytes]) -> None:
    commit = hub.add(ID, contents)
    checkpoint = open_hub_model(ID)
    assert len(checkpoint.files) == 14
    whole = sum(ref.nbytes for ref in checkpoint.tensors.values())
    assert hub.sent() < whole / 100
    assert hub.sent(r"\.safetensors$") < whole / 300
    assert not {"README.md", "LICENSE", "tokenizer.json"} & hub.fetched()
    snapshot = Path(constants.HF_HUB_CACHE) / "models--acme--llama" / "snapshots" / commit.sha
    assert checkpoint.path == snapshot
    assert description(checkpoint, snapshot) == description(open_checkpoint(local), local)


LAYOUTS: dict[str, dict[str, bytes]] = {
    "single": {"model.safetensors": single("a", "b"), "other.safetensors": single("c")},
    "single of another name": {"weights.safetensors": single("a")},
    "united": {"b.safetensors": single("x", metadata={"made": "b"}), "a.safetensors": single("y")},
    "consolidated": {"a.safetensors": single("x"), "consolidated.safetensors": single("x")},
    "consolidated alone": {"consolidated.00.safetensors": single("x"), "original/model.safetensors": single("y")},
    "adapter": {"adapter_model.safetensors": single("x"), "config.json": b'{"a": 1}'},
    "index": {INDEX: index_of({"a": "1.safetensors", "b": "2.safetensors"}), "1.safetensors": single("a"),
              "2.safetensors": single("b", "unlisted"), "3.safetensors": single("stale")},
    "index of another name": {"x.safetensors.index.json": index_of({"a": "1.safetensors"}),
                              "1.safetensors": single("a")},
    "index into folders": {INDEX: index_of({"a": "./deep/1.safetensors", "b": "deep/1.safetensors"}),
                           "deep/1.safetensors": single("a", "b")},
    "index beside a single": {INDEX: index_of({"a": "1.safetensors"}), "1.safetensors": single("a"),
                              "model.safetensors": single("z")},
    "copies": {INDEX: index_of({"a": "2.safetensors", "b": "1.safetensors"}), "1.safetensors": single("a", "b"),
               "2.safetensors": single("a")},
    "several indexes": {"a.safetensors.index.json": b"{}", "b.safetensors.index.json": b"{}"},
    "pickles": {"pytorch_model.bin": b"PK", "config.json": b"{}"},
    "other formats": {"model.gguf": b"GGUF"},
    "nothing": {"README.md": b"#"},
    "missing shard": {INDEX: index_of({"a": "1.safetensors"})},
    "missing tensor": {INDEX: index_of({"a": "1.safetensors"}), "1.safetensors": single("b")},
    "two of a name": {"a.safetensors": single("x"), "b.safetensors": single("x")},
    "leaves": {INDEX: index_of({"a": "../1.safetensors"})},
    "damaged": {"model.safetensors": single("a")[:-1]},
    "empty": {"model.safetensors": b""},
    "no header": {"model.safetensors": b"<!doctype html><title>Sorry</title>"},
    "bad config": {"config.json": b"[", "model.safetensors": single("a")},
    "bad index": {INDEX: b"{}"},
}  # fmt: skip


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
def test_the_rules_are_those_of_a_directory(hub: HubServer, tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        file = tmp_path / "local" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    hub.add(ID, files)
    directory = tmp_path / "local"
    try:
        expected = description(open_checkpoint(directory), directory)
    except CheckpointError as error:
        found = refused()
        assert str(tmp_path) not in found
        said = str(error).replace(f"{directory}/", f"{ID}@main/").replace(str(directory), f"{ID}@main")
        if INDEX in files or "model.safetensors" in files or "a.safetensors" in files:
            assert found == said or "aren't in the repository" in found
        else:  # what there is to do is another thing for a repository
            assert found.replace("@main", "")[:40] == said.replace("@main", "")[:40]
    else:
        checkpoint = open_hub_model(ID)
        assert description(checkpoint, checkpoint.path) == expected


def test_a_header_longer_than_the_first_request(hub: HubServer) -> None:
    names = [f"tensor.{number:05}.{'x' * 40}" for number in range(1500)]
    hub.add(ID, {"model.safetensors": single(*names)})
    assert list(open_hub_model(ID).tensors) == names
    first, rest = [served for served in hub.log if served.cdn]
    assert (first.start, rest.start) == (0, first.nbytes)
    assert first.nbytes + rest.nbytes == len(single(*names)) - 8 * len(names)


def test_a_server_that_knows_no_ranges(hub: HubServer, local: Path, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents)
    hub.ranges = False
    checkpoint = open_hub_model(ID)
    assert list(checkpoint.tensors) == list(open_checkpoint(local).tensors)


def test_a_second_time_asks_for_the_commit_at_most(hub: HubServer, model: HubCheckpoint) -> None:
    again = open_hub_model(ID, "main")
    assert [served.target.partition("?")[0] for served in hub.log] == [f"/api/models/{ID}/revision/main"]
    hub.log.clear()
    by_commit = open_hub_model(ID, model.repository.commit)
    assert hub.log == []
    assert again.tensors == by_commit.tensors == model.tensors


def test_a_new_commit_is_seen_and_asks_only_for_what_it_changed(
    hub: HubServer, model: HubCheckpoint, contents: dict[str, bytes]
) -> None:
    files = dict(contents)
    changed = model.files[3].name
    files[changed] = files[changed][:-1] + b"\x01"
    hub.add(ID, files)
    newer = open_hub_model(ID)
    assert newer.path != model.path
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == {changed}
    assert isinstance(newer, HubCheckpoint)
    identities = [
        (old.name, model.identity(old) == newer.identity(new))
        for old, new in zip(model.files, newer.files, strict=True)
    ]
    assert [name for name, same in identities if not same] == [changed]
    assert re.fullmatch(r"[0-9a-f]{32}", model.identity(model.files[0]))


def test_revisions(hub: HubServer, local: Path) -> None:
    hub.add(ID, {"model.safetensors": single("old")}, revision="v1.0")
    hub.add(ID, {"model.safetensors": single("new")}, revision="refs/pr/1")
    assert list(open_hub_model(ID, "v1.0").tensors) == ["old"]
    assert list(open_hub_model(ID, "refs/pr/1").tensors) == ["new"]


def test_a_damaged_cache_is_fetched_anew(hub: HubServer, model: HubCheckpoint) -> None:
    assets = Path(constants.HF_ASSETS_CACHE)
    for kept in [path for path in assets.rglob("*") if path.is_file()]:
        kept.write_bytes(kept.read_bytes()[:-3])
    assert open_hub_model(ID, model.repository.commit).tensors == model.tensors


@pytest.mark.parametrize("text", ["gpt2", "meta-llama/Llama-3.1-8B", "a/b", "TheBloke/x_y.z"])
def test_ids(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["", ".", "./a", "../a", "/a", "~/a", "a/b/c", "a//b", "a/..", "a--b/c", "a b", "é/b", "a/"]
)
def test_what_is_no_id_is_never_asked_for(hub: HubServer, text: str) -> None:
    assert not is_hub_id(text)
    assert "no id" in refused(text)
    assert hub.log == []


# ------------------------------------------------------------------------------------------- downloading


def test_only_the_shards_of_the_layers_that_are_used(hub: HubServer, model: HubCheckpoint, local: Path) -> None:
    files = layer_files(model, 2, 3)
    assert 2 <= len(files) <= 4
    assert not any(file.present for file in files)
    assert [file.to_fetch for file in files] == [(local / file.name).stat().st_size for file in files]
    told: list[Transfer] = []
    download(files, told.append)
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == {file.name for file in files}
    nbytes = sum(file.nbytes for file in files)
    assert hub.sent(r"\.safetensors$") == nbytes
    assert told[-1] == Transfer(len(files), len(files), nbytes, nbytes)
    for file in files:
        assert file.present
        assert file.to_fetch == 0
        assert file.path.read_bytes() == (local / file.name).read_bytes()
    hub.log.clear()
    download(files, told.append)
    assert hub.log == []


def test_a_download_says_how_far_it_is(hub: HubServer, model: HubCheckpoint) -> None:
    files = layer_files(model, 2)
    said: list[str] = []
    told: list[Progress] = []
    fetch(files, said.append, told.append)
    nbytes = sum(file.nbytes for file in files)
    assert said == [f"downloading {plural(len(files), 'file')}, {data_size(nbytes)}"]
    assert told[-1] == Progress(bytes_read=nbytes)
    fetch([file for file in files if not file.present], said.append, told.append)
    assert len(said) == 1


def test_a_merge_of_two_layers_downloads_the_shards_that_hold_them(
    hub: HubServer, local: Path, contents: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "open_model", lambda reference: open_hub_model(reference.path, reference.revision))
    hub.add(ID, contents)
    sources = [{"model": ID, "layer_range": [2, 4]}]
    plan = mergeloom.plan({"merge_method": "passthrough", "slices": [{"sources": sources}]})
    checkpoint = plan.built.models[0].checkpoint
    files = needed_files(checkpoint, plan.built.graph.reads)
    weight_map = json.loads(contents[INDEX])["weight_map"]
    outside = {file for name, file in weight_map.items() if ".layers." not in name}
    assert {file.name for file in files} == {file.name for file in layer_files(checkpoint, 2, 3)} | outside
    assert len(files) < 8
    download([*files, *companions(checkpoint)])
    assert all(hub.sent(re.escape(file.name)) < 10_000 for file in set(layer_files(checkpoint, 8, 9)) - set(files))
    mergeloom.merge(plan, tmp_path / "out")
    monkeypatch.undo()
    sources[0]["model"] = str(local)
    mergeloom.merge({"merge_method": "passthrough", "slices": [{"sources": sources}]}, tmp_path / "expected")
    for file in (tmp_path / "expected").iterdir():
        if file.name not in ("README.md", "mergeloom.json"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_local_checkpoint_needs_no_files(local: Path) -> None:
    checkpoint = open_checkpoint(local)
    assert needed_files(checkpoint, checkpoint.tensors.values()) == ()
    assert companions(checkpoint) == ()


def test_the_cache_is_the_one_of_huggingface_hub(hub: HubServer, model: HubCheckpoint) -> None:
    files = layer_files(model, 0)
    download(files)
    hub.log.clear()
    name, commit = files[0].name, model.repository.commit
    assert try_to_load_from_cache(ID, name) == str(files[0].path)
    assert hf_hub_download(ID, name, revision=commit) == str(files[0].path)
    assert hf_hub_download(ID, "config.json", local_files_only=True) == str(model.path / "config.json")
    assert hub.log == []
    (repo,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert scan_cache_dir(constants.HF_HUB_CACHE).warnings == []
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (ID, commit, {"main"})
    assert {file.file_name for file in revision.files} == {"config.json", INDEX, *(file.name for file in files)}
    hf_hub_download(ID, name)
    assert hub.sent(r"\.safetensors$") == 0


def test_what_huggingface_hub_downloaded_is_used(hub: HubServer, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents)
    snapshot_download(ID)
    hub.log.clear()
    checkpoint = open_hub_model(ID)
    assert len(hub.log) == 1
    assert all(file.present for file in needed_files(checkpoint, checkpoint.tensors.values()))


def test_a_file_that_another_commit_brought_is_only_linked(
    hub: HubServer, model: HubCheckpoint, contents: dict[str, bytes]
) -> None:
    download(layer_files(model, 1))
    files = contents | {"config.json": b"{}"}
    hub.add(ID, files)
    newer = layer_files(open_hub_model(ID), 1)
    assert [(file.present, file.to_fetch) for file in newer] == [(False, 0)] * len(newer)
    hub.log.clear()
    download(newer)
    assert all(file.present for file in newer)
    assert hub.log == []


def test_without_links_the_files_themselves_are_there(
    model: HubCheckpoint, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)  # 1.0 has none
    files = layer_files(model, 1)
    download(files)
    for file in files:
        assert not file.path.is_symlink()
        assert file.path.read_bytes() == (local / file.name).read_bytes()


def test_companions_come_by_name_and_nothing_else(hub: HubServer, contents: dict[str, bytes]) -> None:
    files = contents | {
        "config.json": json.dumps({"auto_map": {"AutoModel": "modeling.Model"}}).encode(),
        "modeling.py": b"from .parts import x",
        "parts.py": b"x = 1",
        "optimizer.bin": b"x",
        "deep/down/config.json": b"{}",
    }
    hub.add(ID, files)
    checkpoint = open_hub_model(ID)
    hub.log.clear()
    download(companions(checkpoint))
    assert [file.path for file in companion_files(checkpoint.path)] == [
        "LICENSE", "generation_config.json", "modeling.py", "parts.py", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert hub.fetched() == {file.path for file in companion_files(checkpoint.path)}


# ------------------------------------------------------------------------------------------- interruptions


def test_a_dropped_connection_goes_on_by_itself(hub: HubServer, model: HubCheckpoint, local: Path) -> None:
    files = layer_files(model, 4)[:1]
    for cut in (100_000, 0, 1, 300_000):
        hub.fail("GET /blobs/", cut=cut)
    download(files)
    assert files[0].path.read_bytes() == (local / files[0].name).read_bytes()
    assert [served.start for served in hub.log if served.cdn] == [0, 100_000, 100_000, 100_001, 400_001]
    assert hub.sent(r"\.safetensors$") == files[0].nbytes


def test_a_large_file_comes_in_pieces(
    hub: HubServer, model: HubCheckpoint, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download, "_PIECE", 1_000_000)
    (file,) = layer_files(model, 4)[:1]
    hub.fail("GET /blobs/", cut=999_999)
    download([file])
    assert [served.start for served in hub.log if served.cdn] == [0, 999_999, 1_000_000, 2_000_000]
    assert file.path.read_bytes() == (local / file.name).read_bytes()


def test_two_downloads_of_a_file_wait_for_each_other(hub: HubServer, model: HubCheckpoint) -> None:
    files = layer_files(model, 4)
    first = threading.Thread(target=download, args=[files])
    first.start()
    download(files)
    first.join()
    assert hub.sent(r"\.safetensors$") == sum(file.nbytes for file in files)


def test_an_interrupted_download_goes_on_where_it_stopped(hub: HubServer, model: HubCheckpoint, local: Path) -> None:
    files = layer_files(model, 4)[:1]
    fault = hub.fail("GET /blobs/", cut=700_000)
    then = hub.fail("GET /blobs/", times=hub_http.RETRIES, cut=0)
    with pytest.raises(EnvironmentFailure, match="run the same command again"):
        download(files)
    assert fault.times == then.times == 0
    assert not files[0].present
    assert files[0].to_fetch == files[0].nbytes - 700_000
    told: list[Transfer] = []
    download(files, told.append)
    assert hub.sent(r"\.safetensors$") == files[0].nbytes
    assert told[-1].bytes_done == files[0].nbytes
    assert files[0].path.read_bytes() == (local / files[0].name).read_bytes()
    assert not files[0].partial.exists()


CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
from mergeloom.io.hub.checkpoint import needed_files, open_hub_model
from mergeloom.io.hub.download import download
checkpoint = open_hub_model("acme/llama")
download(needed_files(checkpoint, [ref for name, ref in checkpoint.tensors.items() if "layers.4." in name]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_goes_on_where_it_stopped(
    hub: HubServer, local: Path, contents: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    hub.add(ID, contents)
    release = threading.Event()
    fault = hub.fail(r"GET /blobs/", times=0, cut=1_200_000, hold=release)
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    checkpoint = open_hub_model(ID)  # so that the child's first range requests are for the data
    files = layer_files(checkpoint, 4)
    hub.log.clear()
    fault.times = len(files)
    child = subprocess.Popen([sys.executable, "-c", CHILD], env=environment, stderr=subprocess.PIPE)
    while not all(file.partial.exists() and file.partial.stat().st_size > 1_100_000 for file in files):
        assert child.poll() is None
        time.sleep(0.01)
    hub.fail(r"GET /blobs/", status=503, times=10**6)  # a child that learns of the signal late gets no further
    child.send_signal(number)
    release.set()
    child.communicate(timeout=HANG_SECONDS)
    hub.faults.clear()
    assert child.returncode != 0
    begun = {file.name: file.nbytes - file.to_fetch for file in files}
    assert all(1_100_000 < nbytes <= 1_200_000 for nbytes in begun.values())
    before = len(hub.log)
    download(files)
    later = [served for served in hub.log[before:] if served.cdn]
    assert {served.file: served.start for served in later} == begun
    for file in files:
        assert file.path.read_bytes() == (local / file.name).read_bytes()


def test_what_a_power_failure_left_is_fetched_anew(hub: HubServer, model: HubCheckpoint, local: Path) -> None:
    (file,) = layer_files(model, 4)[:1]
    file.partial.parent.mkdir(parents=True, exist_ok=True)
    for nbytes in (5_000, file.nbytes, file.nbytes + 1):
        file.partial.write_bytes(bytes(nbytes))
        told: list[Transfer] = []
        download([file], told.append)
        assert file.path.read_bytes() == (local / file.name).read_bytes()
        assert told[-1].bytes_done == told[-1].nbytes
        file.path.unlink()
        file.blob.unlink()


def test_a_file_that_is_not_what_was_listed(hub: HubServer, model: HubCheckpoint) -> None:
    (file,) = layer_files(model, 4)[:1]
    hub.fail("GET /blobs/", body=bytes(file.nbytes))
    with pytest.raises(CheckpointError, match="hasn't the hash"):
        download([file])
    assert not file.present
    assert not file.partial.exists()
    download([file])
    assert file.present


def test_a_full_disk_is_foreseen(hub: HubServer, model: HubCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    files = needed_files(model, model.tensors.values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1 << 20))
    with pytest.raises(DiskSpaceError, match=r"take 33.5MiB, and 1MiB are free"):
        download(files)
    assert hub.log == []


# ------------------------------------------------------------------------------------------- refusals


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
    assert "check its name; or it is private: log in with `hf auth login`" in refused()
    hub.tokens |= {"hf_mine"}
    hub.repos[ID].readers = {"hf_mine"}
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_mine\n")
    assert len(open_hub_model(ID).files) == 14


def test_a_bad_token(hub: HubServer, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, contents)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "the Hub refuses the token in HF_TOKEN" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_ünïcode")
    assert "characters that no token has" in refused()


@pytest.mark.parametrize("token", [None, "hf_mine"])
def test_no_such_model(hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    if token:
        hub.tokens.add(token)
        monkeypatch.setenv("HF_TOKEN", token)
    text = refused("acme/lama")
    assert "acme/lama@main: there is no such directory here, and no such model" in text
    assert ("your token may not see it" in text) == bool(token)


def test_no_such_revision(hub: HubServer, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents)
    assert "has no branch, tag or commit 'v9'" in refused(revision="v9")
    assert "has no branch, tag or commit" in refused(revision="0" * 40)
    for bad in ("../../x", "a//b", "", "a\\b", "/etc"):
        if bad:
            assert "git could have" in refused(revision=bad)


def test_a_file_that_vanished(hub: HubServer, model: HubCheckpoint) -> None:
    files = layer_files(model, 0)
    hub.repos[ID].commits[model.repository.commit].files.clear()
    with pytest.raises(CheckpointError, match="no such file at this revision"):
        download(files)


@pytest.mark.parametrize(
    ("status", "headers"), [(429, {"Retry-After": "0"}), (429, {"RateLimit": '"api";r=0;t=0'}), (503, {}), (408, {})]
)
def test_a_busy_hub_is_asked_again(
    hub: HubServer, contents: dict[str, bytes], status: int, headers: dict[str, str]
) -> None:
    hub.add(ID, contents)
    hub.fail("GET /api/models/", status=status, headers=headers, times=2)
    hub.fail("GET /.*/resolve/.*safetensors$", status=status, headers=headers, times=3)
    assert len(open_hub_model(ID).files) == 14


@pytest.mark.parametrize("headers", [{"Retry-After": "300"}, {"RateLimit": '"api";r=0;t=300'}])
def test_too_many_requests(hub: HubServer, contents: dict[str, bytes], headers: dict[str, str]) -> None:
    hub.add(ID, contents)
    hub.fail("GET /api/models/", status=429, headers=headers)
    text = refused(error=EnvironmentFailure)
    assert "asks for fewer requests (with a token, more are allowed)" in text
    assert "run the same command again in 300 seconds" in text
    assert len(hub.log) == 1


def test_the_wait_that_is_asked_for_is_kept(
    hub: HubServer, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return self.is_set()

    monkeypatch.setattr(hub_http._Patience.__init__, "__defaults__", (Stop(),))
    hub.add(ID, contents)
    hub.fail("GET /api/models/", status=429, headers={"Retry-After": "17"})
    open_hub_model(ID)
    assert waits == [17]


def test_a_hub_that_stays_broken(hub: HubServer, contents: dict[str, bytes]) -> None:
    hub.add(ID, contents)
    hub.fail("GET /api/models/", status=502, times=99)
    assert "fails with status 502: run the same command again later" in refused(error=EnvironmentFailure)
    assert len(hub.log) == hub_http.RETRIES + 1
    hub.faults.clear()
    hub.fail("GET /api/models/", cut=10, times=99)
    assert "the connection failed" in refused(error=EnvironmentFailure)
    hub.faults.clear()
    hub.fail("GET /api/models/", status=418)
    assert "answers with status 418" in refused(error=EnvironmentFailure)
    assert len(open_hub_model(ID).files) == 14


def test_no_network(hub: HubServer, model: HubCheckpoint) -> None:
    hub.close()
    close_session()
    assert "the connection failed" in refused(error=EnvironmentFailure)
    assert open_hub_model(ID, model.repository.commit).tensors == model.tensors


def test_an_endpoint_that_is_none(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
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
        text = refused(repo, revision)
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


# ------------------------------------------------------------------------------------------- hostile servers


@pytest.mark.parametrize(
    "listing",
    [b"", b"<html>", b"[]", b"{}", b'{"sha": "main", "siblings": []}', b'{"sha": 1, "siblings": []}', b"[" * 100_000],
)
def test_a_server_that_is_no_hub(hub: HubServer, listing: bytes) -> None:
    hub.add(ID, {}).alter = lambda document: listing
    assert re.search("doesn't answer (with JSON, )?as the Hub does", refused())


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
def test_names_never_leave_their_directory(hub: HubServer, tmp_path: Path, name: str) -> None:
    good = {"config.json": b"{}", "model.safetensors": single("a")}
    evil = [{"rfilename": name, "size": 2, "blobId": "a" * 40}, {"rfilename": 7}, 7]
    hub.add(ID, good).alter = lambda document: document | {"siblings": document["siblings"] + evil}
    checkpoint = open_hub_model(ID)
    assert isinstance(checkpoint, HubCheckpoint)
    assert set(checkpoint.repository.files) == set(good)


def test_another_commit_than_was_asked_for(hub: HubServer, contents: dict[str, bytes]) -> None:
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
def test_other_bytes_than_were_asked_for(hub: HubServer, headers: dict[str, str]) -> None:
    data = single("a")
    hub.add(ID, {"model.safetensors": data})
    hub.fail("GET /blobs/", headers={key: value.format(size=len(data)) for key, value in headers.items()})
    error = EnvironmentFailure if "Content-Encoding" in headers else CheckpointError
    assert re.search("the server sends something else|comes compressed", refused(error=error))


def test_redirects_without_end(hub: HubServer) -> None:
    hub.add(ID, {"model.safetensors": single("a")})
    hub.fail("GET /", times=99, status=302, headers={"Location": "/again"})
    assert "can't be asked" in refused(error=EnvironmentFailure)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_huge_files_where_small_ones_belong(hub: HubServer, name: str) -> None:
    def inflate(document: dict[str, Any]) -> dict[str, Any]:
        for entry in document["siblings"]:
            entry["size"] = 10**12 if entry["rfilename"] == name else entry["size"]
        return document

    files = {INDEX: index_of({"a": "1.safetensors"}), "1.safetensors": single("a"), "config.json": b"{}"}
    hub.add(ID, files).alter = inflate
    assert f"{ID}@main/{name}: has 1,000,000,000,000 bytes, where" in refused()


def test_headers_that_fill_the_memory(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeloom.io.hub import checkpoint as opening

    monkeypatch.setattr(opening, "MAX_HEADERS_BYTES", 100)
    hub.add(ID, {f"{number}.safetensors": single(str(number)) for number in range(3)})
    assert "which is the most that makes sense" in refused()


# ------------------------------------------------------------------------------------------- what is loaded


def test_a_plan_from_the_cache_loads_no_network_library(model: HubCheckpoint, tmp_path: Path) -> None:
    code = (
        "import sys; from mergeloom.io.hub.checkpoint import open_hub_model\n"
        f"assert len(open_hub_model({ID!r}, {model.repository.commit!r}).tensors) == {len(model.tensors)}\n"
        "print([name for name in sys.modules if name.startswith(('httpx', 'requests', 'huggingface_hub.utils'))])"
    )
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:1",
    }
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_files_come_from_models_of_the_hub(hub: HubServer, contents: dict[str, bytes], tmp_path: Path) -> None:
    small = models.write_tokenizer(models.write_checkpoint(tmp_path / "small", models.tiny_llama(layers=2), fill=1))
    named = {name: data for name, data in contents.items() if name != "generation_config.json"}
    hub.add(ID, {**{file.name: file.read_bytes() for file in small.iterdir()}, "LICENSE": b"ours"})
    hub.add("other/model", {**named, "config.json": (small / "config.json").read_bytes(), "LICENSE": b"theirs"})
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": ID}],
        "files_from": "other/model",
        "tokenizer_source": "other/model",
        "chat_template": "mistral",
    }
    planned = mergeloom.plan(recipe)
    assert "LICENSE" not in hub.fetched()
    mergeloom.merge(planned, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"theirs"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == contents["tokenizer.json"]
    assert "[INST]" in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert hub.sent(r"model-\d+-of-\d+\.safetensors") < sum(map(len, contents.values())) / 20  # headers, no weights


def test_a_finished_merge_is_checked_without_downloading(
    hub: HubServer, contents: dict[str, bytes], tmp_path: Path
) -> None:
    """A new commit has other files of the tokenizer, and none of its files is here: the Hub's hashes tell."""
    hub.add(ID, {**contents, "README.md": b"# First"})
    recipe = {"merge_method": "passthrough", "models": [{"model": ID}]}
    mergeloom.merge(recipe, tmp_path / "out")
    hub.add(ID, {**contents, "README.md": b"# Second"})
    planned = mergeloom.plan(recipe)
    hub.log.clear()
    assert "tensor data was not read" in check_finished(planned, classify(tmp_path / "out"))
    hub.add(ID, {**contents, "tokenizer.json": contents["tokenizer.json"] + b" "})
    planned = mergeloom.plan(recipe)
    with pytest.raises(
        UsageError, match=r"tokenizer\.json of the model that it comes from has changed; choose another"
    ):
        check_finished(planned, classify(tmp_path / "out"))
    hub.add(ID, {**contents, "chat_template.jinja": b"{{ messages }}"})
    planned = mergeloom.plan(recipe)
    with pytest.raises(UsageError, match=r"chat_template\.jinja is not in it and would be written now; choose another"):
        check_finished(planned, classify(tmp_path / "out"))
    assert not {"tokenizer.json", "chat_template.jinja", "LICENSE"} & hub.fetched()
    assert mergeloom.verify(tmp_path / "out").whole
