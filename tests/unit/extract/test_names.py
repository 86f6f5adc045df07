"""What modules are by their names, and what they are called in the loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.run.extract.names import (
    EMBEDDING_MODULES,
    has_head,
    in_loaded_model,
    is_embedding_module,
    is_head_module,
    is_router,
    is_transposed,
    module_prefix,
    tied_head,
)
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.io.tensors.dtypes import F32
from mergeloom.io.tensors.refs import TensorRef


def checkpoint(architecture: str, *names: str) -> Checkpoint:
    """A checkpoint of an architecture with tensors of these names."""
    tensors = {name: TensorRef(Path("x"), 0, 4, F32, (1,)) for name in names}
    return Checkpoint(Path("x"), tensors, {"architectures": [architecture]}, {}, (), ())


@pytest.mark.parametrize("pattern", EMBEDDING_MODULES, ids=lambda each: each.example)
def test_each_example_is_an_embedding(pattern: tuple[str, str]) -> None:
    assert is_embedding_module(pattern[1].removesuffix(".weight"))


@pytest.mark.parametrize(
    "module",
    [
        "lm_head",
        "embed_out",
        "encoder.embedding_hidden_mapping_in",
        "visual.patch_embed.proj",
        "model.layers.0.self_attn.q_proj",
        "model.norm",
        "time_embedding.linear_1",
    ],
)
def test_other_modules_are_not_embeddings(module: str) -> None:
    assert not is_embedding_module(module)


@pytest.mark.parametrize(
    ("module", "head"),
    [("lm_head", True), ("embed_out", True), ("model.embed_tokens", False), ("score", False)],
)
def test_heads(module: str, head: bool) -> None:
    assert is_head_module(module) is head


@pytest.mark.parametrize(
    ("module", "router"),
    [
        ("model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.router", True),
        ("model.layers.0.mlp.gate_proj", False),
        ("model.layers.0.mlp.shared_expert_gate", False),
    ],
)
def test_routers(module: str, router: bool) -> None:
    assert is_router(module) is router


@pytest.mark.parametrize(
    ("kind", "module", "transposed"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", True),
        ("gpt2", "lm_head", False),
        ("gpt_bigcode", "transformer.h.0.attn.c_attn", False),
        ("llama", "model.layers.0.mlp.c_fc", False),
        (None, "h.0.attn.c_attn", False),
    ],
)
def test_transposed_layers(kind: str | None, module: str, transposed: bool) -> None:
    assert is_transposed(module, {"model_type": kind}) is transposed


@pytest.mark.parametrize(
    ("architecture", "names", "prefix"),
    [
        ("GPT2LMHeadModel", ["wte.weight", "h.0.ln_1.weight"], "transformer."),
        ("GPT2LMHeadModel", ["transformer.wte.weight"], ""),
        ("GPT2Model", ["wte.weight"], ""),
        ("LlamaForCausalLM", ["embed_tokens.weight"], "model."),
        ("LlamaForCausalLM", ["model.embed_tokens.weight"], ""),
        ("OPTForCausalLM", ["decoder.embed_tokens.weight"], "model."),
        ("BloomForCausalLM", ["word_embeddings.weight"], "transformer."),
        ("BertForMaskedLM", ["embeddings.word_embeddings.weight"], "bert."),
        ("BertForMaskedLM", ["bert.embeddings.word_embeddings.weight"], ""),
        ("BertModel", ["embeddings.word_embeddings.weight"], ""),
        ("T5ForConditionalGeneration", ["shared.weight"], ""),
        ("MBartForConditionalGeneration", ["shared.weight"], "model."),
        ("SomethingElse", ["a.weight"], ""),
    ],
)
def test_the_prefix_that_names_lack(architecture: str, names: list[str], prefix: str) -> None:
    assert module_prefix(checkpoint(architecture, *names)) == prefix


def test_a_head_is_outside_of_the_base_model() -> None:
    assert in_loaded_model("h.0.attn.c_attn", "transformer.") == "transformer.h.0.attn.c_attn"
    assert in_loaded_model("lm_head", "transformer.") == "lm_head"
    assert in_loaded_model("lm_head.weight", "transformer.") == "lm_head.weight"


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "lm_head"),
        ({"architectures": ["GPT2LMHeadModel"]}, "lm_head"),
        ({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}, "embed_out"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "lm_head"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, ""),
        ({"architectures": ["BertForMaskedLM"]}, ""),
    ],
)
def test_the_head_that_is_tied(config: dict[str, object], head: str) -> None:
    assert has_head(config)
    assert tied_head(config) == head


def test_bare_models_have_no_head() -> None:
    assert not has_head({"architectures": ["LlamaModel"]})
    assert not has_head({})
