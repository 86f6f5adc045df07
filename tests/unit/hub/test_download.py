"""Downloads fetch only the missing files, into huggingface_hub's cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache

import mergeloom
from mergeloom.engine.execute.measurements import Progress
from mergeloom.engine.run import planning
from mergeloom.engine.run.merge import fetch
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.companions import companion_files
from mergeloom.io.hub.checkpoint import HubCheckpoint, companions, needed_files, open_hub_model
from mergeloom.io.hub.download import DownloadProgress, download
from mergeloom.io.units import data_size, plural
from tests.support.hub.fixtures import ID, INDEX, layer_files
from tests.support.hub.server import HubServer


def test_only_the_shards_of_the_layers_that_are_used(hub: HubServer, model: HubCheckpoint, local: Path) -> None:
    files = layer_files(model, 2, 3)
    assert 2 <= len(files) <= 4
    assert not any(file.present for file in files)
    assert [file.to_fetch for file in files] == [(local / file.name).stat().st_size for file in files]
    told: list[DownloadProgress] = []
    download(files, told.append)
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == {file.name for file in files}
    nbytes = sum(file.nbytes for file in files)
    assert hub.sent(r"\.safetensors$") == nbytes
    assert told[-1] == DownloadProgress(len(files), len(files), nbytes, nbytes)
    for file in files:
        assert file.present
        assert file.to_fetch == 0
        assert file.path.read_bytes() == (local / file.name).read_bytes()
    hub.log.clear()
    download(files, told.append)
    assert hub.log == []


def test_a_download_reports_its_progress(hub: HubServer, model: HubCheckpoint) -> None:
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
    monkeypatch.setattr(planning, "open_input", lambda _, reference: open_hub_model(reference.path, reference.revision))
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
        if file.name not in ("README.md", "mergekit_config.yml", "mergeloom.json"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_local_checkpoint_needs_no_files(local: Path) -> None:
    checkpoint = open_checkpoint(local)
    assert needed_files(checkpoint, checkpoint.tensors.values()) == ()
    assert companions(checkpoint) == ()


def test_huggingface_hub_finds_the_downloaded_files(hub: HubServer, model: HubCheckpoint) -> None:
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


def test_files_that_huggingface_hub_downloaded_are_used(hub: HubServer, contents: dict[str, bytes]) -> None:
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


def test_files_are_moved_where_links_are_disabled(
    model: HubCheckpoint, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)  # 1.0 has none
    files = layer_files(model, 1)
    download(files)
    for file in files:
        assert not file.path.is_symlink()
        assert file.path.read_bytes() == (local / file.name).read_bytes()


def test_only_companions_are_downloaded(hub: HubServer, contents: dict[str, bytes]) -> None:
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
