"""Quantized tensors: detection by name, passthrough without changes, and the error for arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.model.checks.formats import format_name, unquantized
from mergeloom.engine.model.quantized import quantized_tensors
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from tests.support.models import Shape, deepseek_v3, write_checkpoint
from tests.support.outputs import read_model, same_tensors
from tests.unit.graph.building import checkpoint

CPU = Options(device="cpu", threads=1)
Tensors = dict[str, tuple[str, Shape]]
"""Element type and shape by name."""

NORM: Tensors = {"model.norm.weight": ("BF16", (8,))}
F8 = ("F8_E4M3", (8, 8))
FORMATS: dict[str, Tensors] = {
    "fp8 in blocks": {"p.weight": F8, "p.weight_scale_inv": ("F32", (1, 1)), "p.bias": ("BF16", (8,))},
    "fp8": {"p.weight": F8, "p.weight_scale": ("F32", ()), "p.input_scale": ("F32", ())},
    "fp8 of ComfyUI": {"p.weight": F8, "p.scale_weight": ("F32", ()), "p.scale_input": ("F32", ())},
    "fp8 of Mistral": {"p.weight": F8, "p.qscale_weight": ("BF16", ()), "p.qscale_act": ("BF16", ())},
    "fp8 of DeepSeek-V4": {"p.weight": F8, "p.scale": ("F8_E8M0", (1, 1))},
    "fp8 with a short name": {"p.weight": F8, "p.scale_inv": ("F32", (8, 1))},
    "fp8 with an invented name": {"p.weight": F8, "p.multiplier": ("F32", (8, 1)), "p.bias": ("F32", (8,))},
    "fp8 with scales in the parent": {"p.q_proj.weight": F8, "p.q_proj_scale": ("F32", (8, 1))},
    "fp8 with a module of scales": {"p.q_proj.weight": F8, "p.scales.q_proj": ("F32", ())},
    "fp8 with scales at the top": {"p.q_proj.weight": F8, "scales.p.q_proj.weight": ("BF16", (1, 1))},
    "fp8 with short names of projections": {"p.q_proj.weight": F8, "p.q_scale": ("F32", (1,))},
    "fp8 with exponents in the parent": {"p.w1.weight": F8, "p.w1_scale_inv": ("U8", (8, 1))},
    "fp8 with exponents": {"p.weight": F8, "p.s": ("U8", (8, 1)), "p.bias": ("BF16", (8,))},
    "fp8 with exponents in a packed type": {"p.in_proj_weight": F8, "p.in_proj_scale": ("U8", (8, 1))},
    "fp8 with an invented name in the parent": {"p.q_proj.weight": F8, "p.alpha_q_proj": ("F32", (8, 1))},
    "int8 with scales in the parent": {"p.q_proj.weight": ("I8", (8, 8)), "p.q_proj_scale": ("F32", (8, 1))},
    "fp8 experts": {"p.gate_up_proj": ("F8_E4M3", (2, 8, 8)), "p.gate_up_proj_scale_inv": ("F32", (2, 1, 1))},
    "fp8 with fp8 scales": {"p.weight": F8, "p.zero_point": ("F8_E4M3", (8, 1))},
    "gptq": {
        "p.qweight": ("I32", (1, 8)),
        "p.qzeros": ("I32", (1, 1)),
        "p.scales": ("F16", (1, 8)),
        "p.g_idx": ("I32", (8,)),
        "p.bias": ("F16", (8,)),
    },
    "awq": {"p.qweight": ("I32", (8, 1)), "p.qzeros": ("I32", (1, 1)), "p.scales": ("F16", (1, 8))},
    "packed": {"p.weight_packed": ("I32", (8, 1)), "p.weight_scale": ("BF16", (8, 1)), "p.weight_shape": ("I64", (2,))},
    "nf4": {
        "p.weight": ("U8", (32, 1)),
        "p.weight.absmax": ("F32", (1,)),
        "p.weight.quant_map": ("F32", (16,)),
        "p.weight.nested_absmax": ("F32", (1,)),
        "p.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    },
    "int8": {"p.weight": ("I8", (8, 8)), "p.SCB": ("F32", (8,)), "p.weight_format": ("U8", ())},
    "int8 with an invented name": {"p.weight": ("I8", (8, 8)), "p.step": ("F32", (8, 8)), "p.bias": ("F16", (8,))},
    "mlx": {"p.weight": ("U32", (8, 1)), "p.scales": ("BF16", (8, 1)), "p.biases": ("BF16", (8, 1))},
    "quanto": {"p.weight._data": ("I8", (8, 8)), "p.weight._scale": ("F16", (8, 1)), "p.bias": ("F16", (8,))},
    "exl3": {"p.trellis": ("I16", (1, 1, 48)), "p.suh": ("F16", (8,)), "p.svh": ("F16", (8,))},
    "mxfp4": {"p.up_blocks": ("U8", (8, 4)), "p.up_scales": ("U8", (8, 1)), "p.up_bias": ("BF16", (8,))},
    "f4": {"p.weight": ("F4", (8, 8)), "p.weight_scale": ("F8_E8M0", (8, 1))},
}
DECODED = {"fp8 in blocks", "fp8", "fp8 of ComfyUI", "fp8 of Mistral", "fp8 of DeepSeek-V4", "fp8 experts"}
"""The formats of these that are decoded without a description in config.json: their scales leave no choice."""
PLAIN = {"p.bias", "p.up_bias"}
"""The tensors of these formats that are not quantized, and belong to no quantized one."""
LABELS = {
    "fp8 in blocks": "FP8 in blocks",
    "fp8": "scaled FP8",
    "fp8 with an invented name": "scaled FP8",
    "fp8 with exponents": "scaled FP8",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "packed": "compressed-tensors",
    "nf4": "bitsandbytes with 4 bits",
    "int8": "bitsandbytes with 8 bits",
    "int8 with an invented name": "unknown format",
    "mlx": "MLX",
    "quanto": "quanto",
    "exl3": "EXL3",
    "mxfp4": "MXFP4",
}
FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def opened(
    tensors: Tensors, config: dict[str, Any] | None = None, metadata: dict[str, str] | None = None
) -> Checkpoint:
    """A checkpoint of tensors that don't exist."""
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    made = checkpoint("x", shapes, {name: dtype for name, (dtype, _) in tensors.items()}, config)
    return replace(made, metadata=metadata or {})


def write(directory: Path, tensors: Tensors, seed: int = 0, config: dict[str, Any] | None = None) -> str:
    """A checkpoint; what has no random values is left as zeros."""
    fill = None if any(dtype in ("F4", "F8_E8M0") for dtype, _ in tensors.values()) else seed
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
    return str(write_checkpoint(directory, shapes, dtype=dtypes, fill=fill, config=config))


@pytest.mark.parametrize("form", FORMATS)
def test_they_are_found_by_their_names_and_dtypes(form: str) -> None:
    assert set(quantized_tensors(opened(FORMATS[form] | NORM))) == set(FORMATS[form]) - PLAIN


@pytest.mark.parametrize(("form", "label"), LABELS.items())
def test_the_format_is_named(form: str, label: str) -> None:
    made = opened(FORMATS[form] | NORM)
    assert format_name(made, quantized_tensors(made)) == label


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (FP8_CONFIG, "FP8"),
        ({"text_config": FP8_CONFIG}, "FP8"),
        ({"compression_config": {"format": "float-quantized"}}, "scaled FP8"),
        ({"quantization_config": {"quant_method": "new-method"}}, "new-method"),
    ],
)
def test_the_config_tells_where_names_do_not(config: dict[str, Any], label: str) -> None:
    tensors: Tensors = NORM | {
        "p.weight": F8,
        "p.bias": ("BF16", (8,)),
        "p.table": ("I64", (8,)),
        "p.codes": ("I8", (4,)),
    }
    made = opened(tensors, config)
    quantized = quantized_tensors(made)
    assert set(quantized) == {"p.weight", "p.codes"}
    assert quantized["p.weight"].startswith("config.json has ")
    assert format_name(made, quantized) == label


@pytest.mark.parametrize("config", [None, {}, {"quantization_config": None}, {"quantization_config": {}}])
def test_plain_fp8_is_not_quantized(config: dict[str, Any] | None) -> None:
    tensors: Tensors = {
        "p.weight": F8,
        "p.bias": ("BF16", (8,)),
        "attn.in_proj_weight": F8,
        "attn.in_proj_bias": ("F32", (8,)),
        "experts.gate_up_proj": ("F8_E4M3", (2, 8, 8)),
        "experts.down_proj": ("BF16", (2, 4, 8)),
        "experts.down_proj_bias": ("BF16", (2, 8)),
        "blocks.0.gamma": ("F8_E4M3", (8,)),
        "mixer.A_log": ("F32", (8,)),
        "mixer.D": ("F8_E4M3", (8,)),
        "attention.in_proj.weight": F8,
        "attention.logit_scale": ("F32", ()),
        "attention.scale": ("F32", ()),
        "attention.q_norm.scale": ("F32", (8,)),
        "attention_scale": ("F32", (8,)),
        "layer_scale.weight": ("F32", (8,)),
        "hc_attn_scale": ("F32", (3,)),
        "mlp.gate.weight": F8,
        "mlp_scale": ("F32", ()),
        "mlp.gate_scale": ("F8_E4M3", (8,)),
        "mlp.scales.gate": ("F32", (8, 4)),
        "mlp.gate_bias": ("F32", (8,)),
        "mlp.shared_gate.weight": ("F32", (1, 8)),
        "mlp.e_score_correction_bias": ("F32", (8,)),
    }
    assert not quantized_tensors(opened(tensors, config))


def test_files_and_marker_tensors_tell_it_too() -> None:
    assert set(quantized_tensors(opened({"p.weight": F8}, metadata={"_quantization_metadata": "{}"}))) == {"p.weight"}
    assert set(quantized_tensors(opened({"p.weight": F8, "scaled_fp8": ("F8_E4M3", (2,))}))) == {
        "p.weight",
        "scaled_fp8",
    }


def test_an_unquantized_model_has_none() -> None:
    model = deepseek_v3(layers=4, experts=2, fp8=False)
    assert not quantized_tensors(opened({name: ("BF16", shape) for name, shape in model.tensors.items()}))
    others: Tensors = {
        "logit_scale": ("F32", ()),
        "layer_scale.weight": ("F32", (4,)),
        "blocks": ("BF16", (4,)),
        "hc_attn_scale": ("F32", (3,)),
        "q_norm.scale": ("F32", (4,)),
        "gate.weight": ("BF16", (4, 4)),
        "gate.tid2eid": ("I64", (16, 6)),
        "attn.bias": ("U8", (1, 1, 4, 4)),
        "attn.masked_bias": ("F32", ()),
        "bn.running_mean": ("F32", (4,)),
        "bn.num_batches_tracked": ("I64", ()),
    }
    assert not quantized_tensors(opened(others))
    # a donor's block that stays behind when a model is dequantized says nothing about values of 16 bits
    assert not quantized_tensors(opened(others | {"p.weight": ("BF16", (8, 8))}, FP8_CONFIG)).keys() - {"attn.bias"}


@pytest.mark.parametrize("form", sorted(DECODED))
def test_known_scales_are_decoded(form: str, tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, FORMATS[form] | NORM, seed) for seed, name in enumerate("ab"))
    models = [{"model": model, "parameters": {"weight": 0.5}} for model in (first, second)]
    planned = plan({"merge_method": "linear", "models": models}, CPU)
    expected = next(name for name, (dtype, _) in FORMATS[form].items() if dtype == "F8_E4M3")
    dtypes = {output.name: planned.built.graph.node_dtype[output.node].name for output in planned.built.graph.outputs}
    assert dtypes == {expected: "BF16", "model.norm.weight": "BF16"} | (
        {"p.bias": "BF16"} if "p.bias" in FORMATS[form] else {}
    )


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in DECODED])
def test_arithmetic_is_refused_at_planning(form: str, tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, FORMATS[form] | NORM, seed) for seed, name in enumerate("ab"))
    models = [{"model": model, "parameters": {"weight": 0.5}} for model in (first, second)]
    passed = {"merge_method": "passthrough", "models": [{"model": first}]}
    recipes = [{"merge_method": "linear", "models": models}, passed | {"parameters": {"scale": 2}}]
    if form not in ("mxfp4", "packed", "mlx"):  # all their tensors have this dtype already, or are integers
        recipes.append(passed | {"dtype": "bfloat16"})
    for recipe in recipes:
        with pytest.raises(CheckpointError, match=r"is quantized \(.*passthrough without dtype copies"):
            plan(recipe, CPU)


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("f4", "fp8 of DeepSeek-V4")])
def test_passthrough_copies_them_exactly(form: str, tmp_path: Path) -> None:
    model = write(tmp_path / "a", FORMATS[form] | NORM)
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out", CPU)
    assert same_tensors(read_model(tmp_path / "out"), read_model(tmp_path / "a"))


def test_passthrough_keeps_four_bit_numbers(tmp_path: Path) -> None:
    model = write(tmp_path / "a", FORMATS["f4"] | NORM)
    result = merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out", CPU)
    assert result.plan.to_dict()["output"]["dtypes"] == ["BF16", "F4", "F8_E8M0"]
    assert not result.plan.computes


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_fp8_without_scales_is_refused_if_the_config_says_so(method: str, tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, NORM | {"p.weight": F8}, seed, FP8_CONFIG) for seed, name in enumerate("ab"))
    recipes: dict[str, dict[str, Any]] = {
        "linear": {"models": [{"model": model, "parameters": {"weight": 0.5}} for model in (a, b)]},
        "passthrough": {"models": [{"model": a}], "dtype": "float32"},
    }
    message = (
        r"p\.weight \(F8_E4M3 of shape .*\) is quantized by config\.json \(quantization_config\.weight_block_size\)"
    )
    with pytest.raises(CheckpointError, match=f"{message}, but its scales are missing: expected p.weight_scale_inv"):
        plan({"merge_method": method} | recipes[method], CPU)


def test_plain_fp8_is_averaged(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, {"p.weight": F8, "p.bias": ("BF16", (8,))}, seed) for seed, name in enumerate("ab"))
    models = [{"model": model, "parameters": {"weight": 0.5}} for model in (a, b)]
    merge({"merge_method": "linear", "models": models, "out_dtype": "float32"}, tmp_path / "out", CPU)
    values = [read_model(Path(model))["p.weight"].float() for model in (a, b)]
    assert read_model(tmp_path / "out")["p.weight"].equal((values[0] + values[1]) / 2)


def test_a_later_stage_refuses_what_an_earlier_one_copied(tmp_path: Path) -> None:
    tensors = FORMATS["fp8 with an invented name"] | NORM
    a, b = (write(tmp_path / name, tensors, seed) for seed, name in enumerate("ab"))
    stages: list[dict[str, Any]] = [
        {"name": f"copy-{name}", "merge_method": "passthrough", "models": [{"model": model}]}
        for name, model in (("a", a), ("b", b))
    ]
    last: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": f"copy-{name}", "parameters": {"weight": 0.5}} for name in "ab"],
    }
    recipe: Any = [*stages, last]
    with pytest.raises(
        CheckpointError, match=r"p\.multiplier of copy-a is quantized \(scaled FP8; it belongs to p\.weight"
    ):
        plan(recipe, CPU)


@pytest.mark.parametrize(
    ("name", "card", "advice"),
    [
        ("TheBloke/Llama-2-7B-GPTQ", None, "probably named Llama-2-7B)"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", None, "probably named Llama-3.2-1B-Instruct)"),
        ("neuralmagic/Llama-3-8B-quantized.w4a16", None, "probably named Llama-3-8B)"),
        ("Qwen/Qwen3-8B-FP8/", None, "probably named Qwen3-8B)"),
        ("mlx-community/Qwen3-4bit", None, "probably named Qwen3)"),
        ("some/model", None, "use the repository with the unquantized model"),
        ("some/model-GPTQ", "---\nlicense: mit\nbase_model:\n- acme/large\n---\n", "its model card names acme/large"),
        ("some/model-GPTQ", "---\nbase_model: 'acme/large'\n---\n", "its model card names acme/large"),
        ("some/model-GPTQ", "base_model: acme/large\n", "probably named model)"),
    ],
)
def test_the_unquantized_repository_is_suggested(name: str, card: str | None, advice: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert advice in unquantized(name, replace(opened(NORM), path=tmp_path))
