"""Merges that are stored as FP8 blocks: codes and scales are computed, written, resumed and verified together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeloom.engine.cost.measure_compute import measure_node, node_groups
from mergeloom.engine.graph import build, stages
from mergeloom.engine.graph.build import BuiltGraph
from mergeloom.engine.graph.columns.outputs import Outputs
from mergeloom.engine.graph.encoding.blocks import BlockEncoders
from mergeloom.engine.graph.graph import Kind
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.methods.kernel.access import BlockRows
from mergeloom.report.explain import explain
from tests.support.faults import Kill, Stopped, watching
from tests.support.merges.resumable import OPTIONS, run
from tests.support.merges.small import make_blocks_small
from tests.support.methods.fp8_reference import reference
from tests.support.models import FineTune, Random, write_checkpoint
from tests.support.outputs import digests, read_model

SHAPES = {
    "model.embed_tokens.weight": (400, 130),
    **{f"model.layers.{layer}.mlp.up_proj.weight": (300, 96) for layer in range(2)},
    "model.layers.0.mlp.experts.gate_up_proj": (3, 70, 96),
    "model.layers.1.mlp.experts.gate_up_proj": (3, 70, 96),
    "model.norm.weight": (96,),
}
BLOCKS = BlockRows(32, 64)
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"parameters": {"t": 0.3}},
    "ties": {"parameters": {"density": 0.5, "weight": 0.6}},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_blocks_small(monkeypatch)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base model and a fine-tune."""
    return [
        write_checkpoint(tmp_path / name, SHAPES, dtype="F32", fill=FineTune(Random(0), seed))
        for seed, name in enumerate(("base", "a"))
    ]


@pytest.fixture(params=["F32", "BF16", "F8_E8M0", "U8"])
def scales(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Merges whose matrices are stored as FP8 blocks with scales of a dtype."""
    unpatched = build.build_graph

    def encoding(*args: Any, **options: Any) -> BuiltGraph:
        built = unpatched(*args, **options)
        graph, before = built.graph, list(built.graph.outputs)
        graph.outputs = Outputs()
        encoders = BlockEncoders(graph)
        for output in before:
            if len(graph.shape(output.node)) == 1 or graph.operation(output.node).kind is not Kind.MERGE:
                graph.add_output(output.name, output.node, output.group)
                continue
            codes, found = encoders.fp8(output.node, BLOCKS, DTYPES[request.param])
            assert encoders.fp8(output.node, BLOCKS, DTYPES[request.param]) == (codes, found)
            graph.add_output(output.name, codes, output.group)
            graph.add_output(f"{output.name}_scale_inv", found, output.group)
        return replace(built, graph=graph)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "build_graph", encoding)
        yield request.param


def recipe(models: list[Path], method: str) -> dict[str, Any]:
    """A merge of the two models in float32."""
    named = [{"model": str(model)} for model in models]
    base = {} if method == "linear" else {"base_model": str(models[0])}
    weight = {"parameters": {"weight": 0.5}} if method == "linear" else {}
    chosen = named if method != "ties" else named[1:]
    return {"merge_method": method, "models": chosen, "dtype": "float32", **base, **weight, **METHODS[method]}


def wanted(plain: dict[str, Tensor], kind: str) -> dict[str, bytes]:
    """The bytes of each tensor of a merge in float32 that is stored as blocks."""
    found: dict[str, bytes] = {}
    for name, values in plain.items():
        if values.ndim == 1:
            found[name] = values.contiguous().view(torch.uint8).numpy().tobytes()
        else:
            found[name], found[f"{name}_scale_inv"] = reference(values, kind, BLOCKS.rows, BLOCKS.columns)
    return found


def stored_bytes(out: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a model."""
    return {name: x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, x in read_model(out).items()}


@pytest.mark.parametrize("method", METHODS)
def test_codes_and_scales_are_those_of_the_merge_in_float32(
    method: str, models: list[Path], tmp_path: Path, scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stages, "build_graph", build.build_graph)
        run(recipe(models, method), tmp_path / "plain")
    expected = wanted(read_model(tmp_path / "plain"), scales)
    planned = plan(recipe(models, method), OPTIONS)
    assert planned.schedule.bytes_written == sum(map(len, expected.values()))
    result = run(planned, tmp_path / "out")
    assert result.measured.bytes_written == planned.schedule.bytes_written
    assert stored_bytes(tmp_path / "out") == expected
    tensors = read_model(tmp_path / "out")
    assert tensors["model.embed_tokens.weight_scale_inv"].shape == (13, 3)
    assert tensors["model.layers.0.mlp.experts.gate_up_proj_scale_inv"].shape == (3, 3, 2)
    verdict = verify(tmp_path / "out")
    assert verdict.whole
    assert verdict.tensors == len(expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_merge_has_the_same_bytes(
    method: str, models: list[Path], tmp_path: Path, scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, threads and budgets differ in each run."""
    what = recipe(models, method)
    run(what, tmp_path / "whole")
    restarts = 0
    said: list[str] = []
    while True:
        monkeypatch.setattr("mergeloom.engine.schedule.schedule.SLOT_BYTES", (64, 128, 4096, 1024)[restarts % 4] << 10)
        options = replace(OPTIONS, threads=1 + restarts % 3, max_ram=(4 + restarts % 2) << 30)
        try:
            with watching(Kill(40 + 4 * restarts)):
                run(what, tmp_path / "out", options, say=said.append)
        except Stopped:
            restarts += 1
        else:
            break
    assert restarts > 1
    assert any("already written and checked" in text for text in said)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_smallest_budget_is_enough(
    models: list[Path], tmp_path: Path, scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = recipe(models, "slerp")
    run(what, tmp_path / "whole")
    planned = plan(what, OPTIONS)
    smallest = planned.schedule.minimum_ram
    tight = plan(what, replace(OPTIONS, max_ram=smallest))
    assert tight.schedule.peak_ram <= smallest
    run(tight, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_speed_of_the_kernels_is_measured(models: list[Path], scales: str) -> None:
    planned = plan(recipe(models, "slerp"), OPTIONS)
    groups = node_groups(planned.workload)
    assert [group.method for group in groups] == ["FP8 encoding of slerp", "slerp"]
    assert all(measure_node(planned.workload, group.node, "cpu", 1) > 0 for group in groups)


def test_scales_are_explained_as_the_tensor_that_they_are_computed_with(models: list[Path], scales: str) -> None:
    planned = plan(recipe(models, "slerp"), Options(device="cpu"))
    codes, found = (explain(planned, f"model.layers.0.mlp.up_proj.weight{suffix}") for suffix in ("", "_scale_inv"))
    assert (found.shape, found.dtype) == ((10, 2), scales)
    assert found.how == "merge"
    assert (found.method, found.sources, found.passes, found.steps) == (
        codes.method,
        codes.sources,
        codes.passes,
        codes.steps,
    )
