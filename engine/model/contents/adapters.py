"""Recognizes adapters and embeddings by their tensor names: LoRA in all spellings, LyCORIS, PEFT's, IP-Adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ....io.tensors.refs import TensorRef
from ....io.tensors.table import components
from ..roles import is_embedding, is_head

_KINDS = (
    ("LoKr (LyCORIS)", ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    ("LoHa (LyCORIS)", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    ("BOFT", ("boft_R", "boft_s")),
    ("OFT", ("oft_r", "oft_R", "oft_diag", "oft_blocks")),
    ("IA3", ("ia3_l", "on_input")),
    ("VeRA", ("vera_lambda_b", "vera_lambda_d")),
    ("DoRA", ("lora_magnitude_vector", "dora_scale")),
    ("LoCon (LyCORIS)", ("lora_mid",)),
    (
        "LoRA",
        (
            *("lora_A", "lora_B", "lora_a", "lora_b", "lora_embedding_A", "lora_embedding_B", "lora_up", "lora_down"),
            *("lora_linear_layer", "to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora"),
        ),
    ),
    ("prompt tuning", ("prompt_embeddings",)),
    ("trainable tokens", ("trainable_tokens_delta",)),
)
"""Kinds of adapters with the components of tensor names that only they have; the first match counts."""

ADAPTER_PARTS = frozenset(part for _, parts in _KINDS for part in parts)
"""Components of tensor names that only adapters have: PEFT's, kohya's, LyCORIS's and diffusers'."""
_WITH_OTHERS = frozenset(("alpha", "scalar", "w_norm", "b_norm", "diff", "diff_b", "bias_indices", "bias_values"))
"""Components that the other tensors of an adapter have."""
_WITH_WEIGHTS = frozenset(("base_layer", "parametrizations"))
"""Components of the names of models that contain the weights that their adapters change."""
_PEFT = "base_model.model."
"""Beginning of all names of PEFT's adapters, also of tensors that they save in full."""
_IP_ADAPTER = ("image_proj.", "ip_adapter.")
_RANKS = re.compile(
    r"\.(?:lora_down|lora_A|lora_a|lora_embedding_A|hada_w1_b|lokr_w2_b|lokr_w1_b|lora\.down|\w+_lora\.down"
    r"|lora_linear_layer\.down)(?:\.\w+)?(?:\.weight)?$"
)
"""Endings of the names of the matrices whose first dimension is the rank."""
_KOHYA = re.compile(r"(?:lora|oft|boft|hada|lokr|ia3|lycoris)_(?:unet|te\d?|transformer|prior)_|lycoris_\w+\.|lllite_")
"""Beginnings of the names of kohya's and LyCORIS's tensors: the module's name with underscores instead of dots."""
_DIFFUSION = re.compile(
    rf"{_KOHYA.pattern}"
    r"|(?:unet|text_encoder(?:_\d)?|diffusion_model|vae)\."
    r"|(?:base_model\.model\.)?(?:transformer\.)?(?:single_)?transformer_blocks\.|down_blocks\.|mid_block\.|up_blocks\."
)
"""Beginnings of the names of adapters for diffusion models."""
_TARGETS = (
    (re.compile(r"\w+?_te2_|text_encoder_2\."), "text encoder 2"),
    (re.compile(r"\w+?_te1?_|text_encoder\."), "text encoder"),
    (re.compile(r"\w+?_unet_(?:double|single|joint)_blocks_|\w+?_transformer_|transformer\."), "transformer"),
    (re.compile(r"\w+?_unet_|unet\.|down_blocks\.|mid_block\.|up_blocks\."), "UNet"),
    (re.compile(r"lycoris_|lllite_|diffusion_model\.|(?:single_)?transformer_blocks\."), "diffusion model"),
)
"""Beginnings of names that show which part of a diffusion model is changed; the first match counts."""


_EMBEDDING_NAMES = frozenset(["emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param.*", "string_to_token.*"])
"""Names of all tensors of a textual inversion, except for diffusers', which uses the token in angle brackets."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A change of a model, stored without the model.

    Args:
        kind: such as ``LoRA`` or ``LoHa (LyCORIS)``.
        example: name of a tensor that shows the kind.
        ranks: the ranks that occur; empty for kinds without a rank.
        targets: numbers of changed modules: by part of a diffusion model, or by the module's last component.
        diffusion: whether it changes a diffusion model.
    """

    kind: str
    example: str
    ranks: tuple[int, ...]
    targets: Mapping[str, int]
    diffusion: bool

    @property
    def title(self) -> str:
        """Kind and rank, such as ``LoRA of rank 16``."""
        if not self.ranks:
            return self.kind
        low, high = self.ranks[0], self.ranks[-1]
        return f"{self.kind} of rank {low}" if low == high else f"{self.kind} of ranks {low} to {high}"

    @property
    def target(self) -> str:
        """The changed modules, such as ``UNet (192 modules), text encoder (72 modules)``."""
        shown = sorted(self.targets.items(), key=lambda item: (-item[1], item[0]))[:8]
        return ", ".join(f"{name} ({count} module{'' if count == 1 else 's'})" for name, count in shown)


def find_adapter(tensors: Mapping[str, TensorRef]) -> Adapter | None:
    """The adapter that tensors are; None for a model, even if it includes adapters: Phi-4-multimodal has two.

    Args:
        tensors: the stored tensors of a checkpoint.
    """
    if all(name.startswith(_IP_ADAPTER) for name in tensors):
        return Adapter("IP-Adapter", next(iter(tensors)), (), {}, diffusion=True)
    present = components(tensors)
    if all(_KOHYA.match(name) for name in tensors):
        return _describe(tensors, {name: name.partition(".")[0] for name in tensors}, present, "LyCORIS")
    if ADAPTER_PARTS.isdisjoint(present) and "lora" not in present:
        return None
    if not _WITH_WEIGHTS.isdisjoint(present) and any(map(_holds_weight, tensors)):
        return None
    own: dict[str, str] = {}  # module by tensor
    others = 0
    for name in tensors:
        split = name.split(".")
        place = next((at for at, part in enumerate(split) if _is_adapter_part(split, at, part)), None)
        if place is not None:
            own[name] = ".".join(split[: place + (split[place].endswith("_lora"))])
        elif not _WITH_OTHERS.isdisjoint(split) or name.startswith(_PEFT):
            others += 1
    if not own or 2 * (len(own) + others) <= len(tensors):
        return None
    return _describe(tensors, own, present, "LoRA")


def is_textual_inversion(names: Iterable[str]) -> bool:
    """Whether tensors are the embeddings of a textual inversion."""
    return all(name in _EMBEDDING_NAMES or (name[:1] == "<" and name[-1:] == ">") for name in names)


def _holds_weight(name: str) -> bool:
    """Whether a tensor is a weight that an adapter changes.

    An adapter can have the bias next to it, the embedding that it changes, and factors of several parameters.
    """
    split = name.split(".")
    if _WITH_WEIGHTS.isdisjoint(split) or name.endswith(".base_layer.bias") or not ADAPTER_PARTS.isdisjoint(split):
        return False
    weight = name.replace(".token_adapter", "").replace(".base_layer", "")
    return not (name.startswith(_PEFT) and (is_embedding(weight) or is_head(weight)))


def _is_adapter_part(split: list[str], at: int, part: str) -> bool:
    if part in ADAPTER_PARTS:
        return True
    return part == "lora" and at + 1 < len(split) and split[at + 1] in ("up", "down")


def _describe(tensors: Mapping[str, TensorRef], own: Mapping[str, str], present: Collection[str], kind: str) -> Adapter:
    """Describe an adapter by its tensors, each with its module, and the components of their names.

    `kind` is the kind if no component shows another one.
    """
    kind = next((label for label, parts in _KINDS if not set(parts).isdisjoint(present)), kind)
    example = next((name for name in own if not ADAPTER_PARTS.isdisjoint(name.split("."))), next(iter(own)))
    ranks = {tensors[name].shape[0] for name in own if _RANKS.search(name) and len(tensors[name].shape) >= 2}
    diffusion = any(_DIFFUSION.match(name) for name in own)
    targets = Counter(_target(module, diffusion=diffusion) for module in dict.fromkeys(own.values()))
    return Adapter(kind, example, tuple(sorted(ranks)), dict(targets), diffusion)


def _target(module: str, *, diffusion: bool) -> str:
    """What a changed module is counted as: a part of a diffusion model, or the module's last component."""
    if not diffusion:
        return module.rpartition(".")[2] or "model"
    inner = module.removeprefix("base_model.model.")
    return next((label for pattern, label in _TARGETS if pattern.match(inner)), "diffusion model")
