"""Inputs that are not models are rejected, with what they are and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeloom.engine.model.checks.identify import not_a_model
from mergeloom.engine.model.inspect import inspect_model
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.models import Shape, encoder_dir, tiny_llama, write_checkpoint
from tests.support.outputs import read_model, same_tensors
from tests.support.plans import without_location
from tests.unit.graph.building import checkpoint

CPU = Options(device="cpu", threads=1)
LLAMA = tiny_llama(layers=2)
TARGET = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
LORA: dict[str, Shape] = {
    TARGET.format(layer, side): shape for layer in (0, 1) for side, shape in (("A", (2, 8)), ("B", (8, 2)))
}


def recipe(*models: Path | str, method: str = "linear") -> dict[str, Any]:
    parameters = {"parameters": {"weight": 0.5}} if method == "linear" else {}
    return {"merge_method": method, "models": [{"model": str(model)} | parameters for model in models]}


def refused(*models: Path | str, method: str = "linear") -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(recipe(*models, method=method), CPU)
    return without_location(caught.value)


def with_entry(recipe: dict[str, Any], advice: str) -> dict[str, Any]:
    """A recipe with the key that an error advises in each entry of `models`."""
    entry = yaml.safe_load(advice)
    assert entry.keys() == {"rename"}
    return recipe | {"models": [model | entry for model in recipe["models"]]}


def adapter(directory: Path, tensors: Mapping[str, Shape] = LORA, name: str = "adapter_model", **config: Any) -> Path:
    write_checkpoint(directory, tensors)
    (directory / "model.safetensors").rename(directory / f"{name}.safetensors")
    if config:
        (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def found(tensors: Mapping[str, Shape], **changes: Any) -> list[str]:
    """The first lines of the reasons why these tensors are not a model."""
    return [reason.partition("\n")[0] for reason in not_a_model(replace(checkpoint("x", tensors), **changes))]


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_an_adapter_is_rejected_with_its_base_and_the_way_to_apply_it(method: str, tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", peft_type="LORA", base_model_name_or_path="acme/base-8B")
    error = refused(a, method=method)
    assert error.startswith(f"{a} is a LoRA adapter of acme/base-8B, not a model (its weights are in adapter_model.saf")
    assert error.endswith(f"for the model with the adapter, write `acme/base-8B+{a}`")


def test_an_adapter_that_cannot_be_applied_is_rejected_with_a_script_that_merges_it(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", peft_type="IA3", base_model_name_or_path="acme/base-8B")
    error = refused(a)
    assert f"base, adapter = 'acme/base-8B', '{a}'" in error
    assert "PeftModel.from_pretrained(model, adapter).merge_and_unload()" in error
    compile(error.partition("\n\n")[2].replace("    ", ""), "advice", "exec")


def test_an_adapter_under_any_file_name_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", name="weights")
    reason = f"is an adapter (LoRA), not a model (it has a tensor '{TARGET.format(0, 'A')}'; rank 2)"
    assert refused(a).startswith(f"{a} {reason}")
    assert refused(a / "weights.safetensors").startswith(f"{a / 'weights.safetensors'} {reason}")


def test_an_adapter_next_to_other_files_of_its_training(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", peft_type="IA3", base_model_name_or_path="acme/base")
    write_checkpoint(a, {"v_head.summary.weight": (1, 8)})
    (a / "model.safetensors").rename(a / "value_head.safetensors")
    assert refused(a).startswith(f"{a} is an adapter (IA3) of acme/base, not a model")


ADAPTERS: dict[str, dict[str, Shape]] = {
    "embedding": {"base_model.model.embed.lora_embedding_A": (2, 8), "base_model.model.embed.lora_embedding_B": (8, 2)},
    "prompt": {"prompt_embeddings": (8, 4)},
    "with modules_to_save": LORA | {"base_model.model.lm_head.weight": (8, 4)},
    "unmerged": {
        "model.layers.0.q_proj.base_layer.weight": (8, 8),
        "model.layers.0.q_proj.lora_A.default.weight": (2, 8),
        "model.layers.0.q_proj.lora_B.default.weight": (8, 2),
    },
}


@pytest.mark.parametrize("tensors", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_of_all_kinds(tensors: dict[str, Shape]) -> None:
    assert found(tensors)[0].startswith(("is an adapter, not a model (it has ", "is an adapter ("))


MODELS: dict[str, dict[str, Shape]] = {
    "Llama": LLAMA.tensors,
    "DeepSeek's low-rank projections": {"model.layers.0.self_attn.q_a_proj.weight": (2, 8), "model.norm.weight": (8,)},
    "Phi-4-multimodal with its own adapters": {
        "model.layers.0.self_attn.o_proj.base_layer.weight": (8, 8),
        "model.layers.0.self_attn.o_proj.lora_A.vision.weight": (2, 8),
        "model.layers.0.self_attn.o_proj.lora_B.vision.weight": (8, 2),
    },
    "jina-embeddings-v3 with its own adapters": {
        "roberta.embeddings.word_embeddings.parametrizations.weight.original": (8, 8),
        "roberta.embeddings.word_embeddings.parametrizations.weight.0.lora_A": (5, 2, 8),
        "roberta.embeddings.word_embeddings.parametrizations.weight.0.lora_B": (5, 8, 2),
    },
    "a module named module": {"module.weight": (8, 8), "other.weight": (8, 8)},
    "an embedding without rows": {"extra.weight": (0, 8), "norm.weight": (8,)},
    "an empty buffer": {"rotary_emb.inv_freq": (0,), "norm.weight": (8,)},
}


@pytest.mark.parametrize("tensors", MODELS.values(), ids=MODELS)
def test_models_are_models(tensors: dict[str, Shape]) -> None:
    assert found(tensors) == []


def test_the_encoder_is_a_model() -> None:
    assert list(not_a_model(inspect_model(encoder_dir()).checkpoint)) == []


def test_inspect_shows_an_adapter_and_says_what_it_is(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", peft_type="LORA", base_model_name_or_path="acme/base")
    inspection = inspect_model(a)
    assert len(inspection.tensors) == 4
    assert any(remark.startswith("is a LoRA adapter of acme/base, not a model") for remark in inspection.remarks)


# ------------------------------------------------------------------------------------------------ other files

OTHERS: dict[str, tuple[dict[str, Shape], str]] = {
    "Adam": (
        {"state.model.norm.weight.exp_avg": (8,), "state.model.norm.weight.exp_avg_sq": (8,)},
        "is the state of an optimizer, not a model (it has a tensor 'state.model.norm.weight.exp_avg')",
    ),
    "model and optimizer": (
        {"model.norm.weight": (8,), "optimizer.norm.weight.momentum_buffer": (8,)},
        "is the state of an optimizer, not a model (it has a tensor 'optimizer.norm.weight.momentum_buffer')",
    ),
    "textual inversion of diffusers": ({"<cat-toy>": (1, 8)}, "contains the embeddings of a textual inversion"),
    "textual inversion of SDXL": (
        {"clip_l": (2, 8), "clip_g": (2, 16)},
        "contains the embeddings of a textual inversion",
    ),
    "sharded trainer": (
        {"lm_head.weight": (0,), "model.embed_tokens.weight": (0,), "model.norm.weight": (0,)},
        "has 3 tensors without values (lm_head.weight, model.embed_tokens.weight, model.norm.weight; shape [0])",
    ),
    "sharded trainer, in part": (
        {"model.embed_tokens.weight": (8, 8), "model.norm.weight": (0,)},
        "has 1 tensor without values (model.norm.weight; shape [0])",
    ),
    "nothing but empty tensors": ({"a.weight": (0, 8), "b.weight": (8, 0)}, "has 2 tensors without values"),
}


@pytest.mark.parametrize(("tensors", "reason"), OTHERS.values(), ids=OTHERS)
def test_what_is_not_a_model_is_rejected(tensors: dict[str, Shape], reason: str, tmp_path: Path) -> None:
    assert found(tensors)[0].startswith(reason)
    a = write_checkpoint(tmp_path / "a", tensors)
    assert refused(a).startswith(f"{a} {reason}")
    assert refused(a, method="passthrough").startswith(f"{a} {reason}")


def test_a_single_shard_is_rejected_as_an_input_but_not_by_inspect(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", LLAMA, shard_bytes=20_000)
    shards = sorted(a.glob("*.safetensors"))
    assert len(shards) > 1
    assert refused(shards[0]).startswith(f"{shards[0]} is shard 1 of {len(shards)} of a model: use the path of the dir")
    assert any(remark.startswith("is shard 1 of ") for remark in inspect_model(shards[0]).remarks)
    assert plan(recipe(a), CPU).built.layers == plan(recipe(a / "model.safetensors.index.json"), CPU).built.layers == 2


# ------------------------------------------------------------------------------------------------ wrappers

WRAPPED = {
    "DDP": ("module.", lambda name: f"module.{name}"),
    "compile": ("_orig_mod.", lambda name: f"_orig_mod.{name}"),
    "compile of each layer": ("_orig_mod.", lambda name: name.replace("self_attn.", "_orig_mod.self_attn.")),
    "FSDP": (
        "_fsdp_wrapped_module.",
        lambda name: f"_fsdp_wrapped_module.{name.replace('self_attn.', '_fsdp_wrapped_module.self_attn.')}",
    ),
    "PEFT": ("base_model.model.", lambda name: f"base_model.model.{name}"),
    "DDP of compile": ("_orig_mod.", lambda name: f"module._orig_mod.{name}"),
    "compile of DDP": ("_orig_mod.", lambda name: f"_orig_mod.module.{name}"),
    "checkpointing": ("_checkpoint_wrapped_module.", lambda name: f"_checkpoint_wrapped_module.{name}"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("inputs", ["all", "first", "second"])
def test_names_with_the_prefix_of_a_wrapper_are_rejected(wrapper: str, inputs: str, tmp_path: Path) -> None:
    prefix, rename = WRAPPED[wrapper]
    renamed = {rename(name): shape for name, shape in LLAMA.tensors.items()}
    models = []
    for number, name in enumerate(("a", "b")):
        wrapped = inputs == "all" or (inputs == "first") == (number == 0)
        tensors = renamed if wrapped else LLAMA.tensors
        models.append(write_checkpoint(tmp_path / name, tensors, fill=number, config=LLAMA.config))
    culprit = models[inputs == "second"]
    error = refused(*models)
    assert error.startswith(f"{culprit} has names with '{prefix}', which a wrapper such as DDP")


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_advice_removes_the_prefix(wrapper: str, tmp_path: Path) -> None:
    _, rename = WRAPPED[wrapper]
    original = write_checkpoint(tmp_path / "original", LLAMA)
    values = read_model(original)
    wrapped = {rename(name): value for name, value in values.items()}
    a = write_checkpoint(tmp_path / "a", wrapped, shard_bytes=20_000, config=LLAMA.config)
    advice = refused(a).partition("\n\n")[2]
    assert ("import" in advice) == (wrapper in ("compile of each layer", "FSDP"))
    if "import" in advice:
        exec("\n".join(line[4:] for line in advice.splitlines()), {})
        merge(recipe(tmp_path / "a-renamed", method="passthrough"), tmp_path / "out", CPU)
    else:
        merge(with_entry(recipe(a, method="passthrough"), advice), tmp_path / "out", CPU)
    assert same_tensors(read_model(tmp_path / "out"), values)


# ------------------------------------------------------------------------------------------------ unknown wrappers

PREFIXES = ["model.", "pretrained_model.", "llm.", "student.", "net.", "policy.actor."]
BERT: dict[str, Shape] = {
    "embeddings.word_embeddings.weight": (32, 8),
    "encoder.layer.0.output.dense.weight": (8, 8),
    "encoder.layer.1.output.dense.weight": (8, 8),
}


def with_config(tensors: Mapping[str, Shape], architecture: str = "LlamaForCausalLM", **config: Any) -> Iterator[str]:
    config = LLAMA.config | {"architectures": [architecture]} | config
    return not_a_model(replace(checkpoint("x", tensors), config=config))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_of_a_known_architecture_is_rejected_and_the_advice_works(
    prefix: str, tmp_path: Path
) -> None:
    values = read_model(write_checkpoint(tmp_path / "original", LLAMA, dtype="F32"))
    renamed = {prefix + name: value for name, value in values.items()}
    pair = [
        write_checkpoint(tmp_path / name, renamed, dtype="F32", shard_bytes=20_000, config=LLAMA.config)
        for name in ("a", "b")
    ]
    error = refused(*pair)
    assert error.startswith(
        f"{pair[0]} has names with '{prefix}', which a module around the model adds during training"
    )
    assert "LlamaForCausalLM (config.json) has 'model.embed_tokens.weight', not" in error
    assert f"{len(values)} of the {len(values)} tensors have the prefix. No program" in error
    merge(with_entry(recipe(*pair), error.partition("\n\n")[2]), tmp_path / "out", CPU)
    assert same_tensors(read_model(tmp_path / "out"), values)


def test_tensors_without_the_prefix_are_named() -> None:
    tensors = {f"model.{name}": shape for name, shape in LLAMA.tensors.items()} | {"criterion.weight": (8,)}
    (reason,) = with_config(tensors)
    assert "have the prefix. The other 1 tensor (criterion.weight) keep their names." in reason


@pytest.mark.parametrize(
    ("architecture", "prefix", "found"),
    [
        ("BertModel", "0.auto_model.", "0.auto_model."),
        ("BertForSequenceClassification", "model.bert.", "model."),
        ("XLMRobertaModel", "encoder.roberta.", "encoder."),
        ("BertModel", "", None),
        ("BertModel", "bert.", None),
        ("BertForMaskedLM", "bert.", None),
        ("XLMRobertaModel", "roberta.", None),
        ("DPRQuestionEncoder", "question_encoder.bert_model.", None),
    ],
)
def test_prefixes_of_encoders(architecture: str, prefix: str, found: str | None) -> None:
    reasons = list(with_config({prefix + name: shape for name, shape in BERT.items()}, architecture))
    assert [reason.startswith(f"has names with '{found}', which") for reason in reasons] == [True] * (found is not None)


TEXT = {"model_type": "llama", "hidden_size": 8}


@pytest.mark.parametrize(
    ("architecture", "prefix", "config"),
    [
        ("LlamaForCausalLM", "", {}),
        ("LlamaModel", "net.", {}),
        ("NewModel", "net.", {}),
        ("DeepseekVLV2ForCausalLM", "language.", {"language_config": TEXT, "vision_config": {"model_type": "vision"}}),
        ("FuyuForCausalLM", "language_model.", {}),
        ("Gemma3ForCausalLM", "language_model.", {}),
        ("InternLMForCausalLM", "net.", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
        ("LlavaForConditionalGeneration", "language_model.", {"text_config": TEXT}),
        ("BartForConditionalGeneration", "", {}),
    ],
)
def test_prefixes_that_models_have_are_accepted(architecture: str, prefix: str, config: dict[str, Any]) -> None:
    tensors = {prefix + name: shape for name, shape in LLAMA.tensors.items()}
    assert list(with_config(tensors, architecture, **config)) == []


def test_the_base_of_an_encoder_decoder_is_not_a_wrapper() -> None:
    tensors: dict[str, Shape] = {"model.shared.weight": (8, 8), "model.decoder.embed_tokens.weight": (8, 8)}
    assert list(with_config(tensors, "BartForConditionalGeneration")) == []
    (reason,) = with_config({f"net.{name}": s for name, s in tensors.items()}, "BartForConditionalGeneration")
    assert reason.startswith("has names with 'net.', which")
    t5: dict[str, Shape] = {"shared.weight": (8, 8), "encoder.block.0.w": (8, 8)}
    assert list(with_config(t5, "T5EncoderModel")) == []
    (reason,) = with_config({f"net.{name}": s for name, s in t5.items()}, "T5EncoderModel")
    assert reason.startswith("has names with 'net.', which")
