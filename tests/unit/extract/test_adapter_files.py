"""The files of an adapter: the header with reserved space, the names, and adapter_config.json."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from mergeloom.engine.run.extract.adapter_files import (
    AdapterTensor,
    BaseModel,
    adapter_config,
    final_names,
    header_bytes,
    missing_experts,
    reserved_header,
    target_modules,
    tensors_of_job,
)
from mergeloom.engine.run.extract.targets import Difference, FullJob, Job, Layer, MatrixJob
from mergeloom.io.tensors.dtypes import BF16
from mergeloom.io.tensors.refs import TensorRef


def pair(name: str, *shape: int) -> Difference:
    """A tensor of two models."""
    ref = TensorRef(Path("x"), 0, 0, BF16, shape)
    return Difference(name, ref, ref)


def matrix(module: str, *shape: int, layer: Layer = Layer.LINEAR, rank: int = 4) -> MatrixJob:
    """A matrix to decompose."""
    return MatrixJob(pair(f"{module}.weight", *shape), module, layer, rank, rank)


def base(*weights: str, prefix: str = "", tied: bool = False) -> BaseModel:
    """A base model with these modules."""
    return BaseModel("base", None, {"architectures": ["LlamaForCausalLM"]}, prefix, tied, frozenset(weights))


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (Layer.LINEAR, (6, 8), {"lora_A.weight": (4, 8), "lora_B.weight": (6, 4)}),
        (Layer.TRANSPOSED, (6, 8), {"lora_A.weight": (4, 6), "lora_B.weight": (8, 4)}),
        (Layer.EMBEDDING, (6, 8), {"lora_embedding_A": (4, 6), "lora_embedding_B": (8, 4)}),
        (Layer.CONVOLUTION, (6, 8, 3, 2), {"lora_A.weight": (4, 8, 3, 2), "lora_B.weight": (6, 4, 1, 1)}),
        (Layer.CONVOLUTION, (6, 8, 3), {"lora_A.weight": (4, 8, 3), "lora_B.weight": (6, 4, 1)}),
    ],
)
def test_names_and_shapes_of_factors(
    layer: Layer, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]
) -> None:
    found = tensors_of_job(matrix("m", *shape, layer=layer), "")
    assert {tensor.name: tensor.shape for tensor in found} == {
        f"base_model.model.m.{k}": v for k, v in expected.items()
    }
    assert {tensor.dtype for tensor in found} == {"F32"}


def test_tensors_in_full_have_the_models_dtype() -> None:
    (tensor,) = tensors_of_job(FullJob(("h.0.ln_1",), (pair("h.0.ln_1.weight", 8),)), "transformer.")
    assert tensor == AdapterTensor("base_model.model.transformer.h.0.ln_1.weight", "BF16", (8,))


def test_a_header_with_reserved_space_is_read_by_the_library() -> None:
    jobs: list[Job] = [matrix(f"model.layers.{n}.q_proj", 6, 8) for n in range(20)]
    reserved = reserved_header(jobs, "")
    kept = [tensor for job in jobs[3:5] for tensor in tensors_of_job(job, "")]
    values = [np.full(tensor.shape, number, np.float32) for number, tensor in enumerate(kept)]
    header = header_bytes(kept, reserved)
    assert len(header) == reserved
    assert reserved % 8 == 0
    found = load(header + b"".join(value.tobytes() for value in values))
    assert found.keys() == {tensor.name for tensor in kept}
    for tensor, value in zip(kept, values, strict=True):
        np.testing.assert_array_equal(found[tensor.name], value)


def test_reserved_space_is_enough_for_all_tensors() -> None:
    jobs: list[Job] = []
    for n in range(30):
        jobs += [matrix(f"layers.{n}.q", 600, 800), FullJob((), (pair(f"layers.{n}.q.bias", 600),))]
    stored = [tensors_of_job(job, "") for job in jobs]
    assert len(header_bytes(final_names(jobs, stored), reserved_header(jobs, ""))) == reserved_header(jobs, "")


def test_the_bias_of_a_module_with_factors_is_inside_of_it() -> None:
    jobs: list[Job] = [
        matrix("a", 6, 8),
        FullJob((), (pair("a.bias", 6),)),
        matrix("b", 6, 8),
        FullJob((), (pair("b.bias", 6),)),
        FullJob(("norm",), (pair("norm.bias", 6),)),
    ]
    stored = [tensors_of_job(job, "") for job in jobs]
    stored[2] = ()  # unchanged: PEFT does not replace the module
    names = [tensor.name.removeprefix("base_model.model.") for tensor in final_names(jobs, stored)]
    assert names == ["a.lora_A.weight", "a.lora_B.weight", "a.base_layer.bias", "b.bias", "norm.bias"]
    config = adapter_config(base("a", "b"), 4, jobs, list(map(bool, stored)))
    assert (config["bias"], config["modules_to_save"], config["target_modules"]) == ("all", ["norm"], ["a"])


def test_short_targets_where_all_modules_with_a_name_have_factors() -> None:
    model = base("l.0.q", "l.1.q", "l.0.up", "l.1.up", prefix="model.")
    assert target_modules(model, ["l.0.q", "l.1.q", "l.1.up"]) == ["model.l.1.up", "q"]


def test_other_ranks_are_patterns_that_peft_matches() -> None:
    jobs: list[Job] = [matrix("model.layers.1.q", 6, 8), matrix("model.layers.1.k", 2, 8, rank=2)]
    config = adapter_config(base("model.layers.1.q", "model.layers.1.k"), 4, jobs, [True, True])
    assert config["rank_pattern"] == config["alpha_pattern"]
    ((pattern, rank),) = config["rank_pattern"].items()
    assert rank == 2
    assert re.match(rf"(.*\.)?({pattern})$", "model.layers.1.k")
    assert not re.match(rf"(.*\.)?({pattern})$", "model.layers.11.k")


def test_unchanged_experts_next_to_changed_ones() -> None:
    names = [f"l.{layer}.mlp.experts.{n}.up" for layer in range(2) for n in range(3)] + ["l.0.q"]
    jobs: list[Job] = [matrix(name, 6, 8) for name in names]
    assert missing_experts(jobs, [True, False, True, False, False, False, False]) == [1]
    assert missing_experts(jobs, [False] * 6 + [True]) == []


@pytest.mark.parametrize(
    ("tied", "embedding", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_ties_are_kept_only_where_the_embedding_has_changed(tied: bool, embedding: bool, expected: bool) -> None:
    saved = FullJob(
        ("model.embed_tokens", "lm_head"), (pair("model.embed_tokens.weight", 9, 8), pair("lm_head.weight", 9, 8))
    )
    jobs: list[Job] = [saved, matrix("q", 6, 8)]
    config = adapter_config(base("q", tied=tied), 4, jobs, [embedding, True])
    assert config["ensure_weight_tying"] is expected
    assert config["task_type"] == "CAUSAL_LM"
