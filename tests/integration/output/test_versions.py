"""An earlier version's finished OUT verifies, its unfinished one is refused; names of classes are not digested."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import mergeloom
from mergeloom.engine.graph import graph, layout
from mergeloom.engine.run.manifest import MANIFEST, facts_of
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.errors import UsageError
from mergeloom.io.output.journal import FORMAT, Journal, read_journal
from mergeloom.io.output.lock import WORK
from mergeloom.methods.kernel import composition, expression, kernel, language, method, signature, spec
from mergeloom.methods.kernel.reduction import reductions
from tests.support.models import FineTune, Random, write_checkpoint
from tests.support.outputs import digests
from tests.support.paths import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
"""For each version a finished OUT of a recipe, and an unfinished one; what reads them must not change them."""
VERSIONS = ["0.1.0"]
OPTIONS = Options(max_ram=4 << 30, device="cpu", threads=1)
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.w.weight": (8, 8),
    "model.layers.1.w.weight": (8, 8),
    "model.norm.weight": (8,),
}
NOW = f"mergeloom {mergeloom.__version__} (arithmetic version 4, layout version 1"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the models of the fixtures' recipes, which is the current one."""
    for seed, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, SHAPES, dtype="F32", fill=FineTune(Random(0), seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("version", VERSIONS)
def test_what_an_earlier_version_has_finished_still_verifies(version: str, here: Path) -> None:
    shutil.copytree(FIXTURES / f"out-{version}", here / "out")
    assert json.loads((here / "out" / MANIFEST).read_text())["mergeloom"] == version
    verdict = verify(here / "out", sources=True)
    assert verdict.whole
    assert verdict.tensors == len(SHAPES)
    shard = next((here / "out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert len(verify(here / "out").damaged) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_what_an_earlier_version_has_begun_is_refused_with_both_versions(version: str, here: Path) -> None:
    shutil.copytree(FIXTURES / f"out-{version}-unfinished", here / "out")
    before = digests(here / "out")
    with pytest.raises(UsageError) as refused:
        merge(FIXTURES / f"out-{version}.yml", "out", OPTIONS)
    assert refused.value.exit_code == 2
    assert f"an unfinished merge started by mergeloom {version} (layout version 1, journal format 2)" in str(
        refused.value
    )
    assert f"and this is {NOW}, journal format {FORMAT}): finish it with that version" in str(refused.value)
    assert digests(here / "out").keys() == before.keys()
    assert all(digests(here / "out")[name] == found for name, found in before.items() if not name.endswith("pid"))
    merge(FIXTURES / f"out-{version}.yml", "out", OPTIONS, fresh=True)
    merge(FIXTURES / f"out-{version}.yml", "new", OPTIONS)
    assert digests(here / "out", "*.safetensors") == digests(here / "new", "*.safetensors")
    # the earlier version's arithmetic draws other masks
    assert digests(here / "new", "*.safetensors") != digests(FIXTURES / f"out-{version}", "*.safetensors")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_out_that_an_earlier_version_has_finished_is_not_taken_for_this_merge(version: str, here: Path) -> None:
    shutil.copytree(FIXTURES / f"out-{version}", here / "out")
    with pytest.raises(
        UsageError, match=rf"a finished merge made by mergeloom {version} .* this is mergeloom"
    ) as refused:
        merge(FIXTURES / f"out-{version}.yml", "out", OPTIONS)
    assert refused.value.exit_code == 2
    assert digests(here / "out") == digests(FIXTURES / f"out-{version}")


@pytest.mark.parametrize("key", ["mergeloom", "arithmetic", "layout", "format"])
def test_each_version_counts(key: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FIXTURES / "out-0.1.0.yml"

    class Stop(BaseException):
        pass

    def stop(*arguments: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("mergeloom.engine.run.session.write_model_files", stop)
        with pytest.raises(Stop):
            merge(recipe, "out", OPTIONS)
    journal = here / "out" / WORK / "journal"
    found = read_journal(journal)
    assert found is not None
    other: dict[str, Any] = {"mergeloom": "0.3.0", "arithmetic": 7, "layout": 7, "format": 7}
    if key == "format":
        monkeypatch.setattr("mergeloom.io.output.journal.FORMAT", 7)
    Journal(journal, {**found.facts, key: other[key]}, found.records).close()
    with pytest.raises(UsageError, match=f"started by mergeloom .*{other[key]}.*, and this is mergeloom "):
        merge(recipe, "out", OPTIONS)


# ------------------------------------------------------------------------------------------------ the digest


def outputs_digest(*, options: Options = OPTIONS) -> Any:
    """The digest of the fixtures' recipe, which fuses two stages, in `here`."""
    planned = plan(FIXTURES / "out-0.1.0.yml", options)
    assert any(isinstance(each.kernel, composition.Composition) for each in planned.built.graph.operations)
    return facts_of(planned)["outputs"]


def test_the_digest_of_a_recipe_stays_the_same(here: Path) -> None:
    # Where it changes, no unfinished merge can be resumed: raise `io.journal.FORMAT` with it.
    assert outputs_digest() == "874961ea27d1e8ada3f9ebcb51855887"


def test_renaming_a_class_changes_no_digest(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = outputs_digest()
    classes = [
        spec.InputSpec, kernel.Kernel, method.Method, signature.Parameter, spec.Base, spec.Unit, language.Inputs,
        expression.Node, expression.Trace, expression.HostCall, reductions.Sum, reductions.Selection,
        composition.Composition, composition.Part, graph.Kind, graph.Operation, graph.Output, graph.MergeGraph,
        layout.Layout,
    ]  # fmt: skip
    names = {each: (each.__name__, each.__qualname__) for each in classes}
    assert len(names) > 14
    try:
        for each in names:
            each.__name__ = each.__qualname__ = "Renamed"  # monkeypatch would try to delete them
            monkeypatch.setattr(each, "__repr__", lambda self: "renamed")
        for kind in (graph.Kind, spec.Base, spec.Unit):
            monkeypatch.setattr(kind, "name", "renamed", raising=False)
            for member in kind:
                monkeypatch.setattr(member, "_value_", "renamed")
        assert outputs_digest() == before
    finally:
        for each, (name, qualified) in names.items():
            each.__name__, each.__qualname__ = name, qualified


def test_what_changes_the_output_changes_the_digest(here: Path) -> None:
    text = (FIXTURES / "out-0.1.0.yml").read_text()
    changes = {
        "same": ("", ""),
        "comment": ("# The models", "# Models"),
        "outer weight": ("weight: 0.5, density: 0.5}\n  - model: b", "weight: 0.25, density: 0.5}\n  - model: b"),
        "inner weight": ("weight: 0.75", "weight: 0.7"),
        "method": ("dare_ties", "dare_linear"),
        "inner method": ("merge_method: linear", "merge_method: linear\nparameters: {normalize: false}"),
        "inner rounding": ("merge_method: linear", "merge_method: linear\nout_dtype: bfloat16"),
        "dtype": ("base_model: base", "base_model: base\ndtype: bfloat16"),
        "source": ("- model: a", "- model: base"),
    }
    found = {}
    for name, (old, new) in changes.items():
        file = here / "recipe.yml"
        file.write_text(text.replace(old, new, 1))
        assert old in text
        found[name] = facts_of(plan(file, OPTIONS))["outputs"]
    assert found.pop("comment") == found["same"]
    assert len(set(found.values())) == len(found)
    assert outputs_digest(options=Options(max_ram=4 << 30, device="cpu", threads=1, seed=1)) != found["same"]
