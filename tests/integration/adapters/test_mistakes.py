"""Adapters that don't fit or can't be applied: one error each, which names the tensor and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergeloom
from mergeloom.errors import CheckpointError, ModelNotFound, RecipeError
from tests.support import models
from tests.support.adapters.files import PREFIX, write_adapter, write_lora
from tests.support.command_line import run
from tests.support.plans import without_location

LLAMA = models.tiny_llama(layers=2)
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
HEAD = LLAMA.tensors["lm_head.weight"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.write_checkpoint(tmp_path / "base", LLAMA, fill=0)


def refused(reference: str) -> str:
    """The error for a model with adapters, after its place in the recipe."""
    with pytest.raises(CheckpointError) as caught:
        mergeloom.plan({"merge_method": "passthrough", "models": [{"model": reference}]})
    return without_location(caught.value)


def lora(tmp_path: Path, **more: Any) -> Path:
    return write_lora(tmp_path / "a", LLAMA.tensors, **more)


TENSORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "missing lora_B": (
        {"more": {f"{Q}.lora_B.weight": None}},
        (
            f"has {Q}.lora_A.weight, but model.layers.0.self_attn.q_proj lacks lora_B.weight",
            "download the adapter again",
        ),
    ),
    "factors of two ranks": (
        {"more": {f"{Q}.lora_B.weight": torch.zeros(32, 3)}},
        (f"{Q}.lora_A.weight has shape [4, 32] and {Q}.lora_B.weight [32, 3]: the rank is the first dimension",),
    ),
    "another rank than in the config": (
        {"r": 8},
        ("adapter_config.json gives model.layers.0.mlp.down_proj the rank 8, but it is 4",),
    ),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, ("'(' in adapter_config.json is not a valid pattern",)),
    "no alpha": ({"lora_alpha": None}, ("lora_alpha in adapter_config.json is None, not a number",)),
    "convolutions": (
        {"more": {f"{Q}.lora_A.weight": torch.zeros(4, 32, 1, 1), f"{Q}.lora_B.weight": torch.zeros(32, 4, 1, 1)}},
        ("only factors with two dimensions can be applied",),
    ),
    "a quantized adapter": (
        {"more": {f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}},
        (f"tensor {Q}.lora_A.weight is I8: quantized adapters can't be applied",),
    ),
    "an unknown tensor": (
        {"more": {f"{Q}.lora_diag.weight": torch.zeros(4)}},
        (f"tensor {Q}.lora_diag.weight is not one of a LoRA adapter of PEFT (lora_diag)",),
    ),
    "a module that the base lacks": (
        {"more": {f"{PREFIX}score.weight": torch.zeros(2, 32)}},
        ("changes 1 tensor that", "lacks: score.weight", "use a base that has them"),
    ),
    "a resized head without the embedding": (
        {"more": {f"{PREFIX}lm_head.weight": torch.zeros(HEAD[0] + 2, HEAD[1])}},
        (
            "lm_head.weight was resized from 64 to 66 rows, but model.embed_tokens.weight of",
            "has 64: a token has a row in every embedding and head",
            "save_embedding_layers=True",
        ),
    ),
    "embedding and head of different sizes": (
        {
            "more": {
                f"{PREFIX}lm_head.weight": torch.zeros(HEAD[0] + 2, HEAD[1]),
                f"{PREFIX}model.embed_tokens.weight": torch.zeros(HEAD[0] + 3, HEAD[1]),
            }
        },
        ("was resized from 64 to 66 rows, but model.embed_tokens.weight of", "has 67: a token has a row"),
    ),
    "factors of a resized head": (
        {
            "more": {
                f"{PREFIX}lm_head.lora_A.weight": torch.zeros(4, HEAD[1]),
                f"{PREFIX}lm_head.lora_B.weight": torch.zeros(HEAD[0] + 2, 4),
            }
        },
        ("has shape [66, 32], but lm_head.weight of", "has [64, 32]: the vocabulary", "lacks the resized matrix"),
    ),
    "a resized table of another width": (
        {"more": {f"{PREFIX}lm_head.weight": torch.zeros(HEAD[0] + 2, HEAD[1] + 1)}},
        ("has shape [66, 33], but lm_head.weight of", "has [64, 32]; its config doesn't name the model"),
    ),
    "tokens beyond the resized vocabulary": (
        {
            "more": {
                f"{PREFIX}lm_head.weight": torch.zeros(HEAD[0] + 2, HEAD[1]),
                f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight": torch.zeros(HEAD[0] + 2, HEAD[1]),
                f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(2, 32),
            },
            "trainable_token_indices": [65, 66],
        },
        ("trainable_token_indices are [65, 66], but model.embed_tokens.weight has 66 rows",),
    ),
    "rows without tokens": (
        {"more": {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(2, 32)}},
        ("trainable_token_indices of adapter_config.json doesn't list the tokens",),
    ),
    "tokens beyond the vocabulary": (
        {
            "more": {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(2, 32)},
            "trainable_token_indices": [3, 64],
        },
        ("trainable_token_indices are [3, 64], but model.embed_tokens.weight has 64 rows",),
    ),
    "a bias that the base lacks": (
        {"more": {f"{Q}.lora_B.bias": torch.zeros(32)}},
        ("lacks: model.layers.0.self_attn.q_proj.bias",),
    ),
    "magnitudes of DoRA are missing": ({"use_dora": True}, ("has no lora_magnitude_vector: the file is incomplete",)),
    "a trained head is missing": (
        {"modules_to_save": ["lm_head"]},
        (
            "has lm_head in modules_to_save, but the adapter has none of its tensors, such as lm_head.weight",
            "incomplete",
        ),
    ),
    "trained tokens are missing": (
        {"trainable_token_indices": [1, 2]},
        ("has trainable_token_indices, but the adapter has no token_adapter.trainable_tokens_delta", "incomplete"),
    ),
    "biases of factors are missing": (
        {"lora_bias": True},
        ("has lora_bias, but model.layers.0.mlp.down_proj has no lora_B.bias", "incomplete"),
    ),
    "a text for a list of modules": (
        {"modules_to_save": "lm_head"},
        ("modules_to_save in adapter_config.json is 'lm_head', not a list",),
    ),
    "two copies of a tensor": (
        {"more": {f"{PREFIX}norm.weight": torch.zeros(32), f"{PREFIX}model.norm.weight": torch.zeros(32)}},
        ("would both be the tensor model.norm.weight",),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_each_other_or_the_base(tmp_path: Path, base: Path, case: str) -> None:
    changes, messages = TENSORS[case]
    error = refused(f"{base}+{lora(tmp_path, **changes)}")
    assert str(tmp_path / "a") in error
    for message in messages:
        assert message in error


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "(IA)3": ({"peft_type": "IA3"}, "is an adapter of the kind (IA)³, and only LoRA adapters can be applied"),
    "LoHa": ({"peft_type": "LOHA"}, "is an adapter of the kind LoHa"),
    "AdaLoRA": ({"peft_type": "ADALORA"}, "is an adapter of the kind AdaLoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
    "OLoRA": ({"init_lora_weights": "olora"}, "was initialized with olora (init_lora_weights in adapter_config.json)"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "which also changes the base"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "is an activated LoRA (aLoRA)"),
    "QALoRA": ({"use_qalora": True}, "is a QALoRA adapter"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "is a KaSA adapter"),
    "MonteCLoRA": ({"monteclora_config": {"n": 1}}, "is a MonteCLoRA adapter"),
    "Arrow": ({"arrow_config": {"top_k": 1}}, "is an Arrow router"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "is a BD-LoRA adapter"),
    "Megatron": ({"megatron_config": {"a": 1}}, "is an adapter for Megatron's parallel layers"),
    "a kind of a later version": (
        {"use_zlora": True, "peft_version": "0.30.1"},
        "has use_zlora: True in adapter_config.json, whose meaning is unknown",
    ),
    "an unknown initialization": (
        {"init_lora_weights": "zora"},
        "has init_lora_weights: 'zora' in adapter_config.json",
    ),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "was trained on a stack of repeated layers"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_that_cannot_be_applied_are_refused_by_name(tmp_path: Path, base: Path, kind: str) -> None:
    config, message = CONFIGS[kind]
    assert message in refused(f"{base}+{lora(tmp_path, **config)}")


def test_biases_next_to_factors_that_are_missing_are_a_warning(tmp_path: Path) -> None:
    """Most versions of PEFT do not save them, and load such an adapter with the base's."""
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors = {name: torch.zeros(shape) for name, shape in LLAMA.tensors.items()} | {bias: torch.zeros(32)}
    base = models.write_checkpoint(tmp_path / "base", tensors, config=LLAMA.config)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{lora(tmp_path, bias='lora_only')}"}]}
    (warning,) = mergeloom.plan(recipe).warnings
    assert f"has bias: lora_only, but the adapter has no biases, such as {bias}: they stay those of the base" in warning


def test_trained_biases_that_are_missing(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors = {name: torch.zeros(shape) for name, shape in LLAMA.tensors.items()} | {bias: torch.zeros(32)}
    base = models.write_checkpoint(tmp_path / "base", tensors, config=LLAMA.config)
    error = refused(f"{base}+{lora(tmp_path, bias='all')}")
    assert f"has bias: all, but the adapter has no biases, such as {bias}: the file is incomplete" in error
    only_v = write_lora(tmp_path / "v", LLAMA.tensors, targets=["v_proj"], bias="lora_only")  # whose layer has no bias
    assert not mergeloom.plan({"merge_method": "passthrough", "models": [{"model": f"{base}+{only_v}"}]}).warnings


def test_modules_to_save_that_the_base_lacks_are_not_missing(tmp_path: Path, base: Path) -> None:
    """PEFT adds both names for every classifier, of which a model has one at most."""
    adapter = lora(tmp_path, modules_to_save=["classifier", "score"])
    assert not mergeloom.plan({"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}).warnings


def test_a_base_of_other_sizes_is_refused_with_both_shapes(tmp_path: Path) -> None:
    wide = models.tiny_llama(layers=2, hidden=64)
    base = models.write_checkpoint(tmp_path / "wide", wide, fill=None)
    config = {"targets": ("q_proj",), "base_model_name_or_path": "acme/narrow"}
    error = refused(f"{base}+{lora(tmp_path, **config)}")
    assert "the product of" in error
    assert "has shape [32, 32], but model.layers.0.self_attn.q_proj.weight of" in error
    assert error.endswith("has [64, 64]; it was trained on acme/narrow: choose that model as base")


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_for_more_layers_is_refused_with_the_tensors_that_are_missing(tmp_path: Path, layers: int) -> None:
    """Also if the base has a single layer, whose names differ from those of others in the number alone."""
    deep = models.tiny_llama(layers=layers + 1).tensors
    base = models.write_checkpoint(tmp_path / "base", models.tiny_llama(layers=layers), fill=None)
    error = refused(f"{base}+{write_lora(tmp_path / 'a', deep, targets=('q_proj',))}")
    assert f"changes 1 tensor that {base} lacks: model.layers.{layers}.self_attn.q_proj.weight" in error


def test_a_module_that_could_be_two_is_refused_with_both(tmp_path: Path) -> None:
    shapes = {f"{tower}.blocks.{n}.q_proj.weight": (8, 8) for tower in ("left", "right") for n in range(2)}
    base = models.write_checkpoint(tmp_path / "base", shapes, fill=None)
    adapter = write_lora(tmp_path / "a", {"blocks.0.q_proj.weight": (8, 8)})
    error = refused(f"{base}+{adapter}")
    assert "1 tensor that could be several ones: blocks.0.q_proj.weight (" in error
    assert "left.blocks.0.q_proj.weight" in error
    assert "right.blocks.0.q_proj.weight" in error


def _no_config(base: Path, adapter: Path) -> str:
    (adapter / "adapter_config.json").unlink()
    return f"{base}+{adapter}"


def _nothing(base: Path, adapter: Path) -> str:
    return f"{base}+{adapter}-missing"


REFERENCES: dict[str, tuple[Callable[[Path, Path], str], type[Exception], str]] = {
    "an adapter alone": (lambda base, a: str(a), CheckpointError, "is a LoRA adapter of acme/base, not a model"),
    "the form": (lambda base, a: str(a), CheckpointError, "write `acme/base+{a}`"),
    "the adapter first": (lambda base, a: f"{a}+{base}", CheckpointError, "{a} is a LoRA adapter of acme/base"),
    "two models": (lambda base, a: f"{base}+{base}", CheckpointError, "to merge two models, list both under `models`"),
    "no config": (_no_config, CheckpointError, "there is no adapter_config.json with a `peft_type` next to it"),
    "a missing adapter": (_nothing, CheckpointError, "{a}-missing: there is no such directory or file"),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_references_that_name_something_else(tmp_path: Path, base: Path, case: str) -> None:
    form, kind, message = REFERENCES[case]
    adapter = lora(tmp_path, base_model_name_or_path="acme/base")
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels:\n- model: {form(base, adapter)}\n")
    with pytest.raises(kind) as caught:
        mergeloom.plan(recipe)
    assert message.format(a=adapter) in str(caught.value)


def test_a_stage_is_not_an_adapter(tmp_path: Path, base: Path) -> None:
    recipe = tmp_path / "r.yml"
    first = f"name: first\nmerge_method: passthrough\nmodels: [{{model: {base}}}]\n---\n"
    recipe.write_text(f"{first}merge_method: passthrough\nmodels: [{{model: {base}+first}}]\n")
    with pytest.raises(RecipeError, match="first is a stage, whose output is a model and not an adapter"):
        mergeloom.plan(recipe)


def test_replaced_tensors_cannot_be_added_up(tmp_path: Path, base: Path) -> None:
    norm = {f"{PREFIX}model.norm.weight": torch.ones(32)}
    a, b = (write_lora(tmp_path / name, LLAMA.tensors, more=norm) for name in "ab")
    assert f"{a} and {b} both have a tensor of their own for model.norm.weight" in refused(f"{base}+{a}+{b}")
    c = write_lora(tmp_path / "c", LLAMA.tensors, targets=("lm_head",))
    d = write_lora(tmp_path / "d", LLAMA.tensors, more={f"{PREFIX}lm_head.weight": torch.ones(HEAD)})
    for both in (f"{c}+{d}", f"{d}+{c}"):
        message = f"{d} has values of its own for lm_head.weight, and {c} changes it, too"
        assert message in refused(f"{base}+{both}")


def test_two_dora_adapters_of_a_matrix_cannot_be_added_up(tmp_path: Path, base: Path) -> None:
    more = {f"{Q}.lora_magnitude_vector": torch.ones(32)}
    shapes = {"model.layers.0.self_attn.q_proj.weight": (32, 32)}
    a, b = (write_lora(tmp_path / name, shapes, more=more, use_dora=True) for name in "ab")
    assert f"{a} and {b} are DoRA adapters" in refused(f"{base}+{a}+{b}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_end_the_merge_with_exit_code_4(tmp_path: Path, base: Path, value: float) -> None:
    factor = torch.zeros(4, 32)
    factor[1, 2] = value
    adapter = lora(tmp_path, more={f"{Q}.lora_A.weight": factor})
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {base}+{adapter}}}]\n")
    done = run("merge", recipe, tmp_path / "out")
    assert done.returncode == 4
    assert f"mergeloom: {recipe}:2: models[0].model: tensor {Q}.lora_A.weight of {adapter} holds NaN" in done.stderr
    assert "model.layers.0.self_attn.q_proj" in done.stderr
    assert str(adapter) in done.stderr


def test_fused_experts_of_an_unknown_architecture_or_orientation(tmp_path: Path) -> None:
    square = {"model.layers.0.mlp.experts.gate_up_proj": (3, 8, 8), "model.layers.0.w.weight": (8, 8)}
    a = {f"{PREFIX}model.layers.0.mlp.experts.lora_{which}.weight": torch.zeros(6, 8) for which in "A"}
    a |= {f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight": torch.zeros(8, 6)}
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1}
    base = models.write_checkpoint(tmp_path / "base", square, fill=None, config=config)
    stack = {"r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.gate_up_proj"]}
    known = write_adapter(tmp_path / "known", a, **stack)
    assert mergeloom.plan({"merge_method": "passthrough", "models": [{"model": f"{base}+{known}"}]})
    unknown = write_adapter(tmp_path / "unknown", a, **stack, peft_version=None)
    assert "the shapes fit in both orientations, and the config doesn't say which version" in refused(
        f"{base}+{unknown}"
    )
    more = write_adapter(
        tmp_path / "more", a, **{**stack, "target_parameters": ["mlp.experts.gate_up_proj", "down_proj"]}
    )
    assert "has 1 adapted parameter of model.layers.0.mlp.experts, but target_parameters names 2" in refused(
        f"{base}+{more}"
    )
    (base / "config.json").write_text(json.dumps(config | {"model_type": "other"}))
    assert "their layout is unknown for model_type 'other'" in refused(f"{base}+{known}")


def test_a_missing_adapter_is_named_with_its_line(tmp_path: Path, base: Path) -> None:
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels:\n- model:\n    model: {base}\n    lora: ./nothing-here/x\n")
    with pytest.raises((ModelNotFound, RecipeError), match=r"r\.yml:3: .*nothing-here/x: there is no such directory"):
        mergeloom.plan(recipe)


PLACES = {
    "incomplete": ({"more": {f"{Q}.lora_B.weight": None}}, "has {q}.lora_A.weight, but model.layers.0"),
    "another rank": ({"r": 8}, "adapter_config.json gives model.layers.0.mlp.down_proj the rank 8, but it is 4"),
    "another kind": ({"peft_type": "IA3"}, "is an adapter of the kind (IA)³"),
    "no such module": ({"more": {f"{PREFIX}score.weight": torch.zeros(2, 32)}}, "changes 1 tensor that"),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("stage", [False, True], ids=["of a model", "of a stage"])
def test_errors_have_the_line_of_the_model_with_the_adapter(tmp_path: Path, base: Path, case: str, stage: bool) -> None:
    """Not that of another entry with the base alone, and the name of the option if the command line gives the model."""
    changes, message = PLACES[case]
    adapter, recipe = lora(tmp_path, **changes), tmp_path / "r.yml"
    first = f"name: first\nmerge_method: passthrough\nmodels: [{{model: {base}}}]\n---\n" if stage else ""
    on, place = ("first", "9: [1].models[1].model") if stage else (base, "5: models[1].model")
    text = f"{first}merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n- model: {base}\n- model: MODEL\n"
    recipe.write_text(text.replace("MODEL", f"{on}+{adapter}"))
    ended = run("plan", recipe)
    assert ended.returncode == 4
    assert f"mergeloom: {recipe}:{place}: {adapter}" in ended.stderr
    assert message.format(q=Q) in ended.stderr
    if not stage:
        recipe.write_text(text.replace("MODEL", str(base)))
        ended = run("plan", recipe, "--set", f"models.1.model={on}+{adapter}")
        assert re.match(
            f"mergeloom: {recipe} with --set models.1.model=.*: models\\[1\\].model: {adapter}", ended.stderr
        )


def test_a_model_that_is_no_adapter_has_the_line_where_it_is_one(tmp_path: Path, base: Path) -> None:
    recipe = tmp_path / "r.yml"
    head = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n"
    recipe.write_text(f"{head}- model: {base}+{base}\n  parameters: {{weight: 1}}\n")
    assert f"{recipe}:4: models[0].model: {base} is applied to a model as an adapter" in run("plan", recipe).stderr
