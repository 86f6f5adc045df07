"""Models in different formats, and quantized with unquantized ones: merged if decoded, or the error says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.planning import plan
from tests.support.models import Shape, tiny_llama, write_checkpoint
from tests.unit.model.refusing import CPU, linear, refused, stack

LLAMA = tiny_llama(layers=2)
Q = "model.layers.{}.self_attn.q_proj"


def quantized(form: str) -> tuple[dict[str, Shape], dict[str, str]]:
    """The Llama with quantized q projections: shapes and dtypes."""
    shapes = dict(LLAMA.tensors)
    dtypes = dict.fromkeys(shapes, "BF16")
    for layer in (0, 1):
        name = Q.format(layer)
        added: dict[str, tuple[str, Shape]] = {
            "bitsandbytes with 4 bits": {
                f"{name}.weight": ("U8", (512, 1)),
                f"{name}.weight.absmax": ("F32", (16,)),
                f"{name}.weight.quant_map": ("F32", (16,)),
            },
            "bitsandbytes with 8 bits": {f"{name}.weight": ("I8", (32, 32)), f"{name}.SCB": ("F32", (32,))},
            "GPTQ": {
                f"{name}.qweight": ("I32", (4, 32)),
                f"{name}.qzeros": ("I32", (1, 4)),
                f"{name}.scales": ("F16", (1, 32)),
                f"{name}.g_idx": ("I32", (32,)),
            },
            "AWQ": {
                f"{name}.qweight": ("I32", (32, 4)),
                f"{name}.qzeros": ("I32", (1, 4)),
                f"{name}.scales": ("F16", (1, 32)),
            },
            "MLX": {
                f"{name}.weight": ("U32", (32, 4)),
                f"{name}.scales": ("BF16", (32, 1)),
                f"{name}.biases": ("BF16", (32, 1)),
            },
            "compressed-tensors": {
                f"{name}.weight_packed": ("I32", (32, 4)),
                f"{name}.weight_scale": ("BF16", (32, 1)),
                f"{name}.weight_shape": ("I64", (2,)),
            },
            "FP8 in blocks": {f"{name}.weight": ("F8_E4M3", (32, 32)), f"{name}.weight_scale_inv": ("F32", (1, 1))},
        }[form]
        del shapes[f"{name}.weight"]
        shapes |= {key: shape for key, (_, shape) in added.items()}
        dtypes |= {key: dtype for key, (dtype, _) in added.items()}
    return shapes, dtypes


def write_quantized(directory: Path, form: str, **config: Any) -> Path:
    shapes, dtypes = quantized(form)
    return write_checkpoint(directory, shapes, dtype=dtypes, config=LLAMA.config | config)


FORMS = ["bitsandbytes with 4 bits", "bitsandbytes with 8 bits", "GPTQ", "AWQ", "MLX", "compressed-tensors"]


@pytest.mark.parametrize("make", [linear, stack])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_quantized_and_unquantized(
    form: str, order: tuple[int, int], make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    a = write_checkpoint(tmp_path / "a", LLAMA)
    q = write_quantized(tmp_path / "big-GPTQ", form)
    error = refused(make(*((a, q)[index] for index in order)))
    assert f"is quantized ({form};" in error
    assert "probably named big)" in error
    assert Q.format(0) in error


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_fp8_with_scales_and_unquantized(order: tuple[int, int], tmp_path: Path) -> None:
    """They are averaged; a stack of both copies codes, so config.json must come from the quantized model."""
    a = write_checkpoint(tmp_path / "a", LLAMA)
    q = write_quantized(tmp_path / "big-FP8", "FP8 in blocks")
    models = [(a, q)[index] for index in order]
    assert plan(linear(*models), CPU).to_dict()["output"]["dtypes"] == ["BF16"]
    if order == (0, 1):
        error = refused(stack(*models))
        assert f"config.json comes from {a}, which is not quantized: loaders would read it as something else" in error
        assert error.endswith("set dtype in the recipe, for example dtype: bfloat16, to decode it")
    else:
        assert set(plan(stack(*models), CPU).to_dict()["output"]["dtypes"]) == {"BF16", "F8_E4M3", "F32"}


def test_both_models_are_described(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", LLAMA)
    q = write_quantized(tmp_path / "q", "GPTQ")
    (q / "README.md").write_text("---\nbase_model: acme/q\n---\n")
    error = refused(linear(a, q))
    assert error.startswith(
        f"{a} is not quantized and {q} is quantized (GPTQ; tensor {Q.format(0)}.qweight: its name is that of"
    )
    assert error.endswith(f"for {q}, use the unquantized model that it was made from (its model card names acme/q)")


def test_two_formats(tmp_path: Path) -> None:
    a, b = (write_quantized(tmp_path / name, form) for name, form in (("a", "GPTQ"), ("b", "AWQ")))
    error = refused(stack(a, b))
    assert f"{a} is quantized (GPTQ; " in error
    assert f"{b} is quantized (AWQ; " in error


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_stack_of_fp8_without_scales_and_of_values_is_rejected(order: tuple[int, int], tmp_path: Path) -> None:
    """Names and shapes are equal, so only config.json tells that the numbers are not values."""
    config = LLAMA.config | {"quantization_config": {"quant_method": "fp8"}}
    dtypes = {name: "F8_E4M3" if name.endswith("proj.weight") else "BF16" for name in LLAMA.tensors}
    a = write_checkpoint(tmp_path / "a", LLAMA)
    q = write_checkpoint(tmp_path / "q", LLAMA.tensors, dtype=dtypes, config=config)
    error = refused(stack(*((a, q)[index] for index in order)))
    assert f"{q}: model.layers.0.mlp.down_proj.weight (F8_E4M3 of shape " in error
    assert "but its scales are missing: expected model.layers.0.mlp.down_proj.weight_scale" in error


@pytest.mark.parametrize(("second", "warned"), [({"bits": 4}, False), ({"bits": 4, "sym": False}, True)])
def test_other_settings_of_the_same_format_are_a_warning(second: dict[str, Any], warned: bool, tmp_path: Path) -> None:
    settings = ({"bits": 4, "sym": True, "dataset": "c4"}, {"sym": True, "dataset": "wikitext"} | second)
    a, b = (
        write_quantized(tmp_path / name, "GPTQ", quantization_config={"quant_method": "gptq", **each})
        for name, each in zip("ab", settings, strict=True)
    )
    warnings = [warning for warning in plan(stack(a, b), CPU).warnings if "both quantized" in warning]
    assert len(warnings) == warned
    for warning in warnings:
        assert warning.startswith(f"{b} and {a} are both quantized (GPTQ), but their config.json files describe it ")
        assert "differently: sym (False and True). config.json of " in warning


def test_norms_and_embeddings_of_an_unquantized_model_fit_quantized_layers(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", LLAMA)
    q = write_quantized(tmp_path / "q", "FP8 in blocks")
    recipe = stack(q) | {"non_layer": {"embeddings": str(a), "norm": str(a), "head": str(a)}}
    assert plan(recipe, CPU).built.layers == 1
