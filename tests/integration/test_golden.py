"""The output bytes of every golden merge are those of the version that wrote tests/golden.

A digest may change only with a changelog line that names the methods or the layout that changed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.golden import RECIPES, kernel_digests, merge_text, merges, read_golden, write_models

MERGES = merges()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that the golden merges read."""
    return write_models(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_writes_the_golden_bytes(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, folder, options = MERGES[name]
    monkeypatch.chdir(inputs / folder)
    assert merge_text(text, tmp_path, options) == read_golden("merges")[name]


def test_every_kernel_computes_the_golden_values() -> None:
    assert kernel_digests() == read_golden("kernels")


def test_the_golden_merges_are_those_on_record_and_use_every_method() -> None:
    assert read_golden("merges").keys() == MERGES.keys()
    documents = [document for text, _, _ in MERGES.values() for document in yaml.safe_load_all(text)]
    assert {document["merge_method"] for document in documents} == {file.stem for file in RECIPES.glob("methods/*.yml")}
