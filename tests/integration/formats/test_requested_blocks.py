"""Models that a recipe stores as FP8 blocks: codes of an independent encoder, and what transformers loads."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mergeloom
from mergeloom.engine.model.warnings import ModelWarningKind
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, RecipeError
from tests.support.methods.fp8_reference import reference
from tests.support.models import llama, quantized, qwen3_moe, write_checkpoint
from tests.support.models.shapes import Model
from tests.support.outputs import config_of, read_model

LLAMA = llama(layers=2, hidden=256, intermediate=384, heads=4, kv_heads=2, vocabulary=64)
QWEN = qwen3_moe(layers=2, experts=8, hidden=256, intermediate=128, vocabulary=64)
MODELS = {"llama": LLAMA, "qwen3_moe": QWEN}
FORMS: dict[str, tuple[object, tuple[int, int], str]] = {
    "default": ("fp8_blocks", (128, 128), "F32"),
    "bfloat16": ({"format": "fp8_blocks", "block": [64, 128], "scales": "bfloat16"}, (64, 128), "BF16"),
    "ue8m0": ({"format": "fp8_blocks", "scales": "ue8m0"}, (128, 128), "F8_E8M0"),
}
"""Values of `out_dtype`, with the rows and columns of a block and the dtype of the scales."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_linear(name: str) -> bool:
    """Whether a weight of these models belongs to a projection."""
    return name.endswith(tuple(f"{each}.weight" for each in PROJECTIONS))


def linear(models: list[Path], **more: Any) -> dict[str, Any]:
    weights = zip(models, (0.3, 0.7), strict=True)
    entries = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in weights]
    return {"merge_method": "linear", "models": entries} | more


def written(directory: Path, model: Model, seeds: tuple[int, ...] = (1, 2)) -> list[Path]:
    return [write_checkpoint(directory / f"{seed}", model, fill=seed) for seed in seeds]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def decoded(tensors: dict[str, Tensor], name: str, block: tuple[int, int]) -> Tensor:
    """The value of an output's tensor, computed in float32 with scales expanded to all elements."""
    scales = tensors.get(f"{name}_scale_inv")
    if scales is None:
        return tensors[name].float()
    expanded = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return tensors[name].float() * expanded


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Returns the output of a merge of two models, by their architecture and the form or dtype; made once."""
    directory = tmp_path_factory.mktemp("made")

    @functools.cache
    def merged(architecture: str, form: str) -> Path:
        models = written(directory / architecture, MODELS[architecture])
        chosen = {"out_dtype": FORMS[form][0]} if form in FORMS else {"dtype": form}
        mergeloom.merge(linear(models, **chosen), directory / f"{architecture}-{form}")
        return directory / f"{architecture}-{form}"

    return merged


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", MODELS)
def test_codes_and_scales_equal_those_of_the_reference(
    architecture: str, form: str, made: Callable[[str, str], Path]
) -> None:
    _, block, scales = FORMS[form]
    found, values, plain = (read_model(made(architecture, each)) for each in (form, "float32", "torch.bfloat16"))
    encoded = {name for name in values if is_linear(name)}
    assert found.keys() == values.keys() | {f"{name}_scale_inv" for name in encoded}
    for name, tensor in values.items():
        if name in encoded:
            codes, factors = reference(tensor, scales, *block)
            assert raw(found[name]) == codes, name
            assert raw(found[f"{name}_scale_inv"]) == factors, name
        else:
            assert torch.equal(found[name], plain[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", MODELS)
def test_transformers_loads_it(architecture: str, form: str, made: Callable[[str, str], Path]) -> None:
    """The values are those that the codes and scales stand for; experts are fused by transformers."""
    out, block = made(architecture, form), FORMS[form][1]
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    tensors = read_model(out)
    parameters = dict(loaded.named_parameters())
    for name in parameters.keys() & tensors.keys():
        assert torch.equal(parameters[name].float(), decoded(tensors, name, block)), name
    fused = [name for name in parameters if name not in tensors]
    for name in fused:
        module, _, projection = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        for expert in range(8):
            expected = [decoded(tensors, f"{module}.{expert}.{part}.weight", block) for part in parts]
            assert torch.equal(parameters[name][expert], torch.cat(expected)), name
    assert bool(fused) == (architecture == "qwen3_moe")
    with torch.no_grad():
        assert loaded.float()(torch.arange(8).view(1, -1)).logits.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_the_quantized_modules_of_transformers_have_these_names_and_shapes(
    form: str, made: Callable[[str, str], Path]
) -> None:
    """On a GPU the model is not decoded: transformers makes FP8 modules, whose parameters are those of the output."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    out = made("llama", form)
    config = transformers.AutoConfig.from_pretrained(out)
    section = transformers.FineGrainedFP8Config(**config.quantization_config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    replace_with_fp8_linear(model, section.modules_to_not_convert, section, pre_quantized=True)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in read_model(out).items()} == expected


def test_config_json_lists_what_is_not_quantized(made: Callable[[str, str], Path]) -> None:
    config, before = (config_of(made("qwen3_moe", form)) for form in ("default", "torch.bfloat16"))
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"],
    }
    assert config == before


def test_a_tied_head_is_listed(tmp_path: Path) -> None:
    tied = llama(layers=1, hidden=256, intermediate=256, heads=4, kv_heads=2, vocabulary=64, tied=True)
    mergeloom.merge(linear(written(tmp_path, tied), out_dtype="fp8_blocks"), tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    assert "lm_head.weight" not in read_model(tmp_path / "out")


def test_a_filter_list_chooses(tmp_path: Path) -> None:
    """A router that the filter matches has the dtype of the next condition, and so have all other tensors."""
    models = written(tmp_path, QWEN)
    rules = [{"filter": "mlp", "value": "fp8_blocks"}, {"filter": "norm", "value": "same"}, {"value": "float16"}]
    mergeloom.merge(linear(models, out_dtype=rules), tmp_path / "out")
    found = read_model(tmp_path / "out")
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    for name, dtype in dtypes.items():
        if ".experts." in name:
            assert dtype == (torch.float32 if name.endswith("_scale_inv") else torch.float8_e4m3fn)
        else:
            assert dtype == (torch.bfloat16 if "norm" in name else torch.float16), name
    skipped = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    attention = [f"model.layers.{layer}.self_attn.{each}" for layer in range(2) for each in PROJECTIONS[:4]]
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
    assert sorted(skipped) == sorted([*attention, *routers, "lm_head"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lm_head", "lm_head.weight: it is the head"),
        ("embed_tokens", "model.embed_tokens.weight: it is the embedding"),
        ("mlp.gate.", "model.layers.0.mlp.gate.weight: it is a router"),
        ("input_layernorm", "input_layernorm.weight: it is not a matrix of weights (shape [256])"),
        ("model.norm", "model.norm.weight: it belongs to no layer of the language model"),
    ],
)
def test_a_filter_for_what_cannot_be_stored_so_is_an_error(tmp_path: Path, text: str, reason: str) -> None:
    models = written(tmp_path, QWEN)
    rules = [{"filter": text, "value": "fp8_blocks"}, {"value": "bfloat16"}]
    with pytest.raises(RecipeError) as caught:
        mergeloom.plan(linear(models, out_dtype=rules))
    assert f"out_dtype[0].filter: none of the tensors that filter {text!r} matches can be stored" in str(caught.value)
    assert reason in str(caught.value)


def test_a_filter_that_matches_no_tensor_is_a_warning(tmp_path: Path) -> None:
    rules = [{"filter": "mpl", "value": "fp8_blocks"}, {"value": "bfloat16"}]
    findings = plan(linear(written(tmp_path, LLAMA), out_dtype=rules)).findings
    assert [each.kind for each in findings] == [ModelWarningKind.FILTER]


def test_a_model_without_a_matrix_that_fits_is_an_error(tmp_path: Path) -> None:
    narrow = llama(layers=1, hidden=64, intermediate=128, heads=4, kv_heads=2, vocabulary=64)
    with pytest.raises(RecipeError, match=r"no tensor can be stored as FP8 blocks.*which is not a multiple of 128x128"):
        mergeloom.plan(linear(written(tmp_path, narrow), out_dtype="fp8_blocks"))


def test_a_model_without_config_json_is_an_error(tmp_path: Path) -> None:
    """Nothing would say that the weights are codes."""
    models = [write_checkpoint(tmp_path / f"{seed}", LLAMA.tensors, fill=seed) for seed in (1, 2)]
    with pytest.raises(RecipeError, match=r"out_dtype: FP8 blocks are described in config.json, which .*/1 does not"):
        mergeloom.plan(linear(models, out_dtype="fp8_blocks"))


def test_projections_that_loaders_fuse_are_stored_alike(tmp_path: Path) -> None:
    """Keys and values of 64 rows don't consist of complete blocks, so the queries stay unquantized, too."""
    narrow_keys = llama(layers=1, hidden=256, intermediate=256, heads=4, kv_heads=1, vocabulary=64)
    models = written(tmp_path, narrow_keys)
    mergeloom.merge(linear(models, out_dtype="fp8_blocks"), tmp_path / "out")
    found = read_model(tmp_path / "out")
    for name in ("q_proj", "k_proj", "v_proj"):
        assert found[f"model.layers.0.self_attn.{name}.weight"].dtype == torch.bfloat16
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert found["model.layers.0.mlp.gate_proj.weight"].dtype == torch.float8_e4m3fn


def test_a_filter_that_separates_them_is_a_warning(tmp_path: Path) -> None:
    rules = [{"filter": "q_proj", "value": "fp8_blocks"}, {"value": "bfloat16"}]
    (warning,) = plan(linear(written(tmp_path, LLAMA), out_dtype=rules)).findings
    assert "self_attn.q_proj is stored as FP8 blocks and model.layers.0.self_attn.k_proj is not" in str(warning)


def test_fused_experts_stay_unquantized_with_a_warning(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts."
    fused = {
        name: shape for name, shape in QWEN.tensors.items() if ".experts." not in name and ".layers.1." not in name
    }
    fused |= {f"{experts}gate_up_proj": (4, 256, 256), f"{experts}down_proj": (4, 256, 128)}
    config = QWEN.config | {"num_hidden_layers": 1}
    models = [write_checkpoint(tmp_path / f"{seed}", fused, config=config, fill=seed) for seed in (1, 2)]
    planned = plan(linear(models, out_dtype="fp8_blocks"))
    (warning,) = (each for each in planned.findings if each.kind is ModelWarningKind.QUANTIZATION)
    assert "2 tensors with all experts of a layer" in str(warning)
    mergeloom.merge(planned, tmp_path / "out")
    found = read_model(tmp_path / "out")
    assert found[f"{experts}gate_up_proj"].dtype == torch.bfloat16
    skipped = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert sorted(skipped) == ["lm_head", "model.layers.0.mlp.experts", "model.layers.0.mlp.gate"]


@pytest.mark.parametrize("form", ["int4", "mxfp4", "fp8 tensor", "fp8 rows", "fp8 blocks, byte scales", "fp8 blocks"])
def test_a_quantized_donor_can_have_another_format(tmp_path: Path, form: str) -> None:
    """A tensor that can't be stored in the new format is unquantized, since config.json describes one format."""
    pairs = [quantized.write_pair(tmp_path, form, seed) for seed in (1, 2)]
    chosen = {"format": "fp8_blocks", "block": [16, 32]}  # the 80 columns of down_proj do not fit
    planned = plan(linear([model for model, _ in pairs], out_dtype=chosen))
    assert any("of config.json is replaced" in str(each) for each in planned.findings)
    mergeloom.merge(planned, tmp_path / "out")
    mergeloom.merge(linear([values for _, values in pairs], dtype="float32"), tmp_path / "values")
    found, values = read_model(tmp_path / "out"), read_model(tmp_path / "values")
    for module in quantized.weights(1):
        name = f"{module}.weight"
        if "down_proj" in module:
            assert torch.equal(found[name], values[name].to(torch.bfloat16))
            assert f"{name}_scale_inv" not in found
        else:
            assert (raw(found[name]), raw(found[f"{name}_scale_inv"])) == reference(values[name], "F32", 16, 32)
    section = config_of(tmp_path / "out")["quantization_config"]
    assert section["quant_method"] == "fp8"
    assert section["weight_block_size"] == [16, 32]
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert sorted(section["modules_to_not_convert"]) == ["lm_head", *downs]
    assert "compression_config" not in config_of(tmp_path / "out")


def test_a_filter_that_matches_no_name_leaves_an_output_without_blocks(tmp_path: Path) -> None:
    models = [quantized.write_pair(tmp_path, "int4", seed)[0] for seed in (1, 2)]
    rules = [{"filter": "misspelt", "value": "fp8_blocks"}, {"value": "bfloat16"}]
    planned = plan(linear(models, out_dtype=rules))
    assert any("filter 'misspelt' matches no tensor name" in str(each) for each in planned.warnings)
    assert not any("is replaced" in str(each) for each in planned.findings)
    mergeloom.merge(planned, tmp_path / "out")
    assert "quantization_config" not in config_of(tmp_path / "out")


@pytest.mark.parametrize("form", ["int4", "fp8 blocks, e8m0 scales"])
def test_two_formats_in_one_output_are_an_error(tmp_path: Path, form: str) -> None:
    """`same` asks for a format that differs from that of the blocks, and config.json describes one."""
    models = [quantized.write_pair(tmp_path, form, seed)[0] for seed in (1, 2)]
    blocks = {"format": "fp8_blocks", "block": [16, 32]}
    rules = [{"filter": "self_attn", "value": "same"}, {"value": blocks}]
    with pytest.raises(CheckpointError, match="is stored in the format"):
        mergeloom.plan(linear(models, out_dtype=rules))
    copied = linear(models, out_dtype=rules)
    copied["models"][1]["parameters"]["weight"] = 0
    with pytest.raises(CheckpointError, match="config.json can only describe one format|is stored in the format"):
        mergeloom.plan(copied)


def test_what_is_stored_so_already_is_copied(tmp_path: Path) -> None:
    """A quantized model that alone has an effect keeps its codes; one that is encoded anew has those of its values."""
    models = written(tmp_path, LLAMA)
    mergeloom.merge(linear(models, out_dtype="fp8_blocks"), tmp_path / "first")
    again = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "first")}], "out_dtype": "fp8_blocks"}
    assert plan(again).bytes_computed == 0
    mergeloom.merge(again, tmp_path / "second")
    first, second = (read_model(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(raw(first[name]) == raw(second[name]) for name in first)
    assert config_of(tmp_path / "first") == config_of(tmp_path / "second")


def test_a_model_is_quantized_by_passing_it_through(tmp_path: Path) -> None:
    (model,) = written(tmp_path, LLAMA, (3,))
    mergeloom.merge(
        {"merge_method": "passthrough", "models": [{"model": str(model)}], "out_dtype": "fp8_blocks"}, tmp_path / "out"
    )
    found, values = read_model(tmp_path / "out"), read_model(model)
    for name in filter(is_linear, values):
        assert (raw(found[name]), raw(found[f"{name}_scale_inv"])) == reference(values[name], "F32")


def test_the_last_stage_is_stored_so_and_others_are_refused(tmp_path: Path) -> None:
    models = written(tmp_path, LLAMA, (1, 2, 3))
    first = linear(models[:2]) | {"name": "first"}
    last = linear([models[2], Path("first")])
    mergeloom.merge([first, last | {"out_dtype": "fp8_blocks"}], tmp_path / "out")
    mergeloom.merge([first, last | {"dtype": "float32"}], tmp_path / "values")
    found, values = read_model(tmp_path / "out"), read_model(tmp_path / "values")
    for name in filter(is_linear, values):
        assert (raw(found[name]), raw(found[f"{name}_scale_inv"])) == reference(values[name], "F32")
    with pytest.raises(RecipeError, match="only the output of the last stage is stored as FP8 blocks"):
        mergeloom.plan([first | {"out_dtype": "fp8_blocks"}, last])


def test_a_stack_with_more_layers_than_its_donor_is_stored_so(tmp_path: Path) -> None:
    (model,) = written(tmp_path, LLAMA, (1,))
    slices = [{"sources": [{"model": str(model), "layer_range": each}]} for each in ([0, 2], [0, 2], [1, 2])]
    planned = plan({"merge_method": "passthrough", "slices": slices, "out_dtype": "fp8_blocks"})
    assert not planned.findings  # the layers that moved are in the list of modules under their new names
    mergeloom.merge(planned, tmp_path / "out")
    found, stored = read_model(tmp_path / "out"), read_model(model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    for layer, source in enumerate((0, 1, 0, 1, 1)):
        for each in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{each}.weight"
            expected = reference(stored[f"model.layers.{source}.{each}.weight"], "F32")
            assert (raw(found[name]), raw(found[f"{name}_scale_inv"])) == expected
