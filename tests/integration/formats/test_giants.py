"""Merges of tiny models with the layouts of giants: float64's values, in files that transformers loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergeloom
from tests.support.giants.layouts import BLOCK, GIANTS, LAYERS, Giant
from tests.support.giants.write import Written, model_class, write_giant, write_values
from tests.support.methods.expected import expected
from tests.support.methods.reference import Expected
from tests.support.outputs import read_model
from tests.support.published.compare import STEP, ulp_at

WEIGHTS = {"linear": (0.5, 0.5), "slerp": (0.0, 0.0), "ties": (0.0, 0.6, 0.4), "passthrough": (1.0,)}
"""By method, the weight of each model; the first one is the base of slerp and ties."""
PARAMETERS: dict[str, dict[str, Any]] = {"slerp": {"t": 0.3}, "ties": {"density": 0.5}}
SCALES = ("weight_scale_inv", "weight_scale", "scale")
Write = Callable[[Giant, int], Written]
Loaded = tuple[Any, dict[str, list[str]]]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes a model once."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    names = {id(giant): name for name, giant in GIANTS.items()}

    @cache
    def written(name: str, seed: int) -> Written:
        return write_giant(GIANTS[name], tmp_path_factory.mktemp(f"{name}-{seed}"), seed)

    return lambda giant, seed: written(names[id(giant)], seed)


def recipe(method: str, models: list[Path], out_dtype: Any) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [{"model": str(model)} for model in models]
    for entry, weight in zip(entries, WEIGHTS[method], strict=True):
        if method in ("linear", "ties"):
            entry["parameters"] = {"weight": weight}
    made = {"merge_method": method, "models": entries, "parameters": PARAMETERS.get(method, {})}
    if method in ("slerp", "ties"):
        made["base_model"] = str(models[0])
    return made if out_dtype is None else made | {"out_dtype": out_dtype}


def reference(method: str, values: list[Tensor]) -> Expected:
    """The result in float64."""
    parameters: dict[str, Any] = {"linear": {"weight": WEIGHTS["linear"]}}.get(method, PARAMETERS.get(method, {}))
    if method == "ties":
        parameters = {"weight": WEIGHTS["ties"], "density": (0.5,) * 3}
    return expected(method, [value.double() for value in values], base=0, parameters=parameters, drawn=list)


def scales_of(found: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The scales of FP8 codes, one for each element; None for a weight that is not FP8."""
    if found[name].dtype != torch.float8_e4m3fn:
        return None
    module = name.removesuffix(".weight")
    scales = next(
        found[end] for each in ("weight_scale_inv", "weight_scale", "scale") if (end := f"{module}.{each}") in found
    )
    rows, columns = found[name].shape
    blocks = (1, columns) if scales.shape == (rows, 1) else (BLOCK, BLOCK)
    return scales.float().repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)[:rows, :columns]


def assert_merged(found: Mapping[str, Tensor], models: list[Written], method: str) -> dict[str, Tensor]:
    """Compare each tensor with float64; returns the values that the reference decodes."""
    decoded, close = {}, 0
    for name, own in models[0].values.items():
        stored = found[name]
        if not own.is_floating_point():
            assert torch.equal(stored, own)
            decoded[name] = stored
            continue
        wanted = reference(method, [each.values[name] for each in models])
        scales = scales_of(found, name)
        decoded[name] = stored.float() if scales is None else stored.float() * scales
        value = decoded[name].double()
        if scales is None:
            bound = ulp_at(wanted.outputs[0], stored.dtype)
        else:  # half a step of the codes; the largest one can be beyond 448 by the rounding of its scale
            codes = stored.double().abs()
            bound = scales.double() * torch.exp2(torch.floor(torch.log2(codes.clamp(min=2.0**-6))) - 3) * 1.01
        fits = [(value - each).abs() <= bound + 4 * STEP * wanted.size for each in wanted.outputs]
        assert torch.stack(fits).any(0).all(), name
        close += int((~fits[0]).sum())
    assert close < 0.001 * sum(value.numel() for value in decoded.values())  # elections and thresholds
    return decoded


def prediction_of(giant: Giant) -> str:
    """The beginning of the names in a giant's prediction layer."""
    return giant.prediction.replace("N", str(LAYERS)) + "."


def load(giant: Giant, path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Load a model, and what transformers says of its keys. The number of the layer that it ignores is the giant's."""
    kind = model_class(giant)
    ignored = [re.escape(prediction_of(giant))] if giant.prediction else None
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", ignored)
    model, info = kind.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    return model.eval(), {key: sorted(map(str, value)) for key, value in info.items() if value}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 19)[None]).logits
    return found


def merge(
    directory: Path, method: str, models: list[Written], out_dtype: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    mergeloom.merge(recipe(method, [model.path for model in models], out_dtype), directory / "out", device="cpu")
    return read_model(directory / "out"), json.loads((directory / "out" / "config.json").read_text())


def config_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("name", GIANTS)
def test_in_bfloat16(name: str, method: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    giant = GIANTS[name]
    models = [write(giant, seed) for seed in range(1, len(WEIGHTS[method]) + 1)]
    found, config = merge(tmp_path, method, models, "bfloat16")
    assert found.keys() == models[0].values.keys()
    assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {torch.bfloat16}
    decoded = assert_merged(found, models, method)
    expected_config = config_of(models[0].path)
    del expected_config["quantization_config"]
    assert config == {key: value for key, value in expected_config.items() if key != "expert_dtype"}
    model, remarks = load(giant, tmp_path / "out", monkeypatch)
    assert not remarks
    twin, _ = load(giant, write_values(giant, tmp_path / "twin", decoded, tmp_path / "out"), monkeypatch)
    wanted = logits(twin)
    assert float((logits(model) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("name", [name for name, giant in GIANTS.items() if giant.written is not None])
def test_in_its_own_format(
    name: str, method: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    giant = GIANTS[name]
    models = [write(giant, seed) for seed in range(1, len(WEIGHTS[method]) + 1)]
    found, config = merge(tmp_path, method, models, giant.written)
    stored = read_model(models[0].path)
    if giant.written == "same":
        assert config == config_of(models[0].path)
        assert {key: (each.dtype, each.shape) for key, each in found.items()} == {
            key: (each.dtype, each.shape) for key, each in stored.items()
        }
    decoded = assert_merged(found, models, method)
    if not giant.loads:
        return
    model, remarks = load(giant, tmp_path / "out", monkeypatch)
    assert not remarks
    twin, _ = load(giant, write_values(giant, tmp_path / "twin", decoded, tmp_path / "out"), monkeypatch)
    assert_loaded(giant, model, twin)


def assert_loaded(giant: Giant, model: Any, twin: Any) -> None:
    """Each parameter that transformers decodes is that of the twin, in the dtype that it chooses."""
    own, wanted = model.state_dict(), twin.state_dict()
    compared = [each for each in own.keys() & wanted.keys() if own[each].dtype != torch.float8_e4m3fn]
    assert compared
    for each in compared:
        if not re.search(giant.misread, each):
            assert torch.equal(own[each], wanted[each].to(own[each].dtype)), each


MIXED = {"experts": "experts.", "attention": "attn"}
"""What is decoded of models in FP8, and the filter."""


@pytest.mark.parametrize("part", MIXED)
@pytest.mark.parametrize("name", ["DeepSeek-V3", "DeepSeek-V4", "GLM-5", "MiniMax-M2"])
def test_a_part_in_bfloat16(
    name: str, part: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes quantized modules exactly for the codes, as on a GPU, where it does not decode them."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    giant = GIANTS[name]
    models = [write(giant, seed) for seed in (1, 2)]
    filters = [MIXED[part], *(["ffn.experts"] if name == "DeepSeek-V4" else [])]  # FP4 is not written
    out_dtype = [*({"filter": each, "value": "bfloat16"} for each in filters), {"value": "same"}]
    found, _ = merge(tmp_path, "linear", models, out_dtype)
    assert_merged(found, models, "linear")
    stored = [each for each in found if found[each].dtype == torch.float8_e4m3fn]
    assert stored
    assert not any(MIXED[part] in each for each in stored)
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **more: None)
    model, remarks = load(giant, tmp_path / "out", monkeypatch)
    assert not remarks
    codes = [each for each in model.state_dict().values() if each.dtype == torch.float8_e4m3fn]
    layers = [each for each in stored if not giant.prediction or not each.startswith(prediction_of(giant))]
    assert sum(each.numel() for each in codes) == sum(found[each].numel() for each in layers)


@pytest.mark.parametrize("name", GIANTS)
def test_a_copy(name: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    giant = GIANTS[name]
    model = write(giant, 1)
    found, config = merge(tmp_path, "passthrough", [model], None)
    stored = read_model(model.path)
    assert found.keys() == stored.keys()
    for each, tensor in stored.items():
        assert torch.equal(found[each].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), each
    assert config == config_of(model.path)
    if giant.loads:
        assert not load(giant, tmp_path / "out", monkeypatch)[1]
