"""23 stages in one recipe: the bytes of 23 merges, whether intermediates are kept or computed again."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mergeloom.engine.graph.fuse import fuse
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.schedule.traffic import bytes_of_reads
from mergeloom.report.plan import work_section
from tests.support.merges.resumable import interrupt, run
from tests.support.merges.small import make_blocks_small
from tests.support.models import FineTune, Random, tiny_llama, write_checkpoint
from tests.support.outputs import digests
from tests.support.tasks.stages import STAGES, stage, write_recipe

OPTIONS = Options(max_ram=8 << 30, device="cpu", shard_size=100_000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model and six fine-tunes."""
    directory, base = tmp_path_factory.mktemp("models"), Random(0)
    fills = {name: FineTune(base, seed) if seed else base for seed, name in enumerate(("base", *"abcdef"))}
    return {name: write_checkpoint(directory / name, tiny_llama(), fill=fill) for name, fill in fills.items()}


@pytest.fixture(scope="module")
def one_by_one(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the last of 23 merges, each of which reads the output of earlier ones."""
    directory = tmp_path_factory.mktemp("stages")
    made = dict(models)
    for number in range(1, len(STAGES) + 1):
        merge(stage(number, made), directory / str(number), OPTIONS)
        made[str(number)] = directory / str(number)
    return digests(directory / str(len(STAGES)), "*.safetensors")


@pytest.fixture(params=[False, True], ids=["kept", "computed again"])
def inline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether intermediate tensors are computed again for every use, as where RAM can't hold them."""
    monkeypatch.setattr("mergeloom.engine.graph.stages.fuse", partial(fuse, inline=request.param))
    return bool(request.param)


def test_the_bytes_are_those_of_23_merges(
    models: dict[str, Path], one_by_one: dict[str, str], tmp_path: Path, inline: bool
) -> None:
    planned = plan(write_recipe(tmp_path / "all.yml", models), OPTIONS)
    graph = planned.built.graph
    assert bool(graph.users()) is not inline
    result = merge(planned, tmp_path / "out")
    assert digests(tmp_path / "out", "*.safetensors") == one_by_one
    assert result.measured.bytes_read == planned.schedule.bytes_read == sum(bytes_of_reads(graph, planned.schedule))
    assert planned.schedule.bytes_reread == 0
    assert planned.schedule.bytes_read == sum(ref.nbytes for ref in graph.reads)
    assert "a" not in {Path(graph.models[model]).name for model in graph.read_models}


@pytest.mark.parametrize("inlined", [False, True])
def test_the_plan_names_the_methods_of_all_stages(models: dict[str, Path], tmp_path: Path, inlined: bool) -> None:
    planned = plan(write_recipe(tmp_path / "all.yml", models), OPTIONS)
    if inlined:
        planned = replace(planned, built=replace(planned.built, graph=planned.built.inlined))
    (made,) = {text for name, text in work_section(planned).fields if name == "tensors"}
    named = re.fullmatch(r"39 by (linear of ties of .+), in [\d,]+ steps", made)
    assert named is not None, made
    assert sorted(named[1].split(" of ")) == sorted({method for method, *_ in STAGES})


def test_a_merge_goes_on_without_the_intermediates_that_it_had_kept(
    models: dict[str, Path], one_by_one: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_blocks_small(monkeypatch)
    recipe, out = write_recipe(tmp_path / "all.yml", models), tmp_path / "out"
    interrupt(recipe, out, 5, OPTIONS)
    monkeypatch.setattr("mergeloom.engine.graph.stages.fuse", partial(fuse, inline=True))
    result = run(recipe, out, OPTIONS)
    assert result.earlier.bytes_written > 0
    assert digests(out, "*.safetensors") == one_by_one
