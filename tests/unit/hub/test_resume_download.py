"""Interrupted downloads resume: dropped connections, killed processes, damaged partial files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from mergeloom.errors import CheckpointError, DiskSpaceError, EnvironmentFailure
from mergeloom.io.hub import download as hub_download
from mergeloom.io.hub import http as hub_http
from mergeloom.io.hub.checkpoint import HubCheckpoint, needed_files, open_hub_model
from mergeloom.io.hub.download import DownloadProgress, download
from tests.support.hub.fixtures import ID, layer_files
from tests.support.hub.server import HubServer
from tests.support.waiting import HANG_SECONDS


def test_a_dropped_connection_resumes_automatically(hub: HubServer, model: HubCheckpoint, local: Path) -> None:
    files = layer_files(model, 4)[:1]
    for cut in (100_000, 0, 1, 300_000):
        hub.fail("GET /blobs/", cut=cut)
    download(files)
    assert files[0].path.read_bytes() == (local / files[0].name).read_bytes()
    assert [served.start for served in hub.log if served.cdn] == [0, 100_000, 100_000, 100_001, 400_001]
    assert hub.sent(r"\.safetensors$") == files[0].nbytes


def test_a_large_file_takes_several_requests(
    hub: HubServer, model: HubCheckpoint, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download, "_REQUEST_BYTES", 1_000_000)
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


def test_an_interrupted_download_resumes(hub: HubServer, model: HubCheckpoint, local: Path) -> None:
    files = layer_files(model, 4)[:1]
    fault = hub.fail("GET /blobs/", cut=700_000)
    then = hub.fail("GET /blobs/", times=hub_http.RETRIES, cut=0)
    with pytest.raises(EnvironmentFailure, match="run the same command again"):
        download(files)
    assert fault.times == then.times == 0
    assert not files[0].present
    assert files[0].to_fetch == files[0].nbytes - 700_000
    told: list[DownloadProgress] = []
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
def test_the_download_of_a_killed_process_resumes(
    hub: HubServer, local: Path, contents: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    hub.add(ID, contents)
    release = threading.Event()
    fault = hub.fail(r"GET /blobs/", times=0, cut=1_200_000, hold=release)
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    checkpoint = open_hub_model(ID)  # so the child's first range requests are for the data
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


def test_files_damaged_by_a_power_failure_are_fetched_again(hub: HubServer, model: HubCheckpoint, local: Path) -> None:
    (file,) = layer_files(model, 4)[:1]
    file.partial.parent.mkdir(parents=True, exist_ok=True)
    for nbytes in (5_000, file.nbytes, file.nbytes + 1):
        file.partial.write_bytes(bytes(nbytes))
        told: list[DownloadProgress] = []
        download([file], told.append)
        assert file.path.read_bytes() == (local / file.name).read_bytes()
        assert told[-1].bytes_done == told[-1].nbytes
        file.path.unlink()
        file.blob.unlink()


def test_a_file_with_another_hash_is_rejected(hub: HubServer, model: HubCheckpoint) -> None:
    (file,) = layer_files(model, 4)[:1]
    hub.fail("GET /blobs/", body=bytes(file.nbytes))
    with pytest.raises(CheckpointError, match="doesn't have the hash"):
        download([file])
    assert not file.present
    assert not file.partial.exists()
    download([file])
    assert file.present


def test_free_space_is_checked_first(hub: HubServer, model: HubCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    files = needed_files(model, model.tensors.values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1 << 20))
    with pytest.raises(DiskSpaceError, match=r"need 33.5MiB, but only 1MiB are free"):
        download(files)
    assert hub.log == []
