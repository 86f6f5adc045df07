"""OUT and the Hub: nothing is downloaded for an OUT that cannot take the merge."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from mergeloom import __main__
from mergeloom.engine.run import planning
from mergeloom.engine.run.merge import merge
from mergeloom.errors import EnvironmentFailure, UsageError
from mergeloom.io.hub.repository import HubFile
from mergeloom.io.output.lock import WORK, Content, classify
from tests.support.hub.fixtures import ID, contents, hub, local, model
from tests.support.hub.server import HubServer
from tests.support.merges.destinations import OPTIONS, in_use, interrupted, make, write_models, write_recipe

__all__ = ["contents", "hub", "local", "model"]  # fixtures


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Two models."""
    return write_models(tmp_path)


@pytest.fixture
def recipe(models: list[Path], tmp_path: Path) -> Path:
    """A recipe for the mean of two models."""
    return write_recipe(models, tmp_path)


# ------------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def remote(hub: HubServer, contents: dict[str, bytes], tmp_path: Path) -> Path:
    """A recipe of a model of the Hub."""
    hub.add(ID, contents)
    path = tmp_path / "remote.yml"
    sources = [{"model": ID, "layer_range": [0, 2]}]
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": [{"sources": sources}]}))
    return path


@pytest.mark.parametrize("kind", ["foreign", "a file", "in use"])
def test_nothing_is_asked_of_the_hub_where_out_cannot_be_used(
    kind: str,
    remote: Path,
    hub: HubServer,
    recipe: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    make(kind, recipe, out)
    with in_use(out) if kind == "in use" else nullcontext():
        for fresh in ([], ["--restart"]):
            assert __main__.main(["merge", str(remote), str(out), "--quiet", *fresh]) == (5 if kind == "in use" else 2)
        with pytest.raises((UsageError, EnvironmentFailure)):
            merge(remote, out, OPTIONS)
    assert hub.log == []


@pytest.mark.parametrize("kind", ["unfinished", "finished"])
def test_no_weights_are_downloaded_where_out_holds_another_merge(
    kind: str,
    remote: Path,
    hub: HubServer,
    recipe: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    make(kind, recipe, out)
    planning.plan(remote, OPTIONS)  # headers, which are kept
    hub.log.clear()
    assert __main__.main(["merge", str(remote), str(out), "--quiet"]) == 2
    assert hub.fetched() == set()


def test_nothing_is_downloaded_for_a_finished_merge(
    remote: Path,
    hub: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    out = tmp_path / "out"
    assert __main__.main(["merge", str(remote), str(out), "--quiet"]) == 0
    assert hub.sent(r"\.safetensors$") > 1_000_000
    shutil.rmtree(constants.HF_HUB_CACHE)
    planned = planning.plan(remote, OPTIONS)
    assert sum(file.to_fetch for file in planned.downloads) > 1_000_000
    hub.log.clear()
    assert __main__.main(["merge", str(remote), str(out)]) == 0
    assert "already complete" in capsys.readouterr().err
    assert merge(remote, out, OPTIONS).measured.bytes_written == 0
    assert hub.fetched() == set()


def test_out_is_locked_while_files_are_downloaded(remote: Path, hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    seen: list[tuple[Content, bool]] = []

    def download(files: list[HubFile]) -> None:
        seen.append((classify(out).content, sum(file.to_fetch for file in files) > 1_000_000))
        raise EnvironmentFailure("no network")

    with pytest.raises(EnvironmentFailure, match="no network"):
        merge(remote, out, OPTIONS, download=download)
    assert seen == [(Content.IN_USE, True)]
    assert not out.parent.exists()  # nothing was durable, so nothing is left


def test_an_unfinished_merge_is_discarded_only_once_the_new_inputs_are_there(
    remote: Path,
    hub: HubServer,
    recipe: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    interrupted(recipe, out)
    journal = (out / WORK / "journal").read_bytes()

    def download(files: list[HubFile]) -> None:
        raise EnvironmentFailure("no network")

    with pytest.raises(EnvironmentFailure, match="no network"):
        merge(remote, out, OPTIONS, fresh=True, download=download)
    assert (out / WORK / "journal").read_bytes() == journal
    merge(recipe, out, OPTIONS)
