"""Stacks of layers to merge, and checks that hold whether their bytes are reflinked, copied or computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.merge import Result, merge
from mergeloom.engine.run.plan import Options
from mergeloom.io import platform
from tests.support.models import tiny_llama
from tests.support.outputs import digests
from tests.support.plans import ROOMY, sliced

WITHOUT = ({"clone"}, {"clone", "copy_file_range"})
MODEL = tiny_llama(layers=8, hidden=256, vocabulary=2048)
"""12 MB in bfloat16, 1.2 MB a layer."""


def stacked(disk: Path, **more: object) -> dict[str, object]:
    """A recipe as of a frankenmerge: windows of two models, in which most layers are used twice."""
    return sliced((disk / "a", 0, 5), (disk / "b", 2, 6), (disk / "a", 3, 8), **more)


def mixed(disk: Path) -> dict[str, Any]:
    """Layers that are passed through, layers that are computed, and layers of which some tensors are."""
    recipe = stacked(disk)
    slices: Any = recipe["slices"]
    slices[1]["sources"][0]["parameters"] = {"scale": 0.5}
    slices[2]["sources"][0]["parameters"] = {"scale": [{"filter": "down_proj", "value": 0}, {"value": 1}]}
    return recipe


def weights(out: Path) -> dict[str, str]:
    """The digests of every file but the manifest, which records how each tensor can be verified."""
    return {name: digest for name, digest in digests(out).items() if name != "mergeloom.json"}


def same_as_by_lanes(recipe: Any, out: Path, work: Path, options: Options = ROOMY) -> None:
    """Assert that a merge's files equal those of a merge whose bytes all go through the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "DISABLED", {"clone", "copy_file_range"})
        merge(recipe, work / "by lanes", options)
    assert weights(out) == weights(work / "by lanes")
    shutil.rmtree(work / "by lanes")


def as_planned(result: Result) -> None:
    """Assert that the measured bytes equal the planned bytes."""
    plan, measured = result.plan, result.measured
    assert measured.bytes_read == plan.bytes_read
    assert measured.bytes_written == plan.bytes_written
    assert measured.bytes_shared == plan.bytes_shared
