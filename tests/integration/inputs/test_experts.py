"""Merges of models that store experts fused and separately equal the merges of models in one layout, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mergeloom
from mergeloom.engine.run.planning import plan
from mergeloom.engine.schedule.traffic import bytes_of_reads
from mergeloom.errors import CheckpointError
from mergeloom.io.tensors.table import TensorTable
from mergeloom.report.explain import explain
from mergeloom.report.plan import inputs_section
from tests.support.merges.resumable import interrupt, run
from tests.support.merges.small import make_blocks_small
from tests.support.models import write_checkpoint
from tests.support.models.experts import ARCHITECTURES, Sizes, read_all, rewrite, set_config, write_both
from tests.support.outputs import digests
from tests.support.plans import ROOMY, linear, slerp, sliced, task_vectors

SIZES = {
    "plain": Sizes(),
    "2I == H": Sizes(rows=8),
    "I == H": Sizes(rows=16),
    "narrow": Sizes(experts=3, rows=2),
}
LARGE = Sizes(experts=6, rows=48, hidden=64)
"""Large enough for several commits."""

Forms = tuple[Path, Path]
"""A model with fused experts, and the same one with separate experts."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns two models of an architecture, each in both layouts; they are written once."""
    transformers.utils.logging.disable_progress_bar()
    known: dict[tuple[str, str], tuple[Forms, Forms]] = {}

    def written(model_type: str, size: str = "plain") -> tuple[Forms, Forms]:
        if (model_type, size) not in known:
            directory = tmp_path_factory.mktemp(model_type)
            sizes = SIZES.get(size, LARGE)
            forms = [write_both(model_type, directory, seed, sizes) for seed in (1, 2)]
            known[model_type, size] = forms[0], forms[1]
        return known[model_type, size]

    return written


def recipes(base: Path, other: Path) -> dict[str, dict[str, Any]]:
    """A recipe for each kind of method: elementwise, with reductions by tensor and by row, random, and a copy."""
    return {
        "linear": linear(base, other, dtype="bfloat16"),
        "slerp": slerp(base, other, dtype="bfloat16"),
        "ties": task_vectors("ties", base, other),
        "della": task_vectors("della", base, other),
        "sce": {
            "merge_method": "sce",
            "base_model": str(base),
            "models": [{"model": str(other)}],
            "parameters": {"select_topk": 0.5},
        },
        "passthrough": sliced((base, 0, 1), (other, 0, 2), (base, 1, 2)),
    }


def merged(recipe: dict[str, Any], out: Path) -> dict[str, Tensor]:
    """Merge; the bytes read are those that were planned."""
    planned = plan(recipe, ROOMY)
    result = mergeloom.merge(recipe, out, max_ram=4 << 30, device="cpu", threads=2)
    assert result.measured.bytes_read == planned.bytes_read
    return read_all(out)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_merge_of_two_layouts_equals_that_of_one(model_type: str, size: str, pairs: Any, tmp_path: Path) -> None:
    (fused, separate), (other_fused, other_separate) = pairs(model_type, size)
    for number, (base, other, alike) in enumerate(
        ((fused, other_separate, other_fused), (separate, other_fused, other_separate))
    ):
        mixed, plain = recipes(base, other), recipes(base, alike)
        for method in mixed if size == "plain" else ("linear", "ties", "passthrough"):
            out = tmp_path / f"{method}{number}"
            found, expected = merged(mixed[method], out / "mixed"), merged(plain[method], out / "plain")
            assert found.keys() == expected.keys()
            unequal = [name for name in found if not torch.equal(found[name], expected[name])]
            assert not unequal, f"{method}: {unequal[:3]}"
            config, alike_config = ((out / each / "config.json").read_text() for each in ("mixed", "plain"))
            assert json.loads(config) == json.loads(alike_config)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_values_are_those_of_a_float64_reference(model_type: str, pairs: Any, tmp_path: Path) -> None:
    (fused, separate), (other_fused, other_separate) = pairs(model_type)
    for base, other, alike in ((fused, other_separate, other_fused), (separate, other_fused, other_separate)):
        recipe = linear(base, other, dtype="float32", parameters={"normalize": False})
        recipe["models"][0]["parameters"]["weight"], recipe["models"][1]["parameters"]["weight"] = 0.75, -0.5
        found = merged(recipe, tmp_path / base.name)
        ours, theirs = read_all(base), read_all(alike)
        assert found.keys() == ours.keys() == theirs.keys()
        for name, value in found.items():
            expected = 0.75 * ours[name].double() - 0.5 * theirs[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text"])
def test_transformers_loads_the_result(model_type: str, pairs: Any, tmp_path: Path) -> None:
    (fused, separate), (other_fused, other_separate) = pairs(model_type)
    kind = getattr(transformers, ARCHITECTURES[model_type].class_name)
    written = ARCHITECTURES[model_type].writes_both
    for base, other in ((fused, other_separate), (separate, other_fused)) if written else ((fused, other_separate),):
        out = tmp_path / base.name
        mergeloom.merge(linear(base, other, dtype="bfloat16"), out)
        model, info = kind.from_pretrained(out, output_loading_info=True, dtype="auto")
        assert not any(info.values()), info
        ours, theirs = (kind.from_pretrained(each, dtype="auto").state_dict() for each in (fused, other_fused))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, (ours[name] + theirs[name]) / 2, rtol=0.02, atol=1e-3)


def test_models_in_one_layout_stay_as_they_are(pairs: Any) -> None:
    for forms in zip(*pairs("mixtral"), strict=True):
        models = plan(linear(*forms), ROOMY).built.models
        assert all(isinstance(model.tensors, TensorTable) for model in models)
        assert models[1].tensors is models[1].checkpoint.tensors
        assert not any(model.note for model in models)


def test_a_plan_says_what_it_rearranges(pairs: Any) -> None:
    (fused, separate), (other_fused, other_separate) = pairs("mixtral")
    for base, other, form in ((fused, other_separate, "separate"), (separate, other_fused, "fused")):
        planned = plan(linear(base, other), ROOMY)
        section = inputs_section(planned, bytes_of_reads(planned.built.graph, planned.schedule))
        assert section.lines == (f"{other}: {form} experts, merged in the layout of {base}",)
        assert not planned.built.unused
    found = explain(plan(linear(fused, other_separate), ROOMY), "model.layers.0.mlp.experts.gate_up_proj")
    assert [max(each.assembled for each in (source, *source.parts)) for source in found.sources] == [1, 8]
    assert found.method == "linear"


def test_a_donor_with_fewer_layers_decides_for_all(pairs: Any, tmp_path: Path) -> None:
    (fused, separate), (other_fused, other_separate) = pairs("qwen3_moe")

    def first_layer(model: Path) -> Path:
        short = rewrite(
            model,
            tmp_path / f"short-{model.name}",
            lambda tensors: {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name},
        )
        set_config(short, num_hidden_layers=1)
        return short

    for base, other, alike in ((fused, other_separate, other_fused), (separate, other_fused, other_separate)):
        short = first_layer(base)
        mixed = merged(sliced((short, 0, 1), (other, 1, 2)), tmp_path / f"mixed-{base.name}")
        plain = merged(sliced((short, 0, 1), (alike, 1, 2)), tmp_path / f"plain-{base.name}")
        assert mixed.keys() == plain.keys()
        assert all(torch.equal(mixed[name], plain[name]) for name in plain)


STAGES = """\
name: first
merge_method: linear
models: [{{model: {a}, parameters: {{weight: 0.5}}}}, {{model: {b}, parameters: {{weight: 0.25}}}}]
dtype: float32
---
merge_method: linear
models: [{{model: first, parameters: {{weight: 0.5}}}}, {{model: {c}, parameters: {{weight: 0.5}}}}]
dtype: float32
"""


def test_stages_have_the_layout_of_their_donor(pairs: Any, tmp_path: Path) -> None:
    for model_type in ("mixtral", "gpt_oss"):
        (fused, separate), (other_fused, other_separate) = pairs(model_type)
        for base, other, alike in ((fused, other_separate, other_fused), (separate, other_fused, other_separate)):
            outputs = [tmp_path / f"{model_type}-{form}-{base.name}" for form in ("mixed", "plain")]
            for out, second in zip(outputs, (other, alike), strict=True):
                recipe = tmp_path / "stages.yml"
                recipe.write_text(STAGES.format(a=base, b=second, c=second))
                mergeloom.merge(recipe, out)
            mixed, plain = map(read_all, outputs)
            assert mixed.keys() == plain.keys()
            assert all(torch.equal(mixed[name], plain[name]) for name in plain)


OTHER_STAGE = """\
name: first
merge_method: linear
models: [{{model: {a}, parameters: {{weight: 1}}}}]
---
merge_method: linear
models: [{{model: {b}, parameters: {{weight: 0.5}}}}, {{model: first, parameters: {{weight: 0.5}}}}]
"""


def test_a_stage_in_the_other_layout_is_rejected(pairs: Any, tmp_path: Path) -> None:
    (fused, separate), _ = pairs("mixtral")
    for first, second in ((fused, separate), (separate, fused)):
        recipe = tmp_path / "stages.yml"
        recipe.write_text(OTHER_STAGE.format(a=first, b=second))
        with pytest.raises(CheckpointError, match=r"first is a stage.*set base_model of the stage to a model"):
            plan(recipe, ROOMY)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_interrupted_merge_resumes_after_a_source_was_touched(
    model_type: str, pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_blocks_small(monkeypatch)
    (fused, separate), (other_fused, other_separate) = pairs(model_type, "large")
    for base, other in ((fused, other_separate), (separate, other_fused)):
        copied = Path(shutil.copytree(other, tmp_path / f"other-{base.name}"))
        recipe = task_vectors("ties", base, copied)
        expected, out = tmp_path / f"expected-{base.name}", tmp_path / f"out-{base.name}"
        run(recipe, expected)
        interrupt(recipe, out, 3)
        os.utime(copied / "model.safetensors")  # so the bytes that were read are compared with their digests
        run(recipe, out)
        assert digests(out) == digests(expected)


def test_a_quantized_donor_with_separate_experts_takes_fused_ones(pairs: Any, tmp_path: Path) -> None:
    (_, separate), (other_fused, other_separate) = pairs("qwen3_moe")
    scale, values = torch.tensor([[0.03125]]), read_all(separate)

    def quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
        codes = {name: (tensor.float() / scale).to(torch.float8_e4m3fn) for name, tensor in experts.items()}
        values.update({name: code.float() * scale for name, code in codes.items()})
        return tensors | codes | {f"{name}_scale_inv": scale for name in codes}

    donor = rewrite(separate, tmp_path / "fp8", quantized)
    set_config(donor, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"})
    found = merged(linear(donor, other_fused, dtype="float32"), tmp_path / "out")
    others = read_all(other_separate)
    assert found.keys() == others.keys()
    assert all(torch.equal(found[name], (values[name].float() + others[name].float()) / 2) for name in others)
    with pytest.raises(CheckpointError, match=r"weight_scale_inv of .*fp8 belongs to separate experts.* as base_model"):
        plan(linear(other_fused, donor), ROOMY)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
def test_diff_compares_experts_in_the_layout_of_the_first_model(model_type: str, pairs: Any) -> None:
    (fused, separate), (other_fused, other_separate) = pairs(model_type, "2I == H")
    for a, b, alike in ((fused, other_separate, other_fused), (separate, other_fused, other_separate)):
        found, expected = mergeloom.diff(a, b), mergeloom.diff(a, alike)
        assert [(each.name, each.similarity) for each in found.tensors] == [
            (each.name, each.similarity) for each in expected.tensors
        ]
        assert not found.only_in_a
        assert not found.only_in_b
        assert not found.not_compared


def test_diff_says_that_it_does_not_compare_experts(pairs: Any, tmp_path: Path) -> None:
    (fused, _), (_, separate) = pairs("qwen3_moe")
    unknown = Path(shutil.copytree(separate, tmp_path / "unknown"))
    set_config(unknown, model_type=None)
    found = mergeloom.diff(fused, unknown)
    assert any(text.startswith("experts are not compared: ") for text in found.warnings)
    assert found.only_in_a
    assert found.only_in_b


def test_verify_checks_all_files_of_assembled_tensors(pairs: Any, tmp_path: Path) -> None:
    (fused, _), (other_fused, other_separate) = pairs("mixtral")
    copied = Path(shutil.copytree(other_separate, tmp_path / "other"))
    tensors = read_all(copied)
    (copied / "model.safetensors").unlink()
    write_checkpoint(copied, tensors, shard_bytes=4000)
    shards = sorted(copied.glob("*.safetensors"))
    assert len(shards) > 3
    out = tmp_path / "out"
    run(linear(fused, copied), out)
    alike = merged(linear(fused, other_fused), tmp_path / "alike")
    found = read_all(out)
    assert all(torch.equal(found[name], alike[name]) for name in alike)
    verdict = mergeloom.verify(out, sources=True)
    assert not verdict.changed_sources
    assert not verdict.missing_sources
    data = bytearray(shards[1].read_bytes())
    data[-3] ^= 1
    shards[1].write_bytes(data)
    (changed,) = mergeloom.verify(out, sources=True).changed_sources
    assert shards[1].name in changed
