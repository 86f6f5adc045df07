"""Finds the parts of a diffusion model by its tensor names: denoiser, text encoders, VAE, noise schedule, EMA copy."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ....io.tensors.refs import TensorRef
from ..layers import AmbiguousLayers, LayerMap, find_layers

EMA = "model_ema."
"""Prefix of an EMA copy of the denoiser, which training needs and programs that generate images don't read."""
INPUT_CONVOLUTION = re.compile(
    r"(?:(?:model\.diffusion_model\.)?input_blocks\.0\.0|(?:unet\.)?conv_in)\.weight"
    r"|model_ema\.diffusion_modelinput_blocks00weight"
)
"""The convolution with one input channel for each channel of the latent image, the mask and other conditions."""

_DENOISER = "model.diffusion_model."
_PREFIXES = (
    (re.compile(r"model\.diffusion_model\."), "denoiser"),
    (re.compile(r"(?:first_stage_model|vae)\."), "VAE"),
    (re.compile(r"(?:cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.\w+)\."), "text encoder"),
    (re.compile(r"model_ema\."), "EMA copy of the denoiser"),
    (re.compile(r"control_model\."), "control net"),
    (
        re.compile(
            r"(?:betas|(?:sqrt_)?(?:one_minus_)?alphas_cumprod(?:_prev)?|sqrt_(?:recip|recipm1)_alphas_cumprod"
            r"|sqrt_recipm1?_alphas_cumprod|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod"
            r"|posterior_\w+|lvlb_weights|logvar|scale_factor|model_sampling\.sigmas|denoiser\.sigmas)$"
        ),
        "noise schedule",
    ),
)
"""Prefixes of the parts of a checkpoint that contains several, with the kind of part; the first match counts."""

_BARE = (
    ("control net", ("controlnet_cond_embedding.",)),
    ("control net", ("controlnet_down_blocks.",)),
    ("control net", ("controlnet_blocks.",)),
    ("control net", ("input_hint_block.", "zero_convs.")),
    ("UNet", ("input_blocks.", "middle_block.", "output_blocks.")),
    ("UNet", ("conv_in.", "down_blocks.", "up_blocks.")),
    ("transformer", ("double_blocks.", "img_in.", "final_layer.")),
    ("transformer", ("joint_blocks.", "x_embedder.")),
    ("transformer", ("transformer_blocks.", "x_embedder.")),
    ("transformer", ("transformer_blocks.", "img_in.")),
    ("transformer", ("transformer_blocks.", "pos_embed.")),
    ("transformer", ("blocks.", "patch_embedding.", "time_embedding.")),
    ("VAE", ("encoder.down_blocks.", "decoder.up_blocks.")),
    ("VAE", ("encoder.down.", "decoder.up.")),
    ("VAE", ("encoder.downsamples.", "decoder.upsamples.")),
)
"""Kinds of state dicts that contain one part only, without a prefix, with beginnings of names that show the kind."""

_FAMILIES = (
    ("Flux", ("double_blocks.", "single_blocks.")),
    ("Flux", ("transformer_blocks.", "single_transformer_blocks.")),
    ("Stable Diffusion 3", ("joint_blocks.",)),
)
"""Families of transformers, with beginnings of names that show them."""


@dataclass(frozen=True, slots=True)
class DiffusionPart:
    """A part of a diffusion model.

    Args:
        name: kind of the part, with the prefix's last component where there are several, such as ``text encoder 1``.
        prefix: prefix of its tensor names; empty for a state dict that contains nothing else.
        tensors: number of its tensors.
        elements: number of their elements.
        nbytes: size of its tensors in bytes.
    """

    name: str
    prefix: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DiffusionModel:
    """A checkpoint of a diffusion model.

    Args:
        family: name of the architecture, such as ``SDXL``; empty if it is not known.
        parts: its parts, the largest first.
        input_channels: number of channels of a UNet's input convolution: 4 for most models, 9 for inpainting; None
            without one.
    """

    family: str
    parts: tuple[DiffusionPart, ...]
    input_channels: int | None = None

    @property
    def title(self) -> str:
        """Family and kind, such as ``SDXL checkpoint`` or ``Flux transformer``."""
        names = [part.name for part in self.parts if part.name != "other"]
        kind = names[0] if len(names) == 1 else "checkpoint"
        what = f"{self.family} {kind}" if self.family else f"diffusion {kind}"
        channels = self.input_channels
        return what if channels in (None, 4) else f"{what} with {channels} input channels"


def find_diffusion_model(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> DiffusionModel | None:
    """Find the parts of a diffusion model; None if the names show none, or a config.json describes the model.

    Args:
        tensors: the stored tensors of a checkpoint.
        config: content of config.json, or None.
    """
    if config is not None:
        return None
    kind = bare_kind(tensors)
    if kind is None and not _has_parts(tensors):
        return None
    members: dict[tuple[str, str], list[TensorRef]] = {}
    for name, ref in tensors.items():
        members.setdefault((kind, "") if kind is not None else part_of(name), []).append(ref)
    inner = {name.removeprefix(_DENOISER) for name in tensors if kind is not None or name.startswith(_DENOISER)}
    family = _family(inner, members)
    counts = [sum(label == other for other, _ in members) for label, _ in members]
    denoiser = "UNet" if _beginnings(inner) >= {"input_blocks."} else "transformer"
    parts = [
        DiffusionPart(
            _named(denoiser if label == "denoiser" else label, prefix, several=count > 1),
            prefix,
            len(refs),
            sum(ref.elements for ref in refs),
            sum(ref.nbytes for ref in refs),
        )
        for ((label, prefix), refs), count in zip(members.items(), counts, strict=True)
    ]
    convolution = next((name for name in tensors if INPUT_CONVOLUTION.fullmatch(name)), None)
    shape = () if convolution is None or (kind is not None and kind != "UNet") else tensors[convolution].shape
    ordered = tuple(sorted(parts, key=lambda part: -part.nbytes))
    return DiffusionModel(family, ordered, shape[1] if len(shape) == 4 else None)


def architecture_of(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> str | None:
    """The architecture of a diffusion model without config.json by its tensor names, such as ``SDXL checkpoint``."""
    found = find_diffusion_model(tensors, config)
    return None if found is None else replace(found, input_channels=None).title


def family_of(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> str:
    """The family of a diffusion model without config.json, such as ``SDXL``; empty if it is not known."""
    found = find_diffusion_model(tensors, config)
    return "" if found is None else found.family


def is_diffusion(names: Collection[str]) -> bool:
    """Whether tensor names are those of a diffusion model or of one of its parts, except for a text encoder."""
    return bare_kind(names) is not None or _has_parts(names)


def bare_kind(names: Iterable[str]) -> str | None:
    """The kind of a state dict that contains one part of a diffusion model without a prefix, or None."""
    beginnings = _beginnings(names)
    return next((kind for kind, needed in _BARE if beginnings.issuperset(needed)), None)


def layers_of(tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> LayerMap:
    """The stacks of layers of a checkpoint; see `find_layers`. A diffusion model without config.json has none.

    Raises:
        AmbiguousLayers: several lists can be the main stack, as in a diffusion model.
        CheckpointError: no stack has the number of layers that `config` states.
    """
    if config is None and is_diffusion(tensors):
        raise AmbiguousLayers(
            "the layers can't be identified: it is a diffusion model, whose parts have layers of their own. "
            "Use filters for values that differ between its parts, such as `{filter: input_blocks, value: 0.5}`"
        )
    return find_layers(tensors, config)


def _has_parts(names: Iterable[str]) -> bool:
    """Whether names have the prefixes of a diffusion checkpoint's parts: the denoiser, or VAE and text encoder."""
    found = {part_of(name)[0] for name in names if name.startswith(_STARTS)}
    return "denoiser" in found or "control net" in found or {"VAE", "text encoder"} <= found


_STARTS = (_DENOISER, "first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.", "control_")


def part_of(name: str) -> tuple[str, str]:
    """The kind of the part that a tensor of a checkpoint with several parts belongs to, and its prefix, or empty."""
    for pattern, label in _PREFIXES:
        match = pattern.match(name)
        if match is not None:
            return label, match[0] if match[0].endswith(".") else ""
    return "other", ""


def _beginnings(names: Iterable[str]) -> set[str]:
    """The first one and two components of names, each with the dot that follows."""
    found: set[str] = set()
    for name in names:
        first = name.find(".") + 1
        second = name.find(".", first) + 1 if first else 0
        found.update((name[:first], name[:second]))
    return found - {""}


def _family(inner: Collection[str], members: Mapping[tuple[str, str], object]) -> str:
    """The name of the architecture, by the names inside the denoiser and the text encoders."""
    beginnings = _beginnings(inner)
    for family, needed in _FAMILIES:
        if beginnings.issuperset(needed):
            return family
    prefixes = {prefix for _, prefix in members}
    if "conditioner.embedders.1." in prefixes:
        return "SDXL"
    if "conditioner.embedders.0." in prefixes:
        return "SDXL refiner"
    return "Stable Diffusion" if "cond_stage_model." in prefixes else ""


def _named(label: str, prefix: str, *, several: bool) -> str:
    """The name of a part: its kind, with the last component of the prefix if several parts are of that kind."""
    return f"{label} {prefix.rstrip('.').rpartition('.')[2]}" if several and prefix else label
