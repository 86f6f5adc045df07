"""The config.json files of the inputs are compared: what differs is an error, a warning, or harmless."""

from __future__ import annotations

from typing import Any

import pytest

from mergeloom.engine.files.config.compare import NamedConfig, compare_configs, compare_layers
from mergeloom.engine.model.warnings import ModelWarning, ModelWarningKind
from mergeloom.errors import CheckpointError
from tests.support.models import tiny_llama

BASE: dict[str, Any] = tiny_llama().config


def compared(first: dict[str, Any], second: dict[str, Any], *, chosen: bool = False) -> list[ModelWarning]:
    """The warnings about models ``a`` and ``b``, if the config of ``a`` is used."""
    models = [NamedConfig("a", BASE | first), NamedConfig("b", BASE | second)]
    return compare_configs(models[0], models, chosen=chosen)


def test_one_warning_names_all_keys_with_both_values_and_the_one_that_is_used() -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0}
    (warning,) = compared({}, {"rope_theta": 10000.0, "max_position_embeddings": 32768, "rope_scaling": scaled})
    assert warning.kind is ModelWarningKind.CONFIG_DIFFERS
    assert set(warning.names) == {"rope_theta", "max_position_embeddings", "rope_scaling"}
    assert "rope_theta is 500000.0 in a (used) and 10000.0 in b" in warning.problem
    assert "max_position_embeddings is 8192 in a (used) and 32768 in b" in warning.problem
    assert 'rope_scaling is null in a (used) and {"factor": 4.0, "rope_type": "yarn"} in b' in warning.problem
    assert "base_model or files_from" in warning.advice


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("sliding_window", 4096, None),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("embedding_multiplier", 12.0, 1.0),
        ("final_logit_softcapping", 30.0, None),
        ("hidden_act", "gelu", "gelu_new"),
        ("partial_rotary_factor", 0.5, 1.0),
        ("vision_config", {"patch_size": 14}, {"patch_size": 16}),
        ("an_unknown_key", "x", "y"),
        ("moe_top_k", 2, 4),
        ("attn_temperature_tuning", True, False),
        ("output_multiplier", 1.0, 2.0),
        ("output_gate_type", "swish", "sigmoid"),
        ("conv_kernel", [10, 3], [10, 2]),
        ("pos_att_type", "p2c|c2p", ["c2p"]),
    ],
)
def test_a_key_that_changes_the_result(key: str, first: Any, second: Any) -> None:
    (warning,) = compared({key: first}, {key: second})
    assert [name.partition(".")[0] for name in warning.names] == [key]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"transformers_version": "5.0.0", "torch_dtype": "float16", "use_cache": False, "_name_or_path": "x/y"}),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 3], "pad_token_id": 0}),
        ({"id2label": {"0": "x"}}, {"id2label": {"0": "y"}, "attention_dropout": 0.1, "initializer_range": 0.01}),
        ({"rope_scaling": None}, {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"rope_scaling": {"type": "mrope"}}, {"rope_scaling": {"type": "default", "rope_type": "default"}}),
        ({"use_sliding_window": False, "sliding_window": 1}, {"use_sliding_window": False, "sliding_window": None}),
        ({"head_dim": None}, {}),
        ({"model_type": "gemma", "hidden_act": "gelu"}, {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}),
        ({"layer_types": ["full_attention"] * 4}, {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}),
        ({"vocab_size": 64}, {"vocab_size": 65, "tie_word_embeddings": True}),
        ({"rope_theta": 10000}, {"rope_theta": 10000.0}),
        ({"quantization_config": {"quant_method": "fp8"}}, {}),
        ({"apply_spec_augment": True, "mask_time_prob": 0.05}, {"apply_spec_augment": False, "mask_time_prob": 0.0}),
        ({"forced_decoder_ids": [[1, 50259]], "num_beams": 1}, {"forced_decoder_ids": None, "num_beams": 5}),
        ({"top_k": 20, "temperature": 0.6, "typical_p": 1.0}, {"top_k": 50, "temperature": 1.0, "typical_p": 0.9}),
        ({"output_hidden_states": True, "use_mamba_kernels": True, "is_training": True}, {"is_training": False}),
        ({"pos_att_type": "p2c|c2p"}, {"pos_att_type": ["p2c", "c2p"]}),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {"rope_local_base_freq": 10000.0}),
    ],
)
def test_what_published_fine_tunes_differ_in_is_harmless(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert compared(first, second) == []


def test_a_missing_rope_theta_is_the_default() -> None:
    other = {key: value for key, value in BASE.items() if key != "rope_theta"}
    models = [NamedConfig("a", BASE), NamedConfig("b", other)]
    (warning,) = compare_configs(models[0], models, chosen=False)
    assert "rope_theta is 500000.0 in a (used) and 10000 in b" in warning.problem
    models[0] = NamedConfig("a", BASE | {"rope_theta": 10000.0})
    assert compare_configs(models[0], models, chosen=False) == []


@pytest.mark.parametrize(
    ("key", "first", "second", "says"),
    [
        ("num_attention_heads", 4, 8, "num_attention_heads is 4 in a (used) and 8 in b"),
        ("num_key_value_heads", 2, 1, "num_key_value_heads is 2 in a (used) and 1 in b"),
        ("head_dim", 8, 16, "head_dim is 8 in a (used) and 16 in b"),
        ("hidden_act", "silu", "gelu", "hidden_act is silu in a (used) and gelu in b"),
        ("model_type", "llama", "qwen3", "model_type is llama in a and qwen3 in b"),
        ("vision_config", {"num_heads": 2}, {"num_heads": 4}, "vision_config.num_heads is 2 in a (used) and 4 in b"),
    ],
)
def test_what_changes_the_meaning_of_a_tensor_is_an_error(key: str, first: Any, second: Any, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        compared({key: first}, {key: second})
    assert says in str(caught.value)
    assert "files_from" in str(caught.value)
    (warning,) = compared({key: first}, {key: second}, chosen=True)
    assert says in warning.problem


def test_a_config_that_is_chosen_is_only_compared_with_what_no_model_states() -> None:
    named, same = NamedConfig("n", BASE | {"rope_theta": 7.0}), NamedConfig("n", BASE | {"rope_theta": 500000.0})
    models = [NamedConfig("a", BASE), NamedConfig("b", BASE | {"rope_theta": 8.0})]
    (warning,) = compare_configs(named, models, chosen=True)
    assert "rope_theta is 7.0 in n (used) and 500000.0 in a and 8.0 in b" in warning.problem
    assert compare_configs(same, models, chosen=True) == []
    assert compare_configs(models[1], models, chosen=True) == []


def test_the_text_part_of_another_model_is_compared_by_its_section() -> None:
    text = {"model_type": "gemma3_text", "rms_norm_eps": 1e-6, "num_hidden_layers": 4}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip"}}
    models = [NamedConfig("t", text), NamedConfig("v", whole, ("text_config",))]
    assert compare_configs(models[0], models, chosen=False) == []
    models[0] = NamedConfig("t", text | {"rms_norm_eps": 1e-5})
    assert compare_configs(models[0], models, chosen=False)[0].names == ("rms_norm_eps",)
    models[0] = NamedConfig("t", text | {"model_type": "llama"})
    with pytest.raises(CheckpointError, match="model_type is llama in t and gemma3_text in v"):
        compare_configs(models[0], models, chosen=False)


VISION = {"vision_config": {"model_type": "v"}}


@pytest.mark.parametrize(
    ("whole", "text"),
    [
        ({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}, "qwen2"),
        ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}}, "qwen3"),
        ({"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}, "qwen3_moe"),
        ({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}, "llama"),
        ({"model_type": "qwen2_vl"}, "qwen2"),
    ],
)
def test_a_vision_language_model_and_the_text_model_that_it_was_made_from(whole: dict[str, Any], text: str) -> None:
    path = ("text_config",) if "text_config" in whole else ()
    models = [NamedConfig("v", whole | VISION, path), NamedConfig("t", {"model_type": text})]
    (warning,) = compare_configs(models[0], models, chosen=False)
    assert f"in v and {text} in t" in warning.problem
    assert warning.names == ("model_type",)
    for other in (NamedConfig("t", {"model_type": "phi3"}), NamedConfig("t", {"model_type": text} | VISION)):
        with pytest.raises(CheckpointError, match="model_type is"):
            compare_configs(models[0], [models[0], other], chosen=False)
    (reverse,) = compare_configs(models[1], models[::-1], chosen=False)  # the text part merged into the text model
    assert f"model_type is {text} in t and" in reverse.problem


def test_the_advice_does_not_name_a_base_model_that_the_recipe_has() -> None:
    models = [NamedConfig("a", BASE), NamedConfig("b", BASE | {"rope_theta": 1.0})]
    (warning,) = compare_configs(models[0], models, chosen=False, has_base=True)
    assert warning.advice.endswith("name the model that has the right one with files_from")


def test_layers_of_different_kinds_that_are_combined() -> None:
    kinds = ["full", "sliding", "full", "sliding"]
    models = {
        0: NamedConfig("a", {"layer_types": kinds, "mlp_only_layers": [0]}),
        1: NamedConfig("b", {"layer_types": kinds, "mlp_only_layers": [0]}),
        2: NamedConfig("c", {}),
    }
    assert list(compare_layers(models, [((0, n), (1, n), (2, n)) for n in range(4)])) == []
    first, second = compare_layers(models, [((0, n), (1, n + 1)) for n in range(3)])
    assert first.problem == (
        "layer_types: layer 0 of the output combines full (layer 0 of a) and sliding (layer 1 of b), and 2 more layers "
        "do, too"
    )
    assert second.problem.startswith("mlp_only_layers: layer 0 of the output combines listed (layer 0 of a)")
    assert first.kind is ModelWarningKind.LAYER_RULE
