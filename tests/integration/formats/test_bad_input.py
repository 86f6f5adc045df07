"""Quantized models that are damaged or contradict their config.json: one error each, from `plan` and `merge`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.command_line import run
from tests.support.models import quantized, write_checkpoint
from tests.support.outputs import read_model

MODULE = "model.layers.1.mlp.up_proj"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Damage:
    """Damage to a model.

    Args:
        form: format of the model.
        says: regular expression that the message contains; ``M`` stands for the module's name.
        tensors: function that damages the stored tensors.
        section: settings of config.json's ``quantization_config`` that are changed.
        copied: whether a copy of the damaged tensor is an error, too.
        planned: whether the headers and config.json show the damage.
    """

    form: str
    says: str
    tensors: Callable[[Tensors], object] = lambda tensors: None
    section: tuple[tuple[str, Any], ...] = ()
    copied: bool = True
    planned: bool = True


def cut(ending: str, rows: int | None = None, columns: int | None = None) -> Callable[[Tensors], object]:
    """Leave out rows or columns of a tensor of the module."""
    name = f"{MODULE}.{ending}"
    return lambda tensors: tensors.update({name: tensors[name][:rows, :columns].contiguous()})


def drop(ending: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{MODULE}.{ending}")


def nan(ending: str) -> Callable[[Tensors], object]:
    """Make the last scale NaN: all bits set in every dtype of scales."""

    def damage(tensors: Tensors) -> None:
        scales = tensors[f"{MODULE}.{ending}"].clone().contiguous()
        flat = scales.view(-1).view(torch.uint8)
        flat[-scales.dtype.itemsize :] = 255
        tensors[f"{MODULE}.{ending}"] = scales

    return damage


GROUPS = r"quantization_config\.config_groups\.group_0\.weights"
SCALE = "M.weight_scale"
MISSING = "is quantized by config.json .{}., but its scales are missing: expected {}. Download the model again"
NAN = r"tensor M\.{} of \S+ holds NaN or infinite values .in model\.safetensors."
UNKNOWN = r"config\.json has quantization_config\.{}, which is not known, and it is {}"
LISTED = r"config\.json lists its module as not quantized .quantization_config\.{}"

DAMAGES: dict[str, Damage] = {
    "FP8 scales of another shape": Damage(
        "fp8 blocks",
        r"M\.weight_scale_inv of shape \[2, 2\] does not fit M\.weight of shape \[80, 64\]: config\.json has blocks of "
        r"32 x 48 \(quantization_config\.weight_block_size\), which need \[3, 2\]",
        cut("weight_scale_inv", rows=2),
    ),
    "INT4 scales of another shape": Damage(
        "int4", rf"M\.weight_scale of shape \[79, 4\] does not fit M\.weight_packed, .* \(config\.json: {GROUPS}\)",
        cut("weight_scale", rows=79),
    ),
    "NVFP4 with several scales of the tensor": Damage(
        "nvfp4 of modelopt", r"M\.weight_scale_2 is F32 of shape \[2\]: expected one F32 for all of M\.weight",
        lambda tensors: tensors.update({f"{MODULE}.weight_scale_2": torch.ones(2)}),
    ),
    "FP8 without scales": Damage(
        "fp8 blocks",
        r"M\.weight \(F8_E4M3 of shape \[80, 64\]\) "
        + MISSING.format("quantization_config.weight_block_size", "M.weight_scale_inv"),
        drop("weight_scale_inv"),
    ),
    "FP8 rows without scales": Damage(
        "fp8 rows", MISSING.format("quantization_config.quant_method", SCALE), drop("weight_scale")
    ),
    "FP8 of ModelOpt without scales": Damage(
        "fp8 tensor", MISSING.format("quantization_config.quant_algo", SCALE), drop("weight_scale")
    ),
    "INT4 without scales": Damage(
        "int4", rf"M\.weight_packed \(I32 of shape \[80, 8\]\) {MISSING.format(GROUPS, SCALE)}", drop("weight_scale")
    ),
    "INT8 without scales": Damage("int8", MISSING.format(GROUPS, SCALE), drop("weight_scale")),
    "MXFP4 without scales": Damage("mxfp4", MISSING.format(GROUPS, SCALE), drop("weight_scale")),
    "NVFP4 without the tensor's scale": Damage(
        "nvfp4", MISSING.format(GROUPS, "M.weight_global_scale"), drop("weight_global_scale")
    ),
    "NVFP4 of ModelOpt without the tensor's scale": Damage(
        "nvfp4 of modelopt",
        MISSING.format("quantization_config.quant_algo", "M.weight_scale_2"),
        drop("weight_scale_2"),
    ),
    "INT4 of an odd width": Damage(
        "int4",
        r"M\.weight_packed of shape \[80, 7\] holds 56 values in each row, which can't be divided into groups "
        rf"of 16 that share a scale \(config\.json: {GROUPS}\); M\.weight_scale has the shape \[80, 4\]",
        cut("weight_packed", columns=7),
    ),
    "MXFP4 of an odd width": Damage(
        "mxfp4", r"M\.weight_packed of shape \[80, 31\] holds 62 values", cut("weight_packed", columns=31)
    ),
    "NVFP4 of an odd width": Damage("nvfp4 of modelopt", r"M\.weight of shape \[80, 31\]", cut("weight", columns=31)),
    "an unknown method": Damage(
        "fp8 blocks", UNKNOWN.format("quant_method fp9", r"F8_E4M3 of shape \[64, 80\]"),
        section=(("quant_method", "fp9"),), copied=False,
    ),
    "an unknown format": Damage(
        "int4", UNKNOWN.format("format pack-quantized-2", r"I32 of shape \[64, 10\]"),
        section=(("format", "pack-quantized-2"),), copied=False,
    ),
    "codes with other values": Damage(
        "fp8 blocks", UNKNOWN.format("fmt e4m3fnuz", "F8_E4M3"), section=(("fmt", "e4m3fnuz"),), copied=False
    ),
    "an unknown algorithm": Damage(
        "nvfp4 of modelopt", UNKNOWN.format("quant_algo NVFP5", "U8"), section=(("quant_algo", "NVFP5"),), copied=False
    ),
    "a listed module that is quantized": Damage(
        "fp8 blocks", r"M\.weight is stored quantized, as M\.weight \(F8_E4M3 of shape \[80, 64\]\) and "
        r"M\.weight_scale_inv \(F32 of shape \[3, 2\]\), but " + LISTED.format(r"modules_to_not_convert: 'M'"),
        section=(("modules_to_not_convert", ["lm_head", MODULE]),),
    ),
    "a suffix of quantized modules": Damage(
        "fp8 rows",
        LISTED.format("modules_to_not_convert: 'up_proj'"),
        section=(("modules_to_not_convert", ["up_proj"]),),
    ),
    "a pattern of quantized modules": Damage(
        "int4", LISTED.format(r"ignore: 're:\.\*up_proj'"), section=(("ignore", ["lm_head", "re:.*up_proj"]),)
    ),
    **{
        f"a scale that is NaN, {form}": Damage(form, NAN.format(ending), nan(ending), copied=False, planned=False)
        for form, ending in (
            ("fp8 blocks", "weight_scale_inv"),
            ("fp8 blocks, bf16 scales", "weight_scale_inv"),
            ("fp8 blocks, e8m0 scales", "scale"),
            ("fp8 blocks, byte scales", "weight_scale_inv"),
            ("fp8 rows", "weight_scale"),
            ("int4", "weight_scale"),
            ("mxfp4", "weight_scale"),
            ("nvfp4", "weight_scale"),
            ("nvfp4", "weight_global_scale"),
        )
    },
}  # fmt: skip


def write_damaged(directory: Path, damage: Damage) -> tuple[Path, Path]:
    """Write a damaged model, and another one in the same format."""
    sound, _ = quantized.write_pair(directory / "sound", damage.form, 1)
    other, _ = quantized.write_pair(directory / "other", damage.form, 2)
    tensors, config = read_model(sound), json.loads((sound / "config.json").read_text())
    damage.tensors(tensors)
    config["quantization_config"] |= dict(damage.section)
    return write_checkpoint(directory / "damaged", tensors, config=config), other


def recipe(directory: Path, method: str, models: list[Path]) -> Path:
    entries = [
        {"model": str(model)} | ({"parameters": {"weight": 0.5}} if method == "linear" else {}) for model in models
    ]
    file = directory / f"{method}.yml"
    file.write_text(json.dumps({"merge_method": method, "models": entries}))
    return file


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_error_that_names_tensor_shapes_and_key(tmp_path: Path, name: str) -> None:
    damage = DAMAGES[name]
    damaged, other = write_damaged(tmp_path, damage)
    message = re.sub(r"\bM(?=\\?\.|')", MODULE, damage.says)
    file = recipe(tmp_path, "linear", [damaged, other])
    for command in ([["plan", file]] if damage.planned else []) + [["merge", file, tmp_path / "out"]]:
        done = run(*command, "--quiet") if command[0] == "merge" else run(*command)
        assert done.returncode == 4, done.stderr
        (error,) = (line for line in done.stderr.splitlines() if line.startswith("mergeloom: "))
        assert re.search(message, error), error
        assert str(damaged) in error
    assert not (tmp_path / "out" / "config.json").exists()
    copy = run("plan", recipe(tmp_path, "passthrough", [damaged]))
    assert copy.returncode == (4 if damage.copied else 0), copy.stderr
