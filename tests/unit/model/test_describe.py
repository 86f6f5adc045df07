"""What `inspect` says a checkpoint is, in its first lines and in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.model.contents.diffusion import find_diffusion_model
from mergeloom.engine.model.inspect import inspect_model
from mergeloom.report.inspect import inspection_sections
from mergeloom.report.sections import plain
from tests.support.models import Shape, tiny_llama, write_checkpoint
from tests.support.models.diffusion import CLIP, DIFFUSERS_UNET, FLUX, UNET, VAE, prefixed, sd15, sdxl, write_file
from tests.unit.graph.building import checkpoint

MMDIT = {"joint_blocks.0.x_block.attn.qkv.weight": (24, 8), "x_embedder.proj.weight": (8, 4)}
SD3: dict[str, Shape] = {
    **prefixed("model.diffusion_model.", MMDIT),
    **prefixed("text_encoders.clip_l.transformer.text_model.", CLIP),
    **prefixed("text_encoders.t5xxl.transformer.", {"shared.weight": (32, 8)}),
    **prefixed("first_stage_model.", VAE),
}
TITLES: dict[str, tuple[dict[str, Shape], str, set[str]]] = {
    "UNet": (UNET, "diffusion UNet", {"UNet"}),
    "UNet of ComfyUI": (prefixed("model.diffusion_model.", UNET), "diffusion UNet", {"UNet"}),
    "UNet of diffusers": (DIFFUSERS_UNET, "diffusion UNet", {"UNet"}),
    "inpainting UNet": (
        UNET | {"input_blocks.0.0.weight": (8, 9, 3, 3)},
        "diffusion UNet with 9 input channels",
        {"UNet"},
    ),
    "Flux": (FLUX, "Flux transformer", {"transformer"}),
    "Flux of ComfyUI": (
        prefixed("model.diffusion_model.", FLUX) | prefixed("vae.", VAE),
        "Flux checkpoint",
        {"transformer", "VAE"},
    ),
    "SD3": (
        SD3,
        "Stable Diffusion 3 checkpoint",
        {"transformer", "VAE", "text encoder clip_l", "text encoder t5xxl"},
    ),
    "VAE": (VAE, "diffusion VAE", {"VAE"}),
    "refiner": (
        prefixed("model.diffusion_model.", UNET)
        | prefixed("conditioner.embedders.0.model.", {"ln_final.weight": (8,)}),
        "SDXL refiner checkpoint",
        {"UNet", "text encoder"},
    ),
}


@pytest.mark.parametrize(("tensors", "title", "parts"), TITLES.values(), ids=TITLES)
def test_diffusion_models(tensors: dict[str, Shape], title: str, parts: set[str]) -> None:
    refs = checkpoint("x", tensors).tensors
    found = find_diffusion_model(refs, None)
    assert found is not None
    assert found.title == title
    assert {part.name for part in found.parts} == parts
    assert sum(part.tensors for part in found.parts) == len(tensors)
    assert sum(part.nbytes for part in found.parts) == sum(ref.nbytes for ref in refs.values())
    assert find_diffusion_model(refs, {"architectures": ["X"]}) is None


OTHERS: dict[str, dict[str, Any]] = {
    "language model": dict(tiny_llama(layers=2).tensors),
    "text encoder alone": prefixed("text_model.", CLIP),
    "vision-language model": {"vision_tower.encoder.layers.0.w": (2, 2), "model.layers.0.w": (2, 2)},
    "wrapped language model": {"transformer.h.0.attn.weight": (2, 2), "transformer.wte.weight": (2, 2)},
}


@pytest.mark.parametrize("tensors", OTHERS.values(), ids=OTHERS)
def test_other_models_are_not_taken_for_diffusion_models(tensors: dict[str, Shape]) -> None:
    assert find_diffusion_model(checkpoint("x", tensors).tensors, None) is None


def test_a_checkpoint_with_parts(tmp_path: Path) -> None:
    inspection = inspect_model(write_file(tmp_path / "a.safetensors", sd15(0, channels=9, ema=True)))
    content = inspection.to_dict()["content"]
    assert (content["kind"], content["source"], content["family"]) == ("diffusion model", "file", "Stable Diffusion")
    assert content["input_channels"] == 9
    assert {part["prefix"] for part in content["parts"]} == {
        *("model.diffusion_model.", "cond_stage_model.", "first_stage_model.", "model_ema.", "")
    }
    assert sum(part["bytes"] for part in content["parts"]) == inspection.to_dict()["bytes"]
    assert sum(part["parameters"] for part in content["parts"]) == inspection.to_dict()["parameters"]
    assert inspection.remarks == ()
    lines = plain(inspection_sections(inspection)).splitlines()
    assert lines[1].split(maxsplit=1) == [
        "content",
        "Stable Diffusion checkpoint with 9 input channels: " + ", ".join(part["name"] for part in content["parts"]),
    ]
    assert lines[2].split(maxsplit=1) == ["source", "single file, no config.json"]
    assert "Parts" in lines
    assert "Layers" not in lines


def test_text_encoders_have_numbers(tmp_path: Path) -> None:
    title = inspect_model(write_file(tmp_path / "a.safetensors", sdxl(0))).description.title
    assert title.startswith("SDXL checkpoint: ")
    assert sorted(title.partition(": ")[2].split(", ")) == ["UNet", "VAE", "text encoder 0", "text encoder 1"]


def test_models_with_and_without_config(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "a", tiny_llama(layers=2), shard_bytes=20_000)
    found = inspect_model(model).to_dict()["content"]
    assert found == {"kind": "model", "title": "LlamaForCausalLM", "source": "directory"}
    assert inspect_model(model / "model.safetensors.index.json").to_dict()["content"]["source"] == "index"
    text = plain(inspection_sections(inspect_model(model)))
    assert f"directory, config.json, {len(list(model.glob('*.safetensors')))} files" in text
    (model / "config.json").unlink()
    inspection = inspect_model(model)
    assert inspection.description.kind == "state dict"
    assert "there is no config.json next to the weights" in inspection.remarks


def test_a_textual_inversion(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {"clip_l": (2, 8), "clip_g": (2, 12)})
    inspection = inspect_model(tmp_path / "a/model.safetensors")
    assert inspection.description.kind == "textual inversion"
    assert inspection.description.title == "embeddings of a textual inversion: 2 tensors"
