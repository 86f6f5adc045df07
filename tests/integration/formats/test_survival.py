"""The report of what rounding keeps of the change from the base: independent of the plan, and equal to float64's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mergeloom.engine.execute.devices.base import Device
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.execute.survival import SurvivalSums, compared_nodes
from mergeloom.engine.run.merge import Result
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.errors import CheckpointError
from mergeloom.io.output.journal import read_journal
from mergeloom.io.output.lock import WORK, Content, classify
from mergeloom.io.reading import Reader
from mergeloom.report.plan import plan_sections
from mergeloom.report.result import result_text
from mergeloom.report.sections import plain
from tests.support import command_line
from tests.support.devices import CountingDevice
from tests.support.faults import Kill, Stopped, watching
from tests.support.merges.resumable import OPTIONS, run
from tests.support.merges.small import make_blocks_small
from tests.support.models import quantized
from tests.support.outputs import digests, read_model
from tests.support.survival.shares import bounded_share, decoded

FORMS = (
    *("fp8 blocks", "fp8 blocks, bf16 scales", "fp8 blocks, e8m0 scales", "fp8 blocks, byte scales"),
    *("fp8 rows", "fp8 rows, a list of scales"),
)


def recipe(models: list[Path], weight: float = 0.02, **more: Any) -> dict[str, Any]:
    """A small step from the first model toward the second one."""
    entries = [{"model": str(models[1]), "parameters": {"weight": weight}}]
    return {"merge_method": "task_arithmetic", "base_model": str(models[0]), "models": entries} | more


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Path, Path]]]:
    """For each format two models, each with the twin that stores its decoded values."""
    directory = tmp_path_factory.mktemp("models")
    return {form: [quantized.write_pair(directory, form, seed) for seed in (1, 2)] for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_shares_are_those_of_float64(
    form: str, dtype: str | None, pairs: dict[str, list[tuple[Path, Path]]], tmp_path: Path
) -> None:
    models, twins = zip(*pairs[form], strict=True)
    what = recipe(list(models)) | ({} if dtype is None else {"dtype": dtype})
    result = run(what, tmp_path / "out", replace(OPTIONS, survival=dtype is not None))
    base, other = (read_model(twin) for twin in twins)
    stored = decoded(read_model(tmp_path / "out"), None if "rows" in form else (32, 48))
    found = {each.tensor: each.share for each in result.shares}
    assert found.keys() == ({f"{module}.weight" for module in quantized.weights(1)} if dtype is None else base.keys())
    for name, share in found.items():
        wanted, bound = bounded_share(stored[name], base[name], other[name], 0.02)
        assert abs(share - wanted) <= bound, name
        assert bound < 1e-3
        assert share != 1


def test_groups_report_and_manifest(pairs: dict[str, list[tuple[Path, Path]]], tmp_path: Path) -> None:
    models = [model for model, _ in pairs["fp8 blocks"]]
    result = run(recipe(models, 0.001), tmp_path / "out", warn=(warned := []).append)
    written = result.to_dict()["measured"]["survival"]
    shares = {each.tensor: each for each in result.shares}
    assert written["tensors"] == {name: each.share for name, each in shares.items()}
    assert json.loads((tmp_path / "out" / "mergeloom.json").read_text())["survival"] == written["tensors"]
    assert verify(tmp_path / "out").whole
    for group, part in (("attention", "self_attn"), ("MLP", "mlp")):
        own = [each for name, each in shares.items() if part in name]
        wanted = float(np.sum([each.kept for each in own])) / float(np.sum([each.change for each in own]))
        assert written["groups"][group] == pytest.approx(wanted, rel=1e-12)
        assert f"{group} " in result_text(result)
    (warning,) = warned
    low = sorted(name for name, each in shares.items() if each.share < 0.5)
    assert low
    assert f"leaves less than half of the change from the base model in {len(low)} of 6 tensors" in warning
    for name in low:
        assert f"{{filter: {name.split('.', 3)[3].removesuffix('.weight')}, value: bfloat16}}" in warning
    assert "{value: same}]" in warning


def test_the_advice_is_followed(pairs: dict[str, list[tuple[Path, Path]]], tmp_path: Path) -> None:
    """The filter list of the warning leaves nothing to warn about, and takes as many bytes more as it says."""
    models = [model for model, _ in pairs["fp8 blocks"]]
    before = run(recipe(models, 0.001), tmp_path / "before", warn=(warned := []).append)
    low = [each for each in before.shares if each.share < 0.5]
    filters = dict.fromkeys(each.tensor.split(".", 3)[3].removesuffix(".weight") for each in before.shares)
    rules = [{"filter": name, "value": "bfloat16"} for name in filters if f"filter: {name}," in warned[0]]
    after = run(recipe(models, 0.001, out_dtype=[*rules, {"value": "same"}]), tmp_path / "after", warn=warned.append)
    assert len(warned) == 1
    assert {each.tensor for each in after.shares} < {each.tensor for each in before.shares}
    more = after.measured.bytes_written - before.measured.bytes_written
    assert more == sum(each.extra_bytes for each in before.shares if each.tensor not in _names(after))
    assert sum(each.extra_bytes for each in low) <= more


def _names(result: Result) -> set[str]:
    return {each.tensor for each in result.shares}


def test_strict_stops_before_anything_is_published(pairs: dict[str, list[tuple[Path, Path]]], tmp_path: Path) -> None:
    models, out = [model for model, _ in pairs["fp8 blocks"]], tmp_path / "out"
    for _ in range(2):  # the second run finds all sums in the journal
        with pytest.raises(CheckpointError, match=r"1 warning, which strict mode treats as errors:\n.*less than half"):
            run(recipe(models, 0.001), out, replace(OPTIONS, strict=True))
        assert not [path for path in out.iterdir() if path.name != WORK]
    with pytest.raises(CheckpointError, match="less than half"):
        run(recipe(models, 0.001), None, replace(OPTIONS, strict=True))
    result = run(recipe(models, 0.001), out)
    assert result.measured.bytes_read == 0
    assert result.shares == run(recipe(models, 0.001), tmp_path / "other").shares
    run(recipe(models, 0.5), tmp_path / "large", replace(OPTIONS, strict=True))


def test_what_has_no_base_or_no_change_has_no_share(pairs: dict[str, list[tuple[Path, Path]]], tmp_path: Path) -> None:
    models = [model for model, _ in pairs["fp8 blocks"]]
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    linear = {"merge_method": "linear", "models": entries}
    equal = Path(shutil.copytree(models[0], tmp_path / "equal"))
    for number, (what, survival) in enumerate([
        (linear, True),
        (linear | {"dtype": "bfloat16"}, True),
        (linear | {"dtype": "float32", "base_model": str(models[0])}, True),
        (recipe(models, dtype="bfloat16"), False),
        (recipe([models[0], equal], 0.5), True),
        (recipe(models, out_dtype="float32"), True),
    ]):  # fmt: skip
        out = tmp_path / f"out{number}"
        result = run(what, out, replace(OPTIONS, survival=survival))
        assert result.shares == ()
        assert result.to_dict()["measured"]["survival"] == {"groups": {}, "tensors": {}}
        assert "survival" not in json.loads((out / "mergeloom.json").read_text())
        assert "rounding" not in result_text(result)
    assert run(linear | {"base_model": str(models[0])}, tmp_path / "based").shares


def test_bytes_read_and_written_are_those_without_a_comparison(
    pairs: dict[str, list[tuple[Path, Path]]], tmp_path: Path
) -> None:
    models = [model for model, _ in pairs["fp8 blocks"]]
    plans = [plan(recipe(models, dtype="bfloat16"), replace(OPTIONS, survival=each)) for each in (False, True)]
    assert [each.compared for each in plans] == [0, 10]
    assert [each.to_dict()["outputs_compared"] for each in plans] == [0, 10]
    checks = "what rounding keeps of the change of 10 tensors, before the merge publishes"
    assert [checks in plain(plan_sections(each)) for each in plans] == [False, True]
    results = [run(each, tmp_path / str(number)) for number, each in enumerate(plans)]
    for result, planned in zip(results, plans, strict=True):
        assert result.measured.bytes_read == planned.bytes_read == plans[0].bytes_read
        assert result.measured.bytes_written == plans[0].bytes_written
    first, second = (digests(tmp_path / each) for each in "01")
    assert {name: first[name] for name in first if name != "mergeloom.json"} == {
        name: second[name] for name in second if name != "mergeloom.json"
    }


def test_the_command_line(pairs: dict[str, list[tuple[Path, Path]]], tmp_path: Path) -> None:
    models, out, report = [model for model, _ in pairs["fp8 blocks"]], tmp_path / "out", tmp_path / "report.json"
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe(models, 0.001)))
    assert "what rounding keeps of the change of 6 tensors" in command_line.run("plan", file, "--device", "cpu").stdout
    stopped = command_line.run("merge", file, out, "--device", "cpu", "--strict")
    assert stopped.returncode == 4
    assert "rounding to FP8 leaves less than half of the change" in stopped.stderr
    assert not (out / "config.json").exists()
    done = command_line.run("merge", file, out, "--device", "cpu", "--report", report)
    assert done.returncode == 0
    assert "warning: rounding to FP8 leaves less than half of the change" in done.stderr
    assert "Change from the base model that rounding to FP8 keeps" in done.stdout
    assert len(json.loads(report.read_text())["measured"]["survival"]["tensors"]) == 6
    wide = ("--set", "dtype=bfloat16", "--device", "cpu", "--no-output")
    assert "rounding to" not in command_line.run("merge", file, *wide).stdout
    found = command_line.run("merge", file, "--survival", *wide)
    assert "Change from the base model that rounding to bfloat16 keeps" in found.stdout


# --- interruptions and budgets ---------------------------------------------------------------------------------------


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_blocks_small(monkeypatch)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two models whose weights have several blocks of sums and several chunks."""
    monkeypatch.setattr(quantized, "HIDDEN", 640)
    monkeypatch.setattr(quantized, "INNER", 400)
    return [quantized.write_pair(tmp_path, "fp8 blocks", seed)[0] for seed in (1, 2)]


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "fp8": ({}, False),
    "mixed": ({"out_dtype": [{"filter": "mlp", "value": "bfloat16"}, {"value": "same"}]}, True),
    "slerp": ({"merge_method": "slerp", "parameters": {"t": 0.02}}, False),
}


def of_case(name: str, models: list[Path]) -> tuple[dict[str, Any], Options]:
    """A recipe, and options."""
    more, survival = CASES[name]
    what = recipe(models) | more
    if name == "slerp":
        what["models"] = [{"model": str(model)} for model in models]
    return what, replace(OPTIONS, survival=survival)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("_small_blocks")
def test_shares_do_not_depend_on_interruptions(
    case: str, large: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, threads and budgets differ in each run."""
    what, options = of_case(case, large)
    whole = run(what, tmp_path / "whole", options)
    assert len(whole.shares) == 6 + 4 * options.survival
    restarts = continued = 0
    while True:
        finished = classify(tmp_path / "out").content is Content.FINISHED  # and killed then: nothing is merged again
        monkeypatch.setattr("mergeloom.engine.schedule.schedule.SLOT_BYTES", (64, 1024, 128, 4096)[restarts % 4] << 10)
        varied = replace(options, threads=1 + restarts % 3, max_ram=(4 + restarts % 2) << 30)
        try:
            with watching(Kill(40 + 7 * restarts)):
                result = run(what, tmp_path / "out", varied)
        except Stopped:
            restarts += 1
            journal = read_journal(tmp_path / "out" / WORK / "journal")
            continued += journal is not None and any("sums" in record for record in journal.records)
        else:
            break
    assert restarts > 1
    assert continued > 0
    assert finished or result.shares == whole.shares
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")  # the manifest has the shares, too


@pytest.mark.parametrize("case", CASES)
def test_shares_do_not_depend_on_the_budget(
    case: str, large: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, options = of_case(case, large)
    whole = run(what, tmp_path / "whole", options)
    assert not whole.plan.built.graph.users()  # a base that is decoded is not kept for the comparison
    for number, slot in enumerate((64, 200, 4096)):
        monkeypatch.setattr("mergeloom.engine.schedule.schedule.SLOT_BYTES", slot << 10)
        minimum = plan(what, replace(options, threads=2)).schedule.minimum_ram
        varied = replace(options, threads=1 + number, max_ram=4 << 30 if number else minimum + (64 << 20))
        assert run(what, tmp_path / str(number), varied).shares == whole.shares
    assert run(what, None, options).shares == whole.shares


@pytest.mark.parametrize("case", CASES)
def test_a_device_with_its_own_memory_has_the_same_sums(case: str, large: list[Path]) -> None:
    """torch computes tiles of other sizes, on two simulated devices."""
    what, options = of_case(case, large)
    graph = plan(what, options).built.graph
    nodes = list(compared_nodes(graph))
    totals = []
    for vram, slot in ((None, 1 << 20), (64 << 20, 768 << 10), (64 << 20, 2 << 20)):
        budgets = tuple(DeviceBudget(f"test:{number}", vram, 1) for number in range(1 if vram is None else 2))
        devices: list[Device] = [CountingDevice(each.name, vram) if vram else CpuDevice(1) for each in budgets]
        schedule = make_schedule(graph, Budget(1 << 30, 0, budgets), slot_bytes=slot)
        sums = SurvivalSums(graph)
        reader = Reader()
        Executor(graph, schedule, devices, reader, NullSink(), survival=sums).run()
        reader.close()
        totals.append([sums.total(node) for node in nodes])
    assert len(nodes) == 6 + 4 * options.survival
    assert None not in totals[0]
    assert totals[1] == totals[2] == totals[0]


class NullSink:
    """A sink that drops everything."""

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Drop the data."""

    def finished(self, node: int) -> None:
        """Do nothing."""


@pytest.mark.usefixtures("_small_blocks")
def test_sums_that_the_journal_lacks_are_computed_again(large: list[Path], tmp_path: Path) -> None:
    """All bytes are durable, but the records of their sums are lost."""
    what, options = of_case("fp8", large)
    whole = run(what, tmp_path / "whole", options)
    with pytest.raises(CheckpointError, match="less than half"):
        run(recipe(large, 1e-4), tmp_path / "out", replace(options, strict=True))
    other = run(recipe(large, 1e-4), tmp_path / "other", options)
    journal = tmp_path / "out" / WORK / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if b'"sums"' not in line))
    result = run(recipe(large, 1e-4), tmp_path / "out", options)
    assert result.shares == other.shares != whole.shares
    assert result.measured.bytes_read > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


def test_a_base_that_is_damaged_afterwards_has_no_share(tmp_path: Path) -> None:
    """A value that is not finite gives no share, and no warning about rounding."""
    models = [quantized.write_pair(tmp_path, "fp8 blocks", seed)[0] for seed in (1, 2)]
    file = next(models[1].glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    tensors[name] = torch.full_like(tensors[name], float("inf"))
    save_file(tensors, file, {"format": "pt"})
    what = recipe(models, allow_nonfinite=True)
    result = run(what, tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.weight" not in {each.tensor for each in result.shares}
    assert len(result.shares) == 5
