"""The output's config.json follows the written tensors, and says what it changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.model.warnings import ModelWarning, ModelWarningKind
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.models import Model, deepseek_v3, perturbed_encoder, tiny_llama, write_checkpoint
from tests.support.plans import linear, sliced

CPU = Options(device="cpu", threads=1)
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(name, model, dtype=, config=, without=)``: a checkpoint whose config.json has some other keys."""

    def make(
        name: str,
        model: Model | None = None,
        *,
        dtype: str | dict[str, str] = "BF16",
        without: tuple[str, ...] = (),
        **config: Any,
    ) -> Path:
        model = model or tiny_llama()
        keys = {key: value for key, value in model.config.items() if key not in without} | config
        return write_checkpoint(tmp_path / name, model.tensors, dtype=dtype, fill=None, config=keys)

    return make


def result(recipe: dict[str, Any]) -> tuple[dict[str, Any], list[ModelWarning], Plan]:
    """The planned config.json, and the warnings about models."""
    planned = plan(recipe, CPU)
    found = [finding for finding in planned.findings if isinstance(finding, ModelWarning)]
    assert planned.files.config is not None
    return dict(planned.files.config), found, planned


def only(warnings: list[ModelWarning], kind: ModelWarningKind) -> str:
    """The text of the single warning, which is of this kind."""
    assert [warning.kind for warning in warnings] == [kind], [str(warning) for warning in warnings]
    return str(warnings[0])


def added(model: Model, *rests: str) -> Model:
    """The model with more tensors in each layer, of the widths of its queries."""
    count = model.config["num_hidden_layers"]
    tensors = {f"model.layers.{layer}.{rest}": (32,) for layer in range(count) for rest in rests}
    return Model(model.tensors | tensors, model.config)


# ------------------------------------------------------------------------------------------------ comparison


def test_fine_tunes_as_they_are_published_give_no_warning(make: Make) -> None:
    a = make("a", transformers_version="4.40.0", use_cache=False, torch_dtype="float16", eos_token_id=[1, 2])
    b = make("b", _name_or_path="x", eos_token_id=2)
    assert result(linear(a, b))[1] == []


def test_the_real_encoder_and_a_fine_tune_give_no_warning(encoder: Path, tmp_path: Path) -> None:
    tuned = perturbed_encoder(tmp_path / "tuned", 1)
    config, warnings, _ = result(linear(encoder, tuned))
    assert warnings == []
    assert config == json.loads((encoder / "config.json").read_text())


def test_the_base_gives_the_config_and_is_compared(make: Make) -> None:
    a, b, base = make("a"), make("b"), make("base", rope_theta=10000.0)
    config, warnings, _ = result(linear(a, b, base, base_model=str(base)))
    assert config["rope_theta"] == 10000.0
    text = only(warnings, ModelWarningKind.CONFIG_DIFFERS)
    assert f"rope_theta is 10000.0 in {base} (used) and 500000.0 in {a} and {b}" in text
    assert result(linear(a, b, files_from=str(a)))[1] == []


def test_head_counts_are_an_error_unless_the_config_is_chosen(make: Make) -> None:
    a, b = make("a"), make("b", num_attention_heads=8, head_dim=4)
    with pytest.raises(CheckpointError, match="num_attention_heads is 4 in .*used.* and 8 in"):
        plan(linear(a, b), CPU)
    text = only(result(linear(a, b, files_from=str(a)))[1], ModelWarningKind.CONFIG_DIFFERS)
    assert "num_attention_heads is 4" in text


@pytest.mark.parametrize(
    ("first", "second", "tensor", "shape"),
    [
        ("gpt_oss", "qwen3_moe", "mlp.experts.down_proj", (2, 32, 32)),
        ("gpt2", "gpt_bigcode", "attn.c_proj.weight", (32, 32)),
    ],
)
def test_square_matrices_that_are_stored_transposed(
    first: str, second: str, tensor: str, shape: tuple[int, ...], make: Make
) -> None:
    llama = tiny_llama(layers=1)
    model = Model(llama.tensors | {f"model.layers.0.{tensor}": shape}, llama.config)
    a, b = make("a", model, model_type=first), make("b", model, model_type=second)
    with pytest.raises(CheckpointError, match=f"model_type is {first} in .* and {second} in"):
        plan(linear(a, b), CPU)
    with pytest.raises(CheckpointError, match=f"is stored transposed in .*a .{first}. compared with .*b .{second}."):
        plan(linear(a, b, files_from=str(a)), CPU)


def test_per_layer_lists_come_from_the_model_that_provides_the_layer(make: Make) -> None:
    full, sliding = "full_attention", "sliding_attention"
    a = make("a", layer_types=[full] * 4, dense_layers=[0], other_list=[1, 2, 3, 4])
    b = make(
        "b", tiny_llama(layers=6), layer_types=[sliding, full] * 3, dense_layers=[5], other_list=[5, 6, 7, 8, 9, 10]
    )
    config, warnings, _ = result(sliced((a, 0, 4), (b, 2, 6)))
    assert config["layer_types"] == [full] * 4 + [sliding, full] * 2
    assert config["dense_layers"] == [0, 7]
    assert config["other_list"] == [1, 2, 3, 4, 7, 8, 9, 10]
    assert "other_list has as many entries" in only(warnings, ModelWarningKind.LAYER_RULE)
    config, _, _ = result(sliced((b, 0, 2), (a, 0, 2), base_model=str(a)))
    assert config["layer_types"] == [sliding, full, full, full]
    # layers in the same order, but the second one is another model's
    config, _, _ = result(sliced((a, 0, 1), (b, 0, 1), (a, 2, 4)))
    assert config["layer_types"] == [full, sliding, full, full]


def test_layers_of_different_kinds_in_one_slice(make: Make) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    a, b = make("a", layer_types=kinds), make("b", layer_types=kinds)
    sources = [{"model": str(a), "layer_range": [0, 3]}, {"model": str(b), "layer_range": [1, 4]}]
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "slices": [{"sources": sources}]}
    text = only(result(recipe)[1], ModelWarningKind.LAYER_RULE)
    assert (
        f"layer 0 of the output combines full_attention (layer 0 of {a}) and sliding_attention (layer 1 of {b})" in text
    )


# ------------------------------------------------------------------------------------------------ quantization


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantization_is_only_described_if_something_is_quantized(key: str, make: Make) -> None:
    a, b = make("a", **{key: {"quant_method": "fp8"}}), make("b")
    config, warnings, _ = result(linear(a, b))
    assert key not in config
    assert f"{key} of {a} is removed from config.json" in only(warnings, ModelWarningKind.QUANTIZATION)
    config, warnings, _ = result(sliced((a, 0, 2), (a, 1, 4)))
    assert key not in config
    assert len(warnings) == 1


def test_parameters_with_a_name_like_a_scale_are_not_quantized(make: Make) -> None:
    llama = tiny_llama()
    model = Model(llama.tensors | {"model.layers.0.hc_attn_scale": (3,)}, llama.config)  # DeepSeek-V4's
    assert result(linear(make("a", model), make("b", model)))[1] == []


def test_packed_tensors_that_pass_through_keep_it(make: Make) -> None:
    llama = tiny_llama()
    packed = {name: "F8_E4M3" for name in llama.tensors if name.endswith("down_proj.weight")}
    scales = {f"{name}_scale": (1,) for name in packed}
    model = Model(llama.tensors | scales, llama.config)
    dtypes = {name: packed.get(name, "BF16") for name in model.tensors}
    a = make("a", model, dtype=dtypes, quantization_config={"quant_method": "fp8"})
    config, warnings, _ = result(sliced((a, 0, 4)))
    assert config["quantization_config"] == {"quant_method": "fp8"}
    assert warnings == []
    b = make("b", model, dtype=dtypes)
    text = only(result(sliced((b, 0, 4)))[1], ModelWarningKind.QUANTIZATION)
    assert "the output has quantized tensors (model.layers.0.mlp.down_proj.weight" in text


def test_a_model_that_is_quantized_when_it_is_loaded_keeps_its_description(make: Make) -> None:
    online = {"quant_method": "bitnet", "quantization_mode": "online"}
    config, warnings, _ = result(linear(make("a", quantization_config=online), make("b", quantization_config=online)))
    assert config["quantization_config"] == online
    assert warnings == []


# ------------------------------------------------------------------------------------------------ vocabulary, head


def test_vocab_size_follows_the_rows(make: Make) -> None:
    a, b = make("a", vocab_size=60), make("b")
    config, warnings, _ = result(linear(a, b))
    assert config["vocab_size"] == 64
    text = only(warnings, ModelWarningKind.CONFIG_CHANGED)
    assert "vocab_size is set to 64, the number of rows of model.embed_tokens.weight" in text
    assert "states 60" in text


@pytest.mark.parametrize("padding", [{"pad_vocab_size_multiple": 8}, {"embedding_size": 64}, {"padded_vocab_size": 64}])
def test_padded_rows_that_config_json_describes(padding: dict[str, int], make: Make) -> None:
    config, warnings, _ = result(linear(make("a", vocab_size=60, **padding), make("b", vocab_size=60, **padding)))
    assert config["vocab_size"] == 60
    assert warnings == []


def test_vocab_size_in_nested_sections(make: Make) -> None:
    llama = tiny_llama()
    text = {key: llama.config[key] for key in ("num_hidden_layers", "model_type")} | {"vocab_size": 60}
    config = {"model_type": "llava", "vocab_size": 60, "text_config": text, "vision_config": {"vocab_size": 60}}
    a = write_checkpoint(make("a").parent / "v", llama.tensors, fill=None, config=config)
    found = result(sliced((a, 0, 4)))[0]
    assert (found["vocab_size"], found["text_config"]["vocab_size"]) == (64, 64)
    assert found["vision_config"]["vocab_size"] == 60


@pytest.mark.parametrize(
    ("model_type", "stated", "expected"),
    [
        ("llama", False, True),
        ("llama", None, True),
        ("llama", True, True),
        ("gemma2", None, None),  # its default is true
        ("gemma2", False, True),
        ("t5", False, False),  # the key has another meaning, too
    ],
)
def test_a_model_without_a_head(model_type: str, stated: bool | None, expected: bool | None, make: Make) -> None:
    config = {} if stated is None else {"tie_word_embeddings": stated}
    a = make("a", tiny_llama(tied=True), without=("tie_word_embeddings",), model_type=model_type, **config)
    found, warnings, _ = result(linear(a))
    assert found.get("tie_word_embeddings") is expected
    if stated is True or expected is None:
        assert warnings == []
    else:
        assert "the output has no head (lm_head), and tie_word_embeddings" in only(warnings, ModelWarningKind.HEAD)


def test_an_encoder_needs_no_head(make: Make) -> None:
    a = make("a", tiny_llama(tied=True), architectures=["LlamaModel"], tie_word_embeddings=False)
    found, warnings, _ = result(linear(a))
    assert found["tie_word_embeddings"] is False
    assert warnings == []


def test_a_head_under_an_unknown_name_is_left_alone(make: Make) -> None:
    llama = tiny_llama(tied=True)
    model = Model(llama.tensors | {"lm_head.linear.weight": (64, 32)}, llama.config | {"tie_word_embeddings": False})
    found, warnings, _ = result(linear(make("a", model)))
    assert found["tie_word_embeddings"] is False
    assert warnings == []


def test_the_sections_agree_about_the_tied_head(make: Make) -> None:
    llama = tiny_llama(tied=True)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": llama.config,
    }
    a = write_checkpoint(make("x").parent / "a", llama.tensors, fill=None, config=config)
    found, warnings, _ = result(linear(a))
    assert found["tie_word_embeddings"] is found["text_config"]["tie_word_embeddings"] is True
    assert "is false in config.json" in only(warnings, ModelWarningKind.HEAD)
    config |= {"tie_word_embeddings": True, "text_config": llama.config | {"tie_word_embeddings": False}}  # GOT-OCR 2
    b = write_checkpoint(make("y").parent / "b", llama.tensors, fill=None, config=config)
    found, warnings, _ = result(linear(b))
    assert found["tie_word_embeddings"] is found["text_config"]["tie_word_embeddings"] is True
    assert warnings == []


def test_more_embeddings_than_the_head_predicts(make: Make) -> None:
    llama = tiny_llama()
    rows, width = llama.tensors["model.embed_tokens.weight"]
    model = Model(llama.tensors | {"model.embed_tokens.weight": (rows + 8, width)}, llama.config)  # Mllama
    config, warnings, _ = result(linear(make("a", model), make("b", model)))
    assert config["vocab_size"] == rows
    assert warnings == []


# ------------------------------------------------------------------------------------------------ biases


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_bias_that_only_one_model_has(method: str, make: Make) -> None:
    biased = added(tiny_llama(), "self_attn.q_proj.bias", "self_attn.o_proj.bias")
    a, b = make("a"), make("b", biased, attention_bias=True)
    models = [{"model": str(model)} for model in (a, b)]
    more = {"parameters": {"weight": 1}} if method == "linear" else {"parameters": {"t": 0.5}, "base_model": str(a)}
    config, warnings, _ = result({"merge_method": method, "models": models, **more})
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is False
    partial = next(w for w in warnings if w.kind is ModelWarningKind.OPTIONAL_TENSOR)
    assert partial.problem.startswith(f"8 tensors are in {b} and not in {a} (model.layers.0.self_attn.o_proj.bias, ")
    assert f"{method} takes them from {b} only, at full strength" in partial.problem
    assert len(partial.names) == 8
    changed = next(w for w in warnings if w.kind is ModelWarningKind.CONFIG_CHANGED)
    assert changed.problem.startswith("attention_bias is set to true: the output has 8 attention biases that")


@pytest.mark.parametrize(
    ("rest", "donor", "other", "key", "value"),
    [
        ("mlp.up_proj.bias", {}, {}, "mlp_bias", True),
        ("self_attn.q_proj.bias", {}, {}, "attention_bias", True),
        ("self_attn.q_proj.bias", {"model_type": "x"}, {"model_type": "x", "qkv_bias": True}, "qkv_bias", True),
        (
            "attn.q_proj.bias",
            {"model_type": "mpt", "no_bias": True},
            {"model_type": "mpt", "no_bias": False},
            "no_bias",
            False,
        ),
    ],
)
def test_the_key_that_enables_a_bias(
    rest: str, donor: dict[str, Any], other: dict[str, Any], key: str, value: bool, make: Make
) -> None:
    a, b = make("a", **donor), make("b", added(tiny_llama(), rest), **other)
    config, warnings, _ = result(linear(a, b))
    assert config[key] is value
    assert [w.names for w in warnings if w.kind is ModelWarningKind.CONFIG_CHANGED] == [(key,)]


def test_a_bias_that_no_key_enables(make: Make) -> None:
    a = make("a", model_type="unknown", without=("attention_bias", "mlp_bias"))
    b = make(
        "b", added(tiny_llama(), "input_layernorm.bias"), model_type="unknown", without=("attention_bias", "mlp_bias")
    )
    texts = [str(warning) for warning in result(linear(a, b))[1]]
    assert [t for t in texts if "mergeloom knows no key of config.json that makes a unknown read them" in t]


def test_a_bias_that_the_donor_has_changes_no_key(make: Make) -> None:
    a, b = make("a", added(tiny_llama(), "self_attn.q_proj.bias"), attention_bias=True), make("b")
    config, warnings, _ = result(linear(a, b))
    assert config["attention_bias"] is True
    assert not [w for w in warnings if w.kind is ModelWarningKind.CONFIG_CHANGED]


# ------------------------------------------------------------------------------------------------ prediction layers


def small_deepseek(*, mtp: bool = True) -> Model:
    """A DeepSeek-V3 in bfloat16 of two layers with one expert, without the prediction layer's tensors if not `mtp`."""
    model = deepseek_v3(layers=2, experts=1, hidden=56, mtp=True, fp8=False)
    tensors = {name: shape for name, shape in model.tensors.items() if mtp or not name.startswith("model.layers.2.")}
    return Model(tensors, model.config)


def test_the_number_of_prediction_layers_is_that_of_the_written_ones(make: Make) -> None:
    a, b = make("a", small_deepseek(mtp=False)), make("b", small_deepseek(mtp=False), num_nextn_predict_layers=0)
    config, warnings, _ = result(linear(a, b))
    assert config["num_nextn_predict_layers"] == 0
    text = only(warnings, ModelWarningKind.PREDICTION_LAYERS)
    assert "num_nextn_predict_layers is set to 0" in text
    assert "states 1" in text


def test_a_prediction_layer_that_is_kept(make: Make) -> None:
    a, b = make("a", small_deepseek()), make("b", small_deepseek())
    config, warnings, _ = result(linear(a, b))
    assert config["num_nextn_predict_layers"] == 1
    assert "it is kept as layer 2" in only(warnings, ModelWarningKind.PREDICTION_LAYERS)


def test_a_prediction_layer_that_is_dropped_is_reported(make: Make) -> None:
    a, b = make("a", small_deepseek(mtp=False), num_nextn_predict_layers=0), make("b", small_deepseek())
    config, warnings, _ = result(linear(a, b))
    assert config["num_nextn_predict_layers"] == 0
    text = only(warnings, ModelWarningKind.PREDICTION_LAYERS)
    assert f"{b}: layer 2 is beyond the 2 layers" in text
    assert "is not part of the output" in text


# ------------------------------------------------------------------------------------------------ dtypes


def test_two_dtypes_in_one_output(make: Make) -> None:
    a, b = make("a", torch_dtype="bfloat16"), make("b", dtype="F16", torch_dtype="float16")
    recipe = sliced((a, 0, 2), (b, 2, 4))
    text = only(result(recipe)[1], ModelWarningKind.DTYPE)
    assert f"the output has tensors in BF16 (from {a}) and F16 (from {b})" in text
    assert "dtype: bfloat16" in text
    assert result(recipe | {"dtype": "bfloat16"})[1] == []
    assert result(linear(a, b))[1] == []  # promoted to float32


def test_models_that_store_some_tensors_in_float32(make: Make) -> None:
    llama = tiny_llama()
    dtypes = {name: "F32" if len(shape) == 1 else "BF16" for name, shape in llama.tensors.items()}
    a, b = make("a", dtype=dtypes), make("b", dtype=dtypes)
    config, warnings, _ = result(sliced((a, 0, 2), (b, 2, 4)))
    assert config["torch_dtype"] == "bfloat16"
    assert warnings == []


def test_the_stated_dtype_is_one_that_the_output_has(make: Make) -> None:
    dtypes = {name: "F32" if len(shape) == 1 else "BF16" for name, shape in tiny_llama().tensors.items()}
    config, warnings, _ = result(linear(make("a", dtype=dtypes, torch_dtype="float16")))
    assert config["torch_dtype"] == "bfloat16"
    assert "torch_dtype is set to bfloat16" in only(warnings, ModelWarningKind.CONFIG_CHANGED)
