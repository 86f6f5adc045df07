"""Adapters of diffusion models are recognized by their tensor names and rejected; control nets are models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mergeloom.engine.model.checks.identify import not_a_model
from mergeloom.engine.model.contents.adapters import find_adapter
from mergeloom.engine.model.inspect import inspect_model
from mergeloom.engine.run.diff.compare import Comparison
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.models import Shape, tiny_llama, write_checkpoint
from tests.support.models.diffusion import KOHYA
from tests.support.outputs import read_model, same_tensors
from tests.support.plans import without_location
from tests.unit.graph.building import checkpoint

CPU = Options(device="cpu", threads=1)
LLAMA = tiny_llama(layers=2)


def recipe(*models: Path) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in models],
    }


def refused(*models: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        plan(recipe(*models), CPU)
    return without_location(caught.value)


def found(tensors: dict[str, Shape]) -> list[str]:
    """The first lines of the reasons why these tensors are not a model."""
    return [reason.partition("\n")[0] for reason in not_a_model(checkpoint("x", tensors))]


TE, UNET = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_unet_input_blocks_1_1_proj_in"
DIFFUSION: dict[str, tuple[dict[str, Shape], str, tuple[int, ...], dict[str, int]]] = {
    "kohya": (KOHYA, "LoRA", (4,), {"text encoder": 1, "UNet": 2}),
    "kohya for SDXL": (
        {
            **{f"lora_te{n}_{side}.lora_{side}.weight": (4, 8) for n in (1, 2) for side in ("up", "down")},
            f"{UNET}.lora_down.weight": (16, 8),
            f"{UNET}.lora_up.weight": (8, 16),
        },
        "LoRA",
        (4, 16),
        {"text encoder": 2, "text encoder 2": 2, "UNet": 1},
    ),
    "kohya for Flux": (
        {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight": (4, 4) for side in ("up", "down")},
        "LoRA",
        (4,),
        {"transformer": 1},
    ),
    "DoRA": (
        {f"{UNET}.lora_down.weight": (4, 8), f"{UNET}.lora_up.weight": (8, 4), f"{UNET}.dora_scale": (1, 8)},
        "DoRA",
        (4,),
        {"UNet": 1},
    ),
    "LoCon": (
        {
            f"{UNET}.lora_down.weight": (4, 8, 1, 1),
            f"{UNET}.lora_mid.weight": (4, 4, 3, 3),
            f"{UNET}.lora_up.weight": (8, 4, 1, 1),
            f"{UNET}.alpha": (),
        },
        "LoCon (LyCORIS)",
        (4,),
        {"UNet": 1},
    ),
    "LoHa": (
        {f"{TE}.hada_w{n}_{side}": shape for n in (1, 2) for side, shape in (("a", (8, 4)), ("b", (4, 8)))}
        | {f"{TE}.alpha": ()},
        "LoHa (LyCORIS)",
        (4,),
        {"text encoder": 1},
    ),
    "LoKr": (
        {f"{UNET}.lokr_w1": (4, 4), f"{UNET}.lokr_w2_a": (2, 3), f"{UNET}.lokr_w2_b": (3, 2), f"{UNET}.alpha": ()},
        "LoKr (LyCORIS)",
        (3,),
        {"UNet": 1},
    ),
    "OFT": ({"oft_unet_down_0.oft_blocks": (4, 2, 2), "oft_unet_down_0.alpha": ()}, "OFT", (), {"UNet": 1}),
    "IA3 of LyCORIS": (
        {f"{UNET}.weight": (8,), f"{UNET}.on_input": (1,), f"{TE}.on_input": (1,)},
        "IA3",
        (),
        {"text encoder": 1, "UNet": 1},
    ),
    "full LyCORIS": (
        {f"{UNET}.diff": (8, 8), f"{UNET}.diff_b": (8,), f"{TE}.w_norm": (8,)},
        "LyCORIS",
        (),
        {"text encoder": 1, "UNet": 1},
    ),
    "GLoRA": ({f"{UNET}.{name}.weight": (8, 8) for name in ("a1", "a2", "b1", "b2")}, "LyCORIS", (), {"UNet": 1}),
    "diffusers": (
        {f"unet.down_blocks.0.attn1.to_q.lora.{side}.weight": (8, 8) for side in ("up", "down")},
        "LoRA",
        (8,),
        {"UNet": 1},
    ),
    "diffusers' processors": (
        {f"unet.mid_block.attn1.processor.to_{p}_lora.{s}.weight": (8, 8) for p in "qk" for s in ("up", "down")},
        "LoRA",
        (8,),
        {"UNet": 2},
    ),
    "diffusers with PEFT": (
        {f"transformer.single_transformer_blocks.0.attn.to_k.lora_{side}.weight": (8, 8) for side in "AB"},
        "LoRA",
        (8,),
        {"transformer": 1},
    ),
}


@pytest.mark.parametrize(("tensors", "kind", "ranks", "targets"), DIFFUSION.values(), ids=DIFFUSION)
def test_adapters_of_diffusion_models(
    tensors: dict[str, Shape], kind: str, ranks: tuple[int, ...], targets: dict[str, int], tmp_path: Path
) -> None:
    adapter = find_adapter(checkpoint("x", tensors).tensors)
    assert adapter is not None
    assert (adapter.kind, adapter.ranks, dict(adapter.targets), adapter.diffusion) == (kind, ranks, targets, True)
    reason = found(tensors)[0]
    assert reason.startswith(f"is an adapter ({kind}), not a model (it has a tensor '{adapter.example}'")
    assert "ComfyUI" in reason
    assert "AutoModelForCausalLM" not in reason
    file = write_checkpoint(tmp_path / "a", tensors) / "model.safetensors"
    model = write_checkpoint(tmp_path / "b", LLAMA)
    assert refused(model, file).startswith(f"{file} is an adapter ({kind})")
    with pytest.raises(CheckpointError, match="is an adapter"):
        Comparison(model, file)
    inspection = inspect_model(file)
    assert inspection.to_dict()["content"]["adapter"]["targets"] == targets
    assert inspection.description.title.startswith(f"adapter: {kind}")


def test_an_ip_adapter_is_rejected() -> None:
    tensors: dict[str, Shape] = {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)}
    assert found(tensors)[0].startswith("is an adapter (IP-Adapter), not a model (it has a tensor 'image_proj.")


CONTROL_NETS: dict[str, dict[str, Shape]] = {
    "diffusers": {"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3), "down_blocks.0.weight": (8, 8)},
    "original": {"control_model.zero_convs.0.0.weight": (8, 8), "control_model.input_blocks.0.0.weight": (8, 8)},
}


@pytest.mark.parametrize("tensors", CONTROL_NETS.values(), ids=CONTROL_NETS)
def test_control_nets_merge(tensors: dict[str, Shape], tmp_path: Path) -> None:
    assert found(tensors) == []
    pair = [write_checkpoint(tmp_path / name, tensors, fill=n) / "model.safetensors" for n, name in enumerate("ab")]
    assert len(plan(recipe(*pair), CPU).built.graph.outputs) == 2
    assert inspect_model(pair[0]).description.title == "diffusion control net"


def test_advice_for_a_file_with_a_wrapper_only_copies_this_file(tmp_path: Path) -> None:
    values = read_model(write_checkpoint(tmp_path / "original", LLAMA))
    wrapped = {name.replace("self_attn.", "_orig_mod.self_attn."): value for name, value in values.items()}
    a = write_checkpoint(tmp_path / "a", wrapped)
    file = (a / "model.safetensors").rename(a / "x.safetensors")
    script = refused(file).partition("\n\n")[2]
    exec("\n".join(line[4:] for line in script.splitlines()), {})
    assert sorted(path.name for path in a.iterdir()) == ["x-renamed.safetensors", "x.safetensors"]
    assert same_tensors(load_file(a / "x-renamed.safetensors"), values)
