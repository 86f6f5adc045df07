"""Lists of modules that are not quantized follow the layers of a stack, also if they come from several models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressed_tensors.utils.match import match_name
from transformers.quantizers.quantizers_utils import should_convert_module

import mergeloom
from mergeloom.engine.run.planning import plan
from tests.support.adapters.files import write_lora
from tests.support.models import quantized, write_checkpoint
from tests.support.outputs import read_model
from tests.support.plans import linear, sliced, weighted_mean

MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate", "mlp.up_proj")
LAYERS = 12


def is_quantized(model: int, layer: int, module: str) -> bool:
    """Which modules are quantized: never the router, and others by layer and model."""
    return module != "mlp.gate" and (layer + 2 * model) % 3 != MODULES.index(module) % 3


def plain(name: str) -> str:
    return name


def escaped(name: str) -> str:
    return "re:" + name.replace(".", r"\.") + "$"


KEYS: dict[str, tuple[str, list[str], Callable[[str], str]]] = {
    "transformers": ("fp8 blocks", ["modules_to_not_convert"], plain),
    "vLLM": ("fp8 blocks", ["ignored_layers"], plain),
    "both": ("fp8 blocks, byte scales", ["modules_to_not_convert", "ignored_layers"], plain),
    "compressed-tensors": ("fp8 rows, a list of scales", ["ignore"], plain),
    "expressions": ("fp8 rows, a list of scales", ["ignore"], escaped),
}
"""By name: the format, the lists, and how entries are written."""


def write(
    directory: Path,
    name: str,
    number: int,
    *,
    extra: bool = False,
    prefixes: Sequence[str] = ("model.layers",),
    named: str | None = None,
    more: Mapping[str, object] | None = None,
) -> Path:
    """A quantized model. `named` is what its lists name in place of its prefixes."""
    form, keys, entry = KEYS[name]
    quantize, section = quantized.FORMATS[form]
    generator = torch.Generator().manual_seed(number)
    stored = {"lm_head.weight": torch.randn(8, 48, generator=generator).bfloat16()}
    listed = ["lm_head"]
    for prefix, layer, module in itertools.product(prefixes, range(LAYERS + extra), MODULES):
        weight, full = torch.randn(32, 48, generator=generator), f"{prefix}.{layer}.{module}"
        if is_quantized(number, layer, module):
            stored |= {f"{full}.{ending}": each for ending, each in quantize(weight).stored.items()}
        else:
            stored[f"{full}.weight"] = weight.bfloat16()
            listed.append(entry(f"{named or prefix}.{layer}.{module}"))
    section = section | dict.fromkeys(keys, listed)
    config: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}
    config |= {"num_nextn_predict_layers": 1} if extra else {}
    config |= more or {}
    return write_checkpoint(directory / f"{number}", stored, config=config | {"quantization_config": section})


def listed_by(form: str, module: str, entries: Sequence[str]) -> bool:
    """Whether the format's library leaves a module unquantized."""
    if "rows" in form:
        return any(match_name(module, entry) for entry in entries)
    return not should_convert_module(module, list(entries))


def check(out: Path, name: str) -> dict[str, bool]:
    """Check that the lists name what is not quantized; return which modules are."""
    form, keys, _ = KEYS[name]
    found = read_model(out)
    stored = {
        each.removesuffix(".weight"): tensor.dtype == torch.float8_e4m3fn
        for each, tensor in found.items()
        if each.endswith(".weight")
    }
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    for key in keys:
        assert len(section[key]) == len(set(section[key]))
        for module, codes in stored.items():
            assert listed_by(form, module, section[key]) is not codes, (key, module)
    return stored


@pytest.mark.parametrize("name", KEYS)
def test_entries_follow_the_layers_of_one_model(tmp_path: Path, name: str) -> None:
    """Layers are repeated, left out and moved."""
    model = write(tmp_path, name, 0)
    parts = ((0, 3), (10, 12), (2, 9), (2, 9))
    planned = plan(sliced(*((model, *part) for part in parts)))
    assert not any("may have moved" in str(each) for each in planned.warnings)
    mergeloom.merge(planned, tmp_path / "out")
    stored = check(tmp_path / "out", name)
    sources = [layer for part in parts for layer in range(*part)]
    for new, old in enumerate(sources):
        for module in MODULES:
            assert stored[f"model.layers.{new}.{module}"] == is_quantized(0, old, module)
    assert mergeloom.inspect(tmp_path / "out").to_dict()["tensors"] == 1 + 4 * len(sources)


@pytest.mark.parametrize("name", KEYS)
def test_layers_of_another_model_have_its_entries(tmp_path: Path, name: str) -> None:
    """Some have the number that they had there, so only the model differs."""
    first, second = (write(tmp_path, name, number) for number in range(2))
    mergeloom.merge(sliced((first, 0, 5), (second, 5, 12), (second, 0, 2)), tmp_path / "out")
    stored = check(tmp_path / "out", name)
    sources = [*((0, layer) for layer in range(5)), *((1, layer) for layer in (*range(5, 12), 0, 1))]
    for new, (model, old) in enumerate(sources):
        for module in MODULES:
            assert stored[f"model.layers.{new}.{module}"] == is_quantized(model, old, module)


def write_unquantized(directory: Path, *, layers: int = LAYERS, prefix: str = "model.layers") -> Path:
    """A fine-tune in bfloat16, whose config.json lists nothing."""
    modules = [f"{prefix}.{layer}.{module}.weight" for layer in range(layers) for module in MODULES]
    stored = {"lm_head.weight": torch.randn(8, 48).bfloat16()}
    stored |= {name: torch.randn(32, 48).bfloat16() for name in modules}
    config = {"model_type": "llama", "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    return write_checkpoint(directory, stored, config=config)


@pytest.mark.parametrize("name", KEYS)
def test_layers_of_an_unquantized_model_are_listed(tmp_path: Path, name: str) -> None:
    """Routers, too, which no model quantizes, so nothing but the donor's entries for other layers says to list them."""
    first, second = write(tmp_path, name, 0), write_unquantized(tmp_path / "plain")
    mergeloom.merge(sliced((first, 0, 4), (second, 4, 9), (first, 9, 12)), tmp_path / "out")
    stored = check(tmp_path / "out", name)
    for layer in range(LAYERS):
        for module in MODULES:
            expected = not 4 <= layer < 9 and is_quantized(0, layer, module)
            assert stored[f"model.layers.{layer}.{module}"] == expected


def test_the_decoder_has_the_entries_of_its_layers_without_an_encoder(tmp_path: Path) -> None:
    """The output's only stack is the second one of the models."""
    prefixes = ("encoder.block", "decoder.block")
    more = {"model_type": "t5", "num_layers": LAYERS, "num_decoder_layers": LAYERS}
    first, second = (write(tmp_path, "transformers", number, prefixes=prefixes, more=more) for number in range(2))
    recipe = sliced((first, 0, 5), (second, 5, 12))
    mergeloom.merge(
        {"merge_method": "passthrough", "modules": {"decoder": {"slices": recipe["slices"]}}}, tmp_path / "out"
    )
    stored = check(tmp_path / "out", "transformers")
    for layer, module in itertools.product(range(LAYERS), MODULES):
        assert stored[f"decoder.block.{layer}.{module}"] == is_quantized(int(layer >= 5), layer, module)


@pytest.mark.parametrize("name", KEYS)
def test_layers_of_an_earlier_stage_have_its_entries(tmp_path: Path, name: str) -> None:
    """The stage's layers have moved, too, so its entries are not those of the model in files."""
    first, second = (write(tmp_path, name, number) for number in range(2))
    stages = [
        {"name": "turned", **sliced((second, 6, 12), (second, 0, 6))},
        {"name": "final", **sliced((first, 0, 5), (Path("turned"), 5, 12))},
    ]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump_all(stages))
    mergeloom.merge(tmp_path / "recipe.yml", tmp_path / "out")
    stored = check(tmp_path / "out", name)
    sources = [*((0, layer) for layer in range(5)), *((1, (layer + 6) % 12) for layer in range(5, 12))]
    for new, (model, old) in enumerate(sources):
        for module in MODULES:
            assert stored[f"model.layers.{new}.{module}"] == is_quantized(model, old, module)


@pytest.mark.parametrize("name", KEYS)
def test_layers_of_a_model_with_an_adapter_have_its_entries(tmp_path: Path, name: str) -> None:
    """Its tensors are read as those of the model without the adapter."""
    first, second = (write(tmp_path, name, number) for number in range(2))
    adapter = write_lora(tmp_path / "adapter", {"model.layers.7.mlp.up_proj.weight": (32, 48)})
    mergeloom.merge(sliced((first, 0, 5), (Path(f"{second}+{adapter}"), 5, 12)), tmp_path / "out")
    stored = check(tmp_path / "out", name)
    for layer, module in itertools.product(range(LAYERS), MODULES):
        expected = (layer, module) != (7, "mlp.up_proj") and is_quantized(int(layer >= 5), layer, module)
        assert stored[f"model.layers.{layer}.{module}"] == expected


def test_a_layer_for_prediction_keeps_its_entries(tmp_path: Path) -> None:
    model = write(tmp_path, "transformers", 0, extra=True)
    mergeloom.merge(sliced((model, 0, 12), (model, 6, 12)), tmp_path / "out")
    stored = check(tmp_path / "out", "transformers")
    for module in MODULES:
        assert stored[f"model.layers.18.{module}"] == is_quantized(0, 12, module)


def test_entries_that_cannot_follow_are_named(tmp_path: Path) -> None:
    """An expression for several layers, and a key that is not a list of modules; names of another tower stay."""
    model = write(tmp_path, "compressed-tensors", 0)
    config = json.loads((model / "config.json").read_text())
    section = config["quantization_config"]
    section["ignore"] += [r"re:model\.layers\.(1|20)\.none", "vision.layers.3.none"]
    (model / "config.json").write_text(json.dumps(config))
    moved = sliced((model, 0, 12), (model, 6, 12))
    (warning,) = [str(each) for each in plan(moved).warnings if "may have moved" in str(each)]
    assert r"'re:model\\.layers\\.(1|20)\\.none'" in warning
    section["ignore"].remove(r"re:model\.layers\.(1|20)\.none")
    section["config_groups"]["group_0"]["targets"].append(r"re:.*layers\.2\..*")
    (model / "config.json").write_text(json.dumps(config))
    planned = plan(moved)
    (warning,) = [str(each) for each in planned.warnings if "may have moved" in str(each)]
    assert r"'re:.*layers\\.2\\..*'" in warning
    assert planned.files.config is not None
    assert "vision.layers.3.none" in planned.files.config["quantization_config"]["ignore"]
    assert not any("may have moved" in str(each) for each in plan(linear(model, model)).warnings)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("named", ["model.language_model.layers", "language_model.model.layers"])
def test_entries_with_names_of_modules_follow_too(tmp_path: Path, name: str, named: str) -> None:
    """The loader's modules have other names than the checkpoint's tensors; a vision encoder has layers of its own."""
    model = write(tmp_path, name, 0, named=named)
    config = json.loads((model / "config.json").read_text())
    _, keys, entry = KEYS[name]
    stays = [entry(f"model.vision_tower.layers.{layer}.mlp.gate") for layer in (2, 11)]
    for key in keys:
        config["quantization_config"][key] += stays
    (model / "config.json").write_text(json.dumps(config))
    planned = plan(sliced((model, 4, 12), (model, 0, 3)))
    assert not any("may have moved" in str(each) for each in planned.warnings)
    assert planned.files.config is not None
    listed = planned.files.config["quantization_config"]
    for key in keys:
        assert set(stays) <= set(listed[key])
        for new, old in enumerate((*range(4, 12), *range(3))):
            for module in MODULES:
                expected = not is_quantized(0, old, module)
                assert (entry(f"{named}.{new}.{module}") in listed[key]) == expected, (new, module)
        assert not any(entry(f"{named}.11.{module}") in listed[key] for module in MODULES)


@pytest.mark.parametrize("name", KEYS)
def test_layers_of_another_model_have_its_entries_with_names_of_modules(tmp_path: Path, name: str) -> None:
    """What the other model or the donor lists so is listed with the names of the output's tensors."""
    first, second = (write(tmp_path, name, number, named="model.language_model.layers") for number in range(2))
    plain = write_unquantized(tmp_path / "plain")
    planned = plan(sliced((first, 0, 5), (second, 5, 9), (plain, 9, 12)))
    assert planned.files.config is not None
    form, keys, _ = KEYS[name]
    for key, layer, module in itertools.product(keys, range(5, 12), MODULES):
        listed = planned.files.config["quantization_config"][key]
        expected = layer >= 9 or not is_quantized(1, layer, module)
        assert listed_by(form, f"model.layers.{layer}.{module}", listed) == expected


def test_entries_that_can_name_either_of_two_stacks_are_named(tmp_path: Path) -> None:
    """The encoder's and the decoder's layers have moved in one way each, so an entry can't follow both."""
    more = {"model_type": "t5", "num_layers": LAYERS, "num_decoder_layers": LAYERS}
    prefixes = ("encoder.block", "decoder.block")
    model = write(tmp_path, "transformers", 0, prefixes=prefixes, more=more)
    config = json.loads((model / "config.json").read_text())
    section = config["quantization_config"]
    section["modules_to_not_convert"] += ["model.block.3.none", "model.decoder.block.3.none"]
    (model / "config.json").write_text(json.dumps(config))
    slices = sliced((model, 6, 12), (model, 0, 6))["slices"]
    planned = plan({"merge_method": "passthrough", "modules": {each[:7]: {"slices": slices} for each in prefixes}})
    (warning,) = [str(each) for each in planned.warnings if "may have moved" in str(each)]
    assert "'model.block.3.none'" in warning
    assert planned.files.config is not None
    listed = planned.files.config["quantization_config"]["modules_to_not_convert"]
    assert "model.block.3.none" in listed
    assert "model.decoder.block.9.none" in listed
    assert "model.decoder.block.3.none" not in listed


@pytest.mark.parametrize("name", KEYS)
def test_layers_that_the_models_have_unquantized_are_no_news(tmp_path: Path, name: str) -> None:
    """Nothing is decoded and nothing is added, whether or not entries are expressions; a decoded layer is both."""
    models = [write(tmp_path / each, name, 0) for each in "ab"]
    for more in ({}, {"out_dtype": "same"}):
        planned = plan(linear(*models, **more))
        assert not planned.warnings
        mergeloom.merge(planned, tmp_path / f"out{len(more)}")
        check(tmp_path / f"out{len(more)}", name)
        section = json.loads((models[0] / "config.json").read_text())["quantization_config"]
        assert planned.files.config is not None
        assert planned.files.config["quantization_config"] == section
    rules = [{"filter": "layers.5.", "value": "bfloat16"}, {"value": "same"}]
    planned = plan(linear(*models, out_dtype=rules))
    count = sum(is_quantized(0, 5, module) for module in MODULES)
    assert any(f"{count} modules added to quantization_config." in str(each) for each in planned.warnings)
    mergeloom.merge(planned, tmp_path / "mixed")
    stored = check(tmp_path / "mixed", name)
    assert not any(stored[f"model.layers.5.{module}"] for module in MODULES)


@pytest.mark.parametrize("form", ["fp8 blocks, byte scales", "fp8 rows", "int4"])
def test_a_list_that_decodes_one_of_fused_projections_is_warned_about(tmp_path: Path, form: str) -> None:
    """Not if it decodes all of them, and not if the models have them so."""
    quantize, section = quantized.FORMATS[form]
    models = []
    for number in range(2):
        stored = {
            f"model.layers.{layer}.self_attn.{module}_proj.{ending}": tensor
            for layer in range(2)
            for module in "qkvo"
            for ending, tensor in quantize(torch.randn(32, 48)).stored.items()
            if (layer, module) != (1, "v")
        }
        stored["model.layers.1.self_attn.v_proj.weight"] = torch.ones(32, 48)
        config = {"model_type": "llama", "num_hidden_layers": 2, "quantization_config": section}
        models.append(write_checkpoint(tmp_path / f"{number}", stored, config=config))

    def warnings(*filters: str) -> list[str]:
        rules = [{"filter": each, "value": "bfloat16"} for each in filters]
        recipe = weighted_mean(dict(zip(models, (1.0, 0.0), strict=True)), out_dtype=[*rules, {"value": "same"}])
        for place, entry in enumerate(recipe["models"]):  # what isn't decoded is copied, in any format
            values = [{"filter": each, "value": 0.5} for each in filters]
            entry["parameters"]["weight"] = [*values, {"value": 1.0 - place}]
        return [str(each) for each in plan(recipe).warnings if "load them as one tensor" in str(each)]

    (warning,) = warnings("0.self_attn.k_proj")
    assert "layers.0.self_attn.k_proj is written in bfloat16 and model.layers.0.self_attn.q_proj stays" in warning
    assert "(2 such pairs)" in warning
    assert warnings("0.self_attn.q", "0.self_attn.k", "0.self_attn.v") == []
    assert warnings("o_proj") == []
