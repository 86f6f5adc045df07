"""Layouts of experts: how they are found, and the reason why a model can't be presented in another layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.model.experts.layouts import LAYOUTS
from mergeloom.engine.model.experts.mapping import NamedCheckpoint, in_layout_of
from mergeloom.engine.model.experts.storage import owner_of, storage_of
from mergeloom.engine.model.formats.registry import tensors_of
from mergeloom.engine.model.inspect import inspect_model
from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.tensors.assembled import AssembledRef
from mergeloom.report.inspect import inspection_sections
from tests.support.models import write_checkpoint

Shapes = dict[str, tuple[int, ...]]
E, ROWS, H = 3, 6, 8
QWEN = {"model_type": "qwen3_moe", "num_experts": E, "moe_intermediate_size": ROWS, "hidden_size": H}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": E, "intermediate_size": ROWS, "hidden_size": H}


def separate(layers: int = 2, module: str = "mlp", names: str = "gate_proj up_proj down_proj") -> Shapes:
    """The shapes of a model with separate experts."""
    gate, up, down = names.split()
    shapes: Shapes = {"model.embed_tokens.weight": (10, H)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.{module}"
        shapes[f"{prefix}.gate.weight"] = (E, H)
        for expert in range(E):
            each = {gate: (ROWS, H), up: (ROWS, H), down: (H, ROWS)}
            shapes |= {f"{prefix}.experts.{expert}.{name}.weight": shape for name, shape in each.items()}
    return shapes


def fused(layers: int = 2, *, transposed: bool = False) -> Shapes:
    """The shapes of a model with fused experts."""
    shapes: Shapes = {"model.embed_tokens.weight": (10, H)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp"
        shapes[f"{prefix}.gate.weight"] = (E, H)
        shapes[f"{prefix}.experts.gate_up_proj"] = (E, H, 2 * ROWS) if transposed else (E, 2 * ROWS, H)
        shapes[f"{prefix}.experts.down_proj"] = (E, ROWS, H) if transposed else (E, H, ROWS)
    return shapes


def opened(
    directory: Path, name: str, shapes: Shapes, config: Mapping[str, Any] | None = QWEN, **more: Any
) -> NamedCheckpoint:
    """Write and open a model."""
    return NamedCheckpoint(name, open_checkpoint(write_checkpoint(directory / name, shapes, config=config, **more)))


def test_owners_are_layers() -> None:
    assert owner_of("model.layers.3.mlp.experts.7.gate_proj.weight") == "model.layers.3."
    assert owner_of("model.layers.3.mlp.experts.gate_up_proj") == "model.layers.3."
    assert owner_of("model.layers.3.mlp.shared_experts.gate_proj.weight") == "model.layers.3."
    assert owner_of("language_model.model.layers.12.block_sparse_moe.gate.weight") == "language_model.model.layers.12."
    assert owner_of("experts.0.w1.weight") == ""
    assert owner_of("lm_head.weight") == ""


@pytest.mark.parametrize(
    ("shapes", "shown", "data"),
    [
        (separate(), "3 per layer, separate in 2 layers", {"fused_layers": 0, "separate_layers": 2, "per_layer": 3}),
        (fused(1), "3 per layer, fused in 1 layer", {"fused_layers": 1, "separate_layers": 0, "per_layer": 3}),
        (
            fused(1) | {f"mtp.{name}": shape for name, shape in separate(1).items()},
            "3 per layer, fused in 1 layer and separate in 1 layer",
            {"fused_layers": 1, "separate_layers": 1, "per_layer": 3},
        ),
    ],
)
def test_inspect_says_how_experts_are_stored(shapes: Shapes, shown: str, data: dict[str, int], tmp_path: Path) -> None:
    inspection = inspect_model(write_checkpoint(tmp_path / "model", shapes, config=QWEN))
    assert ("experts", shown) in inspection_sections(inspection)[0].fields
    assert inspection.to_dict()["experts"] == data


def test_names_that_resemble_experts_are_none() -> None:
    names = ("mlp.shared_experts.gate_up_proj", "mlp.experts_bias.0.x", "mlp.experts.scale", "mlp.gate_up_proj.weight")
    storage = storage_of(dict.fromkeys(names))  # type: ignore[arg-type]
    assert not storage.fused
    assert not storage.separate
    assert str(storage) == ""


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_layout_maps_all_tensors_both_ways(model_type: str, tmp_path: Path) -> None:
    layout = LAYOUTS[model_type]
    config = {"text_config": {"model_type": model_type, "num_experts": E, layout.intermediate: ROWS, "hidden_size": H}}
    one: Shapes = {}
    other: Shapes = {
        f"model.layers.0.{layout.fused}.{name}": shape
        for name, shape in {
            "gate_up_proj": (E, H, 2 * ROWS) if layout.transposed else (E, 2 * ROWS, H),
            "down_proj": (E, ROWS, H) if layout.transposed else (E, H, ROWS),
            **({"gate_up_proj_bias": (E, 2 * ROWS), "down_proj_bias": (E, H)} if layout.bias else {}),
        }.items()
    }
    for expert in range(E):
        for name, shape in ((layout.gate, (ROWS, H)), (layout.up, (ROWS, H)), (layout.down, (H, ROWS))):
            prefix = f"model.layers.0.{layout.separate}.{expert}.{name}"
            one |= {f"{prefix}.weight": shape} | ({f"{prefix}.bias": shape[:1]} if layout.bias else {})
    for old, new in layout.renamed:
        one[f"model.layers.0.{old}"] = other[f"model.layers.0.{new}"] = (E, H)
    apart, together = opened(tmp_path, "apart", one, config), opened(tmp_path, "together", other, config)
    for donor, each in ((apart, together), (together, apart)):
        mapped = in_layout_of(donor, each)
        shapes = {name: tensor.shape for name, tensor in tensors_of(mapped.checkpoint).items()}
        assert shapes == {name: ref.shape for name, ref in donor.checkpoint.tensors.items()}
        stored = sum(ref.nbytes for ref in each.checkpoint.tensors.values())
        assert sum(ref.nbytes for ref in mapped.checkpoint.tensors.values()) == stored
        assert mapped.note


def test_tensors_in_other_modules_keep_their_layout(tmp_path: Path) -> None:
    mtp = {f"mtp.{name}": shape for name, shape in separate(1).items()}
    donor = opened(tmp_path, "donor", fused(1) | mtp)
    alike = opened(tmp_path, "alike", mtp | fused(1))
    assert in_layout_of(donor, alike).checkpoint is alike.checkpoint
    other = in_layout_of(donor, opened(tmp_path, "other", separate(1) | mtp))
    assert {name for name, ref in other.checkpoint.tensors.items() if isinstance(ref, AssembledRef)} == {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    assert mtp.keys() <= other.checkpoint.tensors.keys()


REJECTED: dict[str, tuple[Shapes, Any, Shapes, Any, str]] = {
    "unknown architecture": (
        fused(),
        QWEN | {"model_type": "other_moe"},
        separate(),
        QWEN | {"model_type": "other_moe"},
        r"other stores experts separately \(model.layers.0.mlp.experts.0.down_proj.weight\), but donor stores experts "
        r"fused \(.*\): .* mergeloom doesn't know those of model_type 'other_moe'",
    ),
    "no config": (fused(), QWEN, separate(), None, "other has no config.json, whose model_type determines"),
    "no config of the donor": (separate(), None, fused(), QWEN, "donor has no config.json, whose model_type"),
    "two architectures": (
        fused(),
        QWEN,
        separate(module="block_sparse_moe", names="w1 w3 w2"),
        MIXTRAL,
        "model_type is 'qwen3_moe' in donor and 'mixtral' in other",
    ),
    "a missing projection": (
        fused(),
        QWEN,
        {name: shape for name, shape in separate().items() if "1.mlp.experts.2.up_proj" not in name},
        QWEN,
        r"other lacks model.layers.1.mlp.experts.2.up_proj.weight: .*all of the 3 experts that config.json counts; "
        "model.layers.1 has 5 of 6 such tensors",
    ),
    "too few experts": (
        fused(),
        QWEN,
        separate(),
        QWEN | {"num_experts": E + 1},
        "other lacks model.layers.0.mlp.experts.3.gate_proj.weight, model.layers.0.mlp.experts.3.up_proj.weight: ",
    ),
    "too many experts": (
        fused(),
        QWEN,
        separate(),
        QWEN | {"num_experts": E - 1},
        "tensor model.layers.0.mlp.experts.2.* belongs to expert 2, but config.json counts 2 experts",
    ),
    "scales": (
        fused(),
        QWEN,
        separate() | {"model.layers.0.mlp.experts.0.up_proj.weight_scale": (1,)},
        QWEN,
        r"tensor model.layers.0.mlp.experts.0.up_proj.weight_scale of other .*quantized experts have such tensors",
    ),
    "codes": (
        separate(),
        QWEN,
        {name.replace("gate_up_proj", "gate_up_proj_blocks"): shape for name, shape in fused().items()},
        QWEN,
        r"tensor model.layers.0.mlp.experts.gate_up_proj_blocks of other belongs to fused experts, but .*quantized",
    ),
    "a transposed projection": (
        fused(),
        QWEN,
        separate() | {"model.layers.0.mlp.experts.1.down_proj.weight": (ROWS, H)},
        QWEN,
        r"tensor model.layers.0.mlp.experts.1.down_proj.weight of other has shape \[6, 8\], but .* give \[8, 6\]",
    ),
    "transposed fused experts": (
        separate(),
        QWEN,
        fused(transposed=True),
        QWEN,
        r"down_proj of other has shape \[3, 6, 8\], but .* give \[3, 8, 6\]: .*can't be determined",
    ),
    "other names": (
        fused(),
        QWEN,
        separate(module="block_sparse_moe"),
        QWEN,
        "other has separate experts in model.layers.0, but not under the name mlp.experts",
    ),
    "one fused tensor": (
        separate(),
        QWEN,
        {name: shape for name, shape in fused().items() if "1.mlp.experts.down_proj" not in name},
        QWEN,
        "other has fused experts in model.layers.1 without model.layers.1.mlp.experts.down_proj",
    ),
    "no size": (
        separate(),
        QWEN,
        fused(),
        {key: value for key, value in QWEN.items() if key != "hidden_size"},
        "other: config.json has no hidden_size, which is needed to rearrange its experts",
    ),
    "no number": (
        separate(),
        QWEN,
        fused(),
        QWEN | {"num_experts": None},
        "config.json has no num_local_experts or num_experts or n_routed_experts",
    ),
    "two numbers": (
        separate(),
        QWEN,
        fused(),
        QWEN | {"n_routed_experts": 5},
        r"config.json gives several numbers of experts: \{'num_experts': 3, 'n_routed_experts': 5\}",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_not_determined_is_rejected(case: str, tmp_path: Path) -> None:
    ours, own_config, theirs, config, message = REJECTED[case]
    donor, other = opened(tmp_path, "donor", ours, own_config), opened(tmp_path, "other", theirs, config)
    with pytest.raises(CheckpointError, match=message):
        in_layout_of(donor, other)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("F8_E4M3", "is F8_E4M3: quantized experts can't be rearranged .*: use a bfloat16 version of other"),
        ("I8", "is I8: quantized experts can't be rearranged"),
        ("F32", "experts.0.gate_proj.weight of other is BF16, but others of these experts are F32|is F32, but others"),
    ],
)
def test_dtypes_are_checked(dtype: str, message: str, tmp_path: Path) -> None:
    shapes = separate()
    dtypes = dict.fromkeys(shapes, "BF16") | {"model.layers.0.mlp.experts.1.up_proj.weight": dtype}
    donor, other = opened(tmp_path, "donor", fused()), opened(tmp_path, "other", shapes, dtype=dtypes)
    with pytest.raises(CheckpointError, match=message):
        in_layout_of(donor, other)


def test_projections_of_another_dtype_are_tensors_of_their_own(tmp_path: Path) -> None:
    shapes = separate()
    dtypes = {name: "F32" if "down_proj" in name else "BF16" for name in shapes}
    mapped = in_layout_of(opened(tmp_path, "donor", fused()), opened(tmp_path, "other", shapes, dtype=dtypes))
    found = {name.rpartition(".")[2]: ref.dtype.name for name, ref in mapped.checkpoint.tensors.items()}
    assert (found["gate_up_proj"], found["down_proj"]) == ("BF16", "F32")


def test_the_layouts_are_those_of_transformers() -> None:
    """The names of separate experts and of routers, and that converting experts doesn't transpose them."""
    pytest.importorskip("transformers")
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping as mapping

    checked = 0
    for model_type, layout in LAYOUTS.items():
        if model_type in ("gpt_oss", "llama4_text"):  # only written fused
            assert layout.transposed
            continue
        found = mapping(model_type) or mapping(model_type.removesuffix("_text"))
        converters = [each for each in found if hasattr(each, "operations")]
        both, down = (
            next(each for each in converters if each.target_patterns[0].endswith(f"experts.{name}"))
            for name in ("gate_up_proj", "down_proj")
        )
        names = [pattern.replace("\\", "").split(".")[-2] for pattern in (*both.source_patterns, *down.source_patterns)]
        assert names == [layout.gate, layout.up, layout.down], model_type
        operations = [type(operation).__name__ for operation in (*both.operations, *down.operations)]
        assert operations == ["MergeModulelist", "Concatenate", "MergeModulelist"], model_type
        assert not layout.transposed
        assert not layout.interleaved
        renamings = [each for each in found if not hasattr(each, "operations")]
        for old, new in layout.renamed:
            name = f"layers.0.{old}"
            for each in renamings:
                name = re.sub(each.source_patterns[0], each.target_patterns[0].replace("\\", ""), name)
            assert name == f"layers.0.{new}", model_type
        checked += 1
    assert checked == len(LAYOUTS) - 2
