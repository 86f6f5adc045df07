"""The text of the dry run before a merge, and of the summary after it."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mergeloom
from mergeloom.engine.cost.estimate import RATES
from mergeloom.engine.execute.tasks import LaneTime, Measured
from mergeloom.engine.graph.build import Unused
from mergeloom.engine.run.merge import Result
from mergeloom.engine.run.plan import Plan
from mergeloom.engine.run.session import Earlier
from mergeloom.io.units import data_size
from mergeloom.report import result as report_result
from mergeloom.report.plan import headline, plan_sections, plan_text
from mergeloom.report.result import bottleneck, result_sections, result_text
from mergeloom.report.sections import Section, plain, show
from mergeloom.report.unused import unused_lines
from tests.conftest import MakeModel
from tests.support import models


def linear(*paths: Path, **more: Any) -> dict[str, Any]:
    """Make a recipe for a mean."""
    return {"merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 1}} for p in paths], **more}


def stacked(path: Path, *ranges: list[int], **more: Any) -> dict[str, Any]:
    """Make a recipe for a stack of layers."""
    slices = [{"sources": [{"model": str(path), "layer_range": part}]} for part in ranges]
    return {"merge_method": "passthrough", "slices": slices, **more}


def line_of(text: str, label: str) -> str:
    """Return the line with this label."""
    return next(line for line in text.splitlines() if line.strip().startswith(label))


# ------------------------------------------------------------------------------------------------ the dry run


def test_a_plan_prints_as_the_dry_run(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    text = plan_text(plan)
    content = plan.to_dict()
    assert text == plan_text(plan)
    assert text.startswith("linear of 2 models: 4 layers")
    assert f"{content['output']['parameters']:,}" in line_of(text, "parameters")
    assert "no re-reads" in line_of(text, "reads")
    assert "38 by linear" in line_of(text, "tensors")
    assert "cpu" in line_of(text, "device")
    for name in "ab":
        assert str(llamas[name]) in text


def test_the_true_shape_of_a_120b_stack(make_model: MakeModel) -> None:
    """Llama-3-70B in seven slices of 20 layers: 140 layers, 121,892,970,496 parameters, of headers alone."""
    model = make_model("70b", models.llama_3_70b(), shard_bytes=10**10, fill=None)
    plan = mergeloom.plan(stacked(model, *([first, first + 20] for first in range(0, 70, 10))))
    text = plan_text(plan)
    assert headline(plan) == "passthrough of 1 model: 140 layers, 122B parameters, 244GB"
    assert "121,892,970,496 (122B)" in line_of(text, "parameters")
    assert "141GB, no re-reads" in line_of(text, "reads")
    assert "tensors are only copied" in line_of(text, "device")


def test_rereads_are_reported(make_model: MakeModel) -> None:
    tensors = {f"model.layers.{i}.w.weight": (2048, 2048) for i in range(2)}
    model = make_model("a", tensors, dtype="F32", fill=None)
    recipe = {
        "merge_method": "slerp",
        "base_model": str(model),
        "models": [{"model": str(model)}, {"model": str(make_model("b", tensors, dtype="F32", fill=None))}],
        "parameters": {"t": 0.5},
    }
    least = mergeloom.plan(recipe).schedule.minimum_ram
    plan = mergeloom.plan(recipe, max_ram=least + (4 << 20))
    assert plan.schedule.bytes_reread > 0
    assert "of re-reads" in line_of(plan_text(plan), "reads")


def test_the_base_is_marked_and_the_donor_named(llamas: dict[str, Path]) -> None:
    text = str(mergeloom.plan(linear(llamas["a"], llamas["base"], base_model=str(llamas["base"]))))
    assert f"{llamas['base']} (base)" in text
    assert str(llamas["base"]) in line_of(text, "config from")


def test_dropped_layers_are_one_line(make_model: MakeModel) -> None:
    plan = mergeloom.plan(stacked(make_model("a", models.tiny_llama(layers=8)), [0, 2], [5, 7]))
    assert [line.partition(": ")[2] for line in unused_lines(plan)] == ["layers 2-4, 7 (36 tensors): in no slice"]


def test_few_unused_tensors_are_named(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    name = str(llamas["a"])
    unused = (
        Unused(name, "no parameter", tuple(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3))),
        Unused(name, "left over", ("model.extra.weight",)),
        Unused(name, "stale.safetensors is not named by the index", ()),
    )
    other = replace(plan, built=replace(plan.built, unused=unused))
    assert unused_lines(other) == [
        f"{name}: model.layers.{{0-2}}.self_attn.rotary_emb.inv_freq: no parameter",
        f"{name}: model.extra.weight: left over",
        f"{name}: stale.safetensors is not named by the index",
    ]


def test_warnings_come_last(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"], parameters={"normalise": True}))
    last = plan_sections(plan)[-1]
    assert last.title == "Warnings"
    assert last.warns
    assert "did you mean `normalize`?" in last.lines[0]


def test_vram_is_shown_where_a_gpu_is_planned_for(llamas: dict[str, Path]) -> None:
    from mergeloom.engine.schedule.budget import Budget, DeviceBudget
    from mergeloom.engine.schedule.schedule import make_schedule

    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    budget = Budget(1 << 30, 200 << 20, (DeviceBudget("cuda:0", 1 << 30, 2),))
    text = str(replace(plan, schedule=make_schedule(plan.built.graph, budget)))
    assert "of 1GiB" in line_of(text, "peak VRAM")
    assert "iB" in line_of(text, "minimum VRAM")
    assert "to the GPU" in line_of(text, "uploads")
    assert "cuda:0" in line_of(text, "device")
    assert "VRAM" not in plan_text(plan)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Report a terminal."""
        return True


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(
    width: int, llamas: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    show(plan_sections(plan), stream)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert max(map(len, printed.splitlines())) <= width
    unwrapped = "".join(printed.split())
    for model in llamas["a"], llamas["b"]:
        assert model.name in unwrapped
    assert f"{plan.to_dict()['output']['parameters']:,}" in printed


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_label_has_a_line_of_its_own(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "weight of models/long/tune-7"
    sections = [Section("A", [("size", "1MB")]), Section("B", [("peak RAM", "2MiB"), (long, "0.5")])]
    lines = ["A", "  size      1MB", "", "B", "  peak RAM  2MiB", f"  {long}", "            0.5"]
    assert plain(sections) == "\n".join(lines)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    show(sections, stream)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert [line.rstrip() for line in printed.splitlines()] == lines


def test_a_dumb_terminal_gets_plain_lines(llamas: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    sections = plan_sections(mergeloom.plan(linear(llamas["a"], llamas["b"])))
    show(sections, stream)
    assert stream.getvalue() == plain(sections) + "\n"


def test_brackets_in_a_path_are_no_markup(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    stream = Terminal()
    plan = mergeloom.plan(stacked(make_model("[red]model[/red]:smile:"), [0, 2]))
    show(plan_sections(plan), stream)
    assert "[red]model[/red]:smile:" in stream.getvalue()


# ------------------------------------------------------------------------------------------------ the summary


def result_of(plan: Plan, **more: Any) -> Result:
    """Make the result of a merge that went as planned."""
    measured = Measured(
        bytes_read=plan.schedule.bytes_read,
        bytes_written=plan.schedule.bytes_written,
        seconds=10.0,
        lanes={"read": LaneTime(2, 18.0, 2.0), "compute": LaneTime(2, 4.0, 16.0), "write": LaneTime(1, 1.0, 9.0)},
    )
    return Result(plan=plan, out=Path("out"), measured=replace(measured, **more), peak_rss=100 << 20)


def test_the_summary_compares_measured_with_planned_values(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    text = result_text(result_of(plan))
    assert text.startswith("Merged into out")
    assert "10 s" in line_of(text, "time")
    assert "B/s" in line_of(text, "throughput")
    assert line_of(text, "read").endswith("as planned")
    assert "100MiB; planned" in line_of(text, "peak RAM")
    assert "a faster disk" in line_of(text, "bottleneck")
    assert "90%" in text
    other = result_text(result_of(plan, bytes_written=plan.schedule.bytes_written + 1))
    assert f"; planned {plan.schedule.bytes_written:,}" in line_of(other, "written")


def test_the_summary_has_no_rate_if_nothing_was_moved(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    earlier = Earlier(plan.schedule.bytes_read, plan.schedule.bytes_written)
    result = replace(result_of(plan, bytes_read=0, bytes_written=0, seconds=0.03, lanes={}), earlier=earlier)
    labels = [label for label, _ in result_sections(result)[0].fields]
    assert labels == ["time", "read", "written", "peak RAM"]
    assert "B/s" not in result_text(result)
    before = f", as planned; {data_size(earlier.bytes_written)} before this run"
    assert line_of(result_text(result), "written").endswith(before)


def test_the_summary_says_how_far_off_the_estimate_was(
    llamas: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]), device="cpu")
    result = result_of(plan)
    estimate = result.estimate
    assert estimate is not None
    assert estimate.rates.start == 0  # torch was loaded before the merge
    assert {getattr(estimate.rates, name).origin for name in RATES} == {"assumed"}
    for ratio, times in ((0.004, "0.004"), (1.234, "1.2"), (9.4, "9.4"), (123.4, "123"), (1e6, "1,000,000")):
        monkeypatch.setattr(report_result, "_MIN_SECONDS", 0.0)
        slower = result_of(plan, seconds=ratio * estimate.seconds)
        text = line_of(result_text(slower), "estimate")
        assert text.endswith(f"from assumed rates; the merge took {times} times as long")
    monkeypatch.undo()
    assert slower.to_dict()["measured"]["estimated_seconds"] == estimate.seconds
    assert "estimate " not in result_text(result_of(plan, seconds=1.0))  # too short


def test_no_estimate_of_a_resumed_merge(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]), device="cpu")
    resumed = replace(result_of(plan), earlier=Earlier(bytes_written=1))
    assert resumed.estimate is None
    assert "estimate " not in result_text(resumed)
    assert resumed.to_dict()["measured"]["estimated_seconds"] is None


def test_the_estimate_of_a_rehearsal_writes_nothing(llamas: dict[str, Path]) -> None:
    result = replace(result_of(mergeloom.plan(linear(llamas["a"], llamas["b"]), device="cpu")), out=None)
    assert result.estimate is not None
    assert {lane.name: lane.nbytes for lane in result.estimate.lanes}["write"] == 0


def test_reduced_vram_is_reported(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    text = result_text(result_of(plan, reduced_vram={"cuda:1": 3 << 30}))
    assert line_of(text, "VRAM reduced to").endswith("3GiB on cuda:1: another process used the rest")


def test_a_rehearsal_says_that_nothing_was_written(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    text = result_text(replace(result_of(plan), out=None))
    assert "nothing was written" in text
    assert line_of(text, "discarded")


def test_overflows_are_counted_by_tensor_worst_first(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    names = [output.name for output in plan.built.graph.outputs]
    counts = dict(zip(names, itertools.count(1)))
    text = result_text(result_of(plan, overflowed=counts))
    assert f"{names[-1]}: {len(names)} values too large for BF16" in text
    assert f"in {len(names) - 10} other tensors" in text
    assert names[0] not in text


@pytest.mark.parametrize(
    ("lane", "gpu", "says"),
    [
        ("read", False, "disk"),
        ("compute", False, "cores"),
        ("compute", True, "faster GPU"),
        ("upload", True, "bus"),
        ("download", True, "GPU"),
        ("write", False, "disk for OUT"),
    ],
)
def test_the_bottleneck_has_a_remedy(lane: str, gpu: bool, says: str) -> None:
    lanes = {name: LaneTime(2, 2.0, 18.0) for name in ("read", "upload", "compute", "download", "write")}
    lanes[lane] = LaneTime(2, 19.0, 1.0)
    assert says in bottleneck(Measured(seconds=10.0, lanes=lanes), gpu=gpu)
    assert "95%" in bottleneck(Measured(seconds=10.0, lanes=lanes), gpu=gpu)


def test_no_bottleneck() -> None:
    lanes = {"read": LaneTime(2, 6.0, 14.0), "write": LaneTime(1, 5.0, 5.0)}
    assert bottleneck(Measured(seconds=10.0, lanes=lanes)).startswith("none: the busiest lane, write")
    assert bottleneck(Measured(seconds=0.1, lanes=lanes)) == bottleneck(Measured()) == ""


def test_the_summary_of_a_short_merge_names_no_bottleneck(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    assert "bottleneck" not in result_text(result_of(plan, seconds=0.2))


def test_the_summary_of_a_resumed_merge_says_what_earlier_runs_did(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(linear(llamas["a"], llamas["b"]))
    read, written = plan.schedule.bytes_read, plan.schedule.bytes_written
    resumed = replace(
        result_of(plan, bytes_read=read - 2000, bytes_written=written - 1000), earlier=Earlier(2000, 1000)
    )
    text = result_text(resumed)
    assert line_of(text, "read").endswith(f"{data_size(read)}, as planned; 2KB before this run")
    assert line_of(text, "written").endswith(f"{data_size(written)}, as planned; 1KB before this run")
