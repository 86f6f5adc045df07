"""One model that a recipe names by its id on the Hub and in another way."""

from __future__ import annotations

from typing import Any

import pytest

from mergeloom.engine.model.warnings import ModelWarningKind
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.io.hub.checkpoint import HubCheckpoint, companions, needed_files
from mergeloom.io.hub.download import download
from tests.support.hub.fixtures import ID


@pytest.mark.parametrize("revised", [False, True])
def test_an_id_and_its_snapshot_or_revision(model: HubCheckpoint, revised: bool) -> None:
    download((*needed_files(model, model.tensors.values()), *companions(model)))
    other = f"{ID}@main" if revised else str(model.path)
    models = [{"model": ID}, {"model": other}]
    recipe: dict[str, Any] = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    (finding,) = plan(recipe, Options(device="cpu", threads=1)).findings
    assert finding.kind is ModelWarningKind.DUPLICATE_MODEL
    assert str(finding).partition("models[1]: ")[2].startswith(f"{ID} and {other} are the same model, ")
    assert str(finding).endswith(", which therefore counts twice; use one name for it")
