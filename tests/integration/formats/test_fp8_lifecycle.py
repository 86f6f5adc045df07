"""FP8 outputs through a merge's life: other machines, reflinks, resuming, verifying, and every report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mergeloom
from mergeloom.engine.cost.machine import parse_machine
from mergeloom.engine.run.placement import with_reflinks
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.report.html.page import make_page
from mergeloom.report.plan import plan_text
from tests.support.command_line import run as run_command
from tests.support.disks import file_system
from tests.support.merges.resumable import OPTIONS, interrupt, run
from tests.support.merges.small import make_blocks_small
from tests.support.merges.verified import flip, position_of
from tests.support.models import llama, quantized, write_checkpoint
from tests.support.outputs import digests, read_model
from tests.support.plans import linear, sliced

LLAMA = llama(layers=3, hidden=256, intermediate=256, heads=4, kv_heads=2, vocabulary=64)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_checkpoint(tmp_path / f"{seed}", LLAMA, fill=seed) for seed in (1, 2)]


def slerp(models: list[Path], **more: Any) -> dict[str, Any]:
    """A recipe with two passes, so codes are computed in the second."""
    named = [{"model": str(model)} for model in models]
    return {"merge_method": "slerp", "base_model": str(models[0]), "models": named, "parameters": {"t": 0.3}} | more


def test_a_resumed_merge_has_the_same_bytes(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another budget and other chunks, after several interruptions."""
    make_blocks_small(monkeypatch)
    recipe = slerp(models, out_dtype="fp8_blocks")
    run(recipe, tmp_path / "whole")
    for commits in (2, 4):
        records = interrupt(recipe, tmp_path / "out", commits)
        assert records
    smallest = plan(recipe, OPTIONS).schedule.minimum_ram
    run(recipe, tmp_path / "out", replace(OPTIONS, max_ram=smallest + (64 << 20), threads=2))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_changed_scale_is_found(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    mergeloom.merge(linear(*models, out_dtype="fp8_blocks"), out)
    assert verify(out).tensors == len(read_model(out))
    for ending in ("weight_scale_inv", "weight"):
        name = f"model.layers.1.mlp.up_proj.{ending}"
        flip(*position_of(out, name))
        (damage,) = verify(out).damaged
        assert f"tensor {name} in " in damage
        flip(*position_of(out, name))
    assert verify(out).whole


def test_a_plan_for_another_machine_has_the_same_output(models: list[Path]) -> None:
    """A GPU's chunks are larger, so its plan has other steps for the same codes and scales."""
    recipe = slerp(models, out_dtype="fp8_blocks")
    here = plan(recipe)
    there = plan(recipe, replace(here.options, machine=parse_machine("ram=64GiB,vram=24GiB,cores=16")))
    assert there.to_dict()["output"] == here.to_dict()["output"]
    assert there.to_dict()["quantized"] == here.to_dict()["quantized"]
    assert there.to_dict()["device"].startswith("cuda")


@pytest.mark.root
def test_codes_and_scales_of_a_stack_are_shared(tmp_path: Path) -> None:
    large = llama(layers=2, hidden=512, intermediate=2048, heads=4, kv_heads=2, vocabulary=64)
    plain = write_checkpoint(tmp_path / "plain", large, fill=1)
    with file_system(tmp_path, "xfs") as disk:
        model = disk / "model"
        mergeloom.merge(
            {"merge_method": "passthrough", "models": [{"model": str(plain)}], "out_dtype": "fp8_blocks"}, model
        )
        recipe = sliced((model, 0, 2), (model, 0, 2))
        planned = with_reflinks(plan(recipe), disk / "out")
        assert planned.bytes_shared > 0.9 * planned.output_dict()["bytes"]
        assert planned.bytes_shared + planned.bytes_written == planned.output_dict()["bytes"]
        result = mergeloom.merge(recipe, disk / "out")
        assert result.measured.bytes_shared == planned.bytes_shared
        found, stored = read_model(disk / "out"), read_model(model)
        for layer in range(4):
            for ending in ("weight", "weight_scale_inv"):
                made = found[f"model.layers.{layer}.mlp.down_proj.{ending}"]
                assert made.equal(stored[f"model.layers.{layer % 2}.mlp.down_proj.{ending}"])


def test_every_report_names_the_format_and_counts_values(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = plan(linear(*models, out_dtype="fp8_blocks"))
    values = sum(tensor.numel() for tensor in read_model(models[0]).values())
    assert planned.output_dict()["parameters"] == values
    text, page = plan_text(planned), make_page(planned)
    assert re.search(r"^  dtype +BF16, FP8 blocks$", text, re.MULTILINE)
    assert "BF16, FP8 blocks" in page
    assert "Output in other formats" in page
    mergeloom.merge(planned, out)
    card = (out / "README.md").read_text()
    assert "| dtype | FP8 blocks, bfloat16 |" in card
    assert f"| Parameters | {values:,} " in card
    inspected = mergeloom.inspect(out).to_dict()
    assert inspected["parameters"] == values
    assert "21 tensors in FP8 blocks" in run_command("inspect", out).stdout
    found = mergeloom.diff(out, models[0])
    formats = {tensor.name: tensor.formats for tensor in found.tensors}
    assert formats["model.layers.0.mlp.up_proj.weight"] == ("FP8 blocks", "")
    assert formats["lm_head.weight"] == ("", "")


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_plans_name_the_format_of_inputs_and_copies(tmp_path: Path, form: str) -> None:
    model, _ = quantized.write_pair(tmp_path, form, 1)
    copied = plan({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    (label,) = {value.format for value in mergeloom.inspect(model).values.values() if hasattr(value, "format")}
    assert f"BF16 ({label})" in plan_text(copied)
    assert copied.output_formats() == sorted(["BF16", label])
    mergeloom.merge(copied, tmp_path / "out")
    assert f"| dtype | {', '.join(sorted(['bfloat16', label]))} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("form", quantized.FORMATS)
@pytest.mark.parametrize("merged", [False, True], ids=["copied", "merged"])
def test_codes_and_scales_are_one_tensor_in_text_json_and_page(tmp_path: Path, form: str, merged: bool) -> None:
    """The number is that of the values' twin; the files' is counted in what is written."""
    pairs = [quantized.write_pair(tmp_path, form, seed) for seed in (1, 2)]
    models = [model for model, _ in pairs][: 2 if merged else 1]
    planned = plan(
        linear(*models) if merged else {"merge_method": "passthrough", "models": [{"model": str(models[0])}]}
    )
    mergeloom.merge(planned, tmp_path / "out")
    values, stored = len(read_model(pairs[0][1])), len(read_model(tmp_path / "out"))
    output = planned.to_dict()["output"]
    assert (output["tensors"], output["stored_tensors"]) == (values, stored)
    assert mergeloom.inspect(tmp_path / "out").to_dict()["tensors"] == values
    shown = f"{values} tensors ({stored} stored)" if stored != values else f"{values} tensors"
    text, page = plan_text(planned), make_page(planned)
    assert re.search(rf"^  parameters +[\d,]+ \(\S+\) in {re.escape(shown)}$", text, re.MULTILINE)
    assert f"{shown}, BF16" in page
    assert f": {values} tensors of " in repr(planned)
    (work,) = re.findall(r"^  tensors +(.*), in \d+ steps$", text, re.MULTILINE)
    assert sum(int(each.partition(" ")[0]) for each in work.split(", ")) == values
