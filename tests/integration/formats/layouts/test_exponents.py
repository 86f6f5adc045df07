"""Scales that are stored as bytes with exponents: written like the donor's, as a reference in float64 computes them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from numpy.typing import NDArray
from torch import Tensor

import mergeloom
from mergeloom.engine.execute.devices.base import Device
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.verify import verify
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.io.reading import Reader
from mergeloom.report.explain import explain
from mergeloom.report.plan import plan_text
from tests.support.devices import CountingDevice
from tests.support.merges.resumable import OPTIONS, interrupt, run
from tests.support.merges.small import make_blocks_small
from tests.support.merges.verified import flip, position_of
from tests.support.methods.fp8_reference import hard_values
from tests.support.models import quantized, write_checkpoint
from tests.support.outputs import digests, read_model
from tests.support.plans import linear, weighted_mean

Floats = NDArray[np.float64]
ARGUMENTS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
MXFP8 = QuantizationArgs(**ARGUMENTS, scale_dtype=torch.uint8)  # type: ignore[arg-type]
SCHEME = QuantizationScheme(targets=["Linear"], weights=MXFP8)
LIBRARY = BaseCompressor.get_value_from_registry("mxfp8-quantized")
SHAPES = {"self_attn.o_proj": (300, 256), "mlp.up_proj": (130, 96), "mlp.down_proj": (1, 64), "mlp.gate_proj": (64, 64)}
LAYERS = 2


def mxfp8(weight: Tensor) -> dict[str, Tensor]:
    """Codes and scales of compressed-tensors."""
    groups = weight.view(weight.shape[0], -1, 32).abs().amax(-1).clamp(min=1e-12)
    scales = torch.exp2(generate_mx_scales(groups, 8) - 127)
    found = LIBRARY.compress({"weight": weight, "weight_scale": scales}, SCHEME)
    return {name: found[name].detach().contiguous() for name in ("weight", "weight_scale")}


def decoded_by_library(stored: dict[str, Tensor]) -> Tensor:
    """The values that compressed-tensors reads."""
    value: Tensor = LIBRARY.decompress(dict(stored), SCHEME)["weight"]
    return value.detach().float()


def blocks(weight: Tensor) -> dict[str, Tensor]:
    """Blocks of 32 x 48 of torch's casts."""
    return dict(quantized.fp8_bytes(torch.where(weight == 0, 1e-3, weight)).stored)


FORMS: dict[str, tuple[Any, dict[str, Any], str, tuple[int, int]]] = {
    "groups": (
        mxfp8,
        quantized.compressed_config("mxfp8-quantized", ARGUMENTS | {"scale_dtype": "torch.uint8"}),
        "weight_scale",
        (1, 32),
    ),
    "blocks": (blocks, quantized.FORMATS["fp8 blocks, byte scales"][1], "weight_scale_inv", (32, 48)),
}
"""By name: function that writes a weight, description in config.json, name of the scales, and size of a block."""


def write(directory: Path, form: str, seed: int) -> tuple[Path, Path]:
    """Write a donor, and a model in float32 whose values are hard to encode."""
    quantize, section, _, _ = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = {"model.norm.weight": torch.randn(64, generator=generator).bfloat16()}
    plain = {"model.norm.weight": stored["model.norm.weight"].float()}
    for number in range(LAYERS):
        for place, (module, shape) in enumerate(SHAPES.items()):
            name = f"model.layers.{number}.{module}"
            found = quantize(torch.randn(shape, generator=generator))
            stored |= {f"{name}.{ending}": tensor for ending, tensor in found.items()}
            plain[f"{name}.weight"] = with_limits(hard_values(shape, seed + 10 * number + place))
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}
    donor = write_checkpoint(directory / f"{form}-{seed}", stored, config=config | {"quantization_config": section})
    return donor, write_checkpoint(directory / f"{form}-{seed}-hard", plain, config=config)


def with_limits(values: Tensor) -> Tensor:
    """The values, with some rows whose largest one is the last that a scale fits, and the first that needs the next."""
    limit = torch.tensor(448.0)
    above = torch.nextafter(limit, torch.tensor(torch.inf))
    for row, largest in enumerate((limit, above, limit * 2.0**-20, above * 2.0**-20)):
        if row < len(values) // 2:
            values[row] = values[row].clamp(-largest, largest)
            values[row, ::32] = largest
    return values


def reference(values: Tensor, rows: int, columns: int) -> tuple[bytes, bytes]:
    """Codes and exponents in float64: the nearest code to each quotient, of two equally near ones the even one."""
    wide: Floats = values.double().numpy()
    height, width = -(-wide.shape[0] // rows), -(-wide.shape[1] // columns)
    padded = np.zeros((height * rows, width * columns))
    padded[: wide.shape[0], : wide.shape[1]] = wide
    largest = np.abs(padded.reshape(height, rows, width, columns)).max((1, 3))
    fractions, powers = np.frexp(np.maximum(largest, 1e-12) / 448 * (1 - 2.0**-52))
    assert ((fractions >= 0.5) & (fractions < 1)).all()
    powers = np.where(largest == 0, 0, powers)
    assert (largest <= 448 * np.exp2(powers)).all()
    assert ((largest > 224 * np.exp2(powers)) | (largest < 1e-12)).all()
    expanded = np.exp2(powers).repeat(rows, 0).repeat(columns, 1)[: wide.shape[0], : wide.shape[1]]
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    quotients = np.abs(wide / expanded)
    above = np.searchsorted(numbers, quotients).clip(1, 126)
    low, high = quotients - numbers[above - 1], numbers[above] - quotients
    nearest = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    codes = nearest + 128 * np.signbit(wide)
    return codes.astype(np.uint8).tobytes(), (powers + 127).astype(np.uint8).tobytes()


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def hard(donor: Path, values: Path, **more: Any) -> dict[str, Any]:
    """A merge whose result is the second model, stored like the first."""
    return weighted_mean({donor: 0.0, values: 1.0}, **({"out_dtype": "same"} | more))


@pytest.mark.parametrize("form", FORMS)
def test_codes_and_exponents_are_those_of_float64(tmp_path: Path, form: str) -> None:
    """Ties, subnormal codes, the largest code, blocks of zeros and of tiny values, and partial blocks."""
    donor, values = write(tmp_path, form, 1)
    planned = plan(hard(donor, values))
    result = mergeloom.merge(planned, tmp_path / "out")
    assert result.measured.bytes_written == planned.schedule.bytes_written
    found, stored, wanted = read_model(tmp_path / "out"), read_model(donor), read_model(values)
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        name: (each.dtype, each.shape) for name, each in stored.items()
    }
    _, section, ending, (rows, columns) = FORMS[form]
    codes: set[int] = set()
    for name, value in wanted.items():
        if name != "model.norm.weight":
            made = as_bytes(found[name]), as_bytes(found[name.removesuffix("weight") + ending])
            assert made == reference(value, rows, columns), name
            codes.update(made[0])
    assert codes >= set(range(256)) - {0x7F, 0xFF}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == section


def test_the_library_has_the_same_groups_and_reads_the_result(tmp_path: Path) -> None:
    """It rounds the scale of a group up if the largest value is exactly the largest code, which needs no rounding."""
    donor, values = write(tmp_path, "groups", 2)
    mergeloom.merge(hard(donor, values), tmp_path / "out")
    mergeloom.merge(linear(tmp_path / "out", dtype="float32"), tmp_path / "decoded")
    found, decoded = read_model(tmp_path / "out"), read_model(tmp_path / "decoded")
    for name, value in read_model(values).items():
        if name == "model.norm.weight":
            continue
        stored = {"weight": found[name], "weight_scale": found[f"{name}_scale"]}
        assert torch.equal(decoded_by_library(stored), decoded[name])
        own = mxfp8(value)
        groups = value.view(value.shape[0], -1, 32).abs().amax(-1)
        same = (torch.frexp(groups).mantissa != 0.875) & (groups >= 1e-12)
        assert same.any()
        assert torch.equal(own["weight_scale"][same], stored["weight_scale"][same])
        each = [tensor.view(torch.uint8).view(value.shape[0], -1, 32)[same] for tensor in (own["weight"], found[name])]
        assert torch.equal(*each)


@pytest.mark.parametrize("form", FORMS)
def test_a_result_is_an_input_like_its_values(tmp_path: Path, form: str) -> None:
    """Merged with the donor, with slerp and into the same format, as a twin that stores what torch decodes."""
    donor, values = write(tmp_path, form, 3)
    mergeloom.merge(hard(donor, values), tmp_path / "out")
    _, _, ending, (rows, columns) = FORMS[form]
    twins = []
    for number, model in enumerate((tmp_path / "out", donor)):
        tensors = read_model(model)
        twin = {"model.norm.weight": tensors["model.norm.weight"].float()}
        for name in (name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn):
            scales = torch.exp2(tensors[name.removesuffix("weight") + ending].float() - 127)
            wide = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            twin[name] = tensors[name].float() * wide[: tensors[name].shape[0], : tensors[name].shape[1]]
        config = json.loads((model / "config.json").read_text())
        del config["quantization_config"]
        twins.append(write_checkpoint(tmp_path / f"twin{number}", twin, config=config))
    pairs = ((tmp_path / "out", donor), (twins[0], twins[1]))
    for number, (first, second) in enumerate(pairs):
        mergeloom.merge(linear(first, second, dtype="float32"), tmp_path / f"mean{number}")
    found, wanted = read_model(tmp_path / "mean0"), read_model(tmp_path / "mean1")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    mergeloom.merge(linear(*pairs[0]), tmp_path / "again")
    again = read_model(tmp_path / "again")
    for name, tensor in wanted.items():
        if name != "model.norm.weight":
            made = as_bytes(again[name]), as_bytes(again[name.removesuffix("weight") + ending])
            assert made == reference(tensor, rows, columns)


@pytest.mark.parametrize("form", FORMS)
def test_resumed_and_verified(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_blocks_small(monkeypatch)
    donor, values = write(tmp_path, form, 4)
    recipe = {"merge_method": "slerp", "base_model": str(donor), "parameters": {"t": 0.3}}
    recipe |= {"models": [{"model": str(each)} for each in (donor, values)], "out_dtype": "same"}
    whole = run(recipe, tmp_path / "whole")
    for commits in (1, 2):
        assert interrupt(recipe, tmp_path / "out", commits)
    smallest = plan(recipe, OPTIONS).schedule.minimum_ram
    resumed = run(recipe, tmp_path / "out", replace(OPTIONS, max_ram=smallest + (64 << 20), threads=2))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert resumed.shares == whole.shares
    assert {share.tensor for share in whole.shares} == set(read_model(values)) - {"model.norm.weight"}
    scales = f"model.layers.1.mlp.up_proj.{FORMS[form][2]}"
    flip(*position_of(tmp_path / "out", scales))
    (damage,) = verify(tmp_path / "out").damaged
    assert f"tensor {scales} in " in damage


@pytest.mark.parametrize("form", FORMS)
def test_a_device_with_its_own_memory_writes_the_same_bytes(tmp_path: Path, form: str) -> None:
    donor, values = write(tmp_path, form, 7)
    graph = plan(hard(donor, values), OPTIONS).built.graph
    written = []
    for vram in (None, 64 << 20):
        budget = DeviceBudget("test", vram, 1)
        schedule = make_schedule(graph, Budget(1 << 30, 0, (budget,)), slot_bytes=1 << 20)
        reader, sink = Reader(), Sink()
        device: Device = CpuDevice(1) if vram is None else CountingDevice("test", vram)
        Executor(graph, schedule, [device], reader, sink).run()
        reader.close()
        written.append(sink.written)
    codes = [node for node in graph.tasks() if len(graph.results(node)) == 2]
    assert len(codes) == LAYERS * len(SHAPES)
    assert {graph.node_dtype[graph.results(node)[1]].name for node in codes} == {"U8"}
    assert written[0] == written[1]
    assert written[0].keys() >= {result for node in codes for result in graph.results(node)}


class Sink:
    """A sink that keeps what is written, by node."""

    def __init__(self) -> None:
        self.written: dict[int, bytes] = {}

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Keep the data, which follow those before."""
        assert offset == len(self.written.get(node, b""))
        self.written[node] = self.written.get(node, b"") + bytes(data)

    def finished(self, node: int) -> None:
        """Do nothing."""


@pytest.mark.parametrize("form", FORMS)
def test_reports_name_the_format_and_the_dtype(tmp_path: Path, form: str) -> None:
    donor, values = write(tmp_path, form, 5)
    planned = plan(hard(donor, values))
    scales = f"model.layers.0.mlp.up_proj.{FORMS[form][2]}"
    assert explain(planned, scales).dtype == "U8"
    assert re.search(r"^  dtype +BF16, FP8 blocks$", plan_text(planned), re.MULTILINE)
    (same,) = re.findall(r"^ +same +\S+ +FP8 blocks +this plan$", plan_text(planned), re.MULTILINE)
    assert same
    assert not planned.warnings
    mergeloom.merge(planned, tmp_path / "out")
    assert verify(tmp_path / "out").whole
    found = mergeloom.inspect(tmp_path / "out")
    assert {name: len(each) for name, each in found.formats().items()} == {"FP8 blocks": LAYERS * len(SHAPES)}


@pytest.mark.parametrize("form", FORMS)
def test_experts_alone_can_be_the_same(tmp_path: Path, form: str) -> None:
    donor, values = write(tmp_path, form, 6)
    rules = [{"filter": "mlp", "value": "same"}, {"value": "bfloat16"}]
    mergeloom.merge(hard(donor, values, out_dtype=rules), tmp_path / "out")
    found, wanted = read_model(tmp_path / "out"), read_model(values)
    _, section, ending, (rows, columns) = FORMS[form]
    for name, value in wanted.items():
        scales = name.removesuffix("weight") + ending
        if "mlp" in name:
            assert (as_bytes(found[name]), as_bytes(found[scales])) == reference(value, rows, columns)
        else:
            assert scales not in found
            assert torch.equal(found[name], value.bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    key = "ignore" if "ignore" in section else "modules_to_not_convert"
    decoded = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(LAYERS)]
    assert config == section | {key: [*section.get(key, []), *decoded]}
