"""The layouts of experts by architecture: the names, order and orientation of fused and of separate projections.

The source of each layout is transformers 5: the orientation and the order of gate and up are those of the class of the
experts in ``models/TYPE/modeling_TYPE.py``, and the names of separate experts and of routers are those of
``conversion_mapping.py``. transformers has no separate names for gpt-oss and Llama 4: those are LLM Compressor's, which
are the names of their modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of config.json for the number of experts; an architecture uses one of them."""


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How the experts of an architecture are stored, fused and separately.

    A fused checkpoint has ``{fused}.gate_up_proj`` and ``{fused}.down_proj`` in each layer, for all experts; a separate
    one has ``{separate}.{number}.{gate}.weight``, with `up` and `down` alike. With E experts of I rows and a hidden
    size of H, separate projections have the shapes [I, H], [I, H] and [H, I].

    Args:
        fused: module of the experts within a layer, in a fused checkpoint.
        separate: module of the experts within a layer, in a separate checkpoint.
        gate: name of an expert's gate projection.
        up: name of an expert's up projection.
        down: name of an expert's down projection.
        transposed: whether fused projections are [E, H, 2I] and [E, I, H]; otherwise they are [E, 2I, H] and [E, H, I].
        interleaved: whether gate and up take turns in the dimension of size 2I, which is the last one; otherwise all of
            gate comes first.
        bias: whether experts have biases: ``gate_up_proj_bias`` [E, 2I] and ``down_proj_bias`` [E, H] if fused.
        intermediate: key of config.json for I.
        renamed: other names within a layer that differ, as (separate, fused).
    """

    fused: str = "mlp.experts"
    separate: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    intermediate: str = "moe_intermediate_size"
    renamed: tuple[tuple[str, str], ...] = ()


_QWEN = ExpertLayout()
_WIDE = ExpertLayout(intermediate="intermediate_size")
_MIXTRAL = ExpertLayout(
    separate="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
    intermediate="intermediate_size",
    renamed=(("block_sparse_moe.gate.weight", "mlp.gate.weight"),),
)

LAYOUTS: Mapping[str, ExpertLayout] = {
    **dict.fromkeys(
        (
            "afmoe",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe_text",
            "glm_moe_dsa",
            "qwen2_moe",
            "qwen3_5_moe_text",
            "qwen3_moe",
            "qwen3_next",
            "solar_open",
        ),
        _QWEN,
    ),
    **dict.fromkeys(("cohere2_moe", "flex_olmo", "hunyuan_v1_moe", "olmoe"), _WIDE),
    "ernie4_5_moe": replace(
        _QWEN,
        renamed=(("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),),
    ),
    "exaone_moe": replace(_QWEN, renamed=(("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),)),
    "gpt_oss": replace(_WIDE, transposed=True, interleaved=True, bias=True),
    "jamba": replace(_WIDE, fused="feed_forward.experts", separate="feed_forward.experts"),
    "lfm2_moe": replace(
        _QWEN, fused="feed_forward.experts", separate="feed_forward.experts", gate="w1", up="w3", down="w2"
    ),
    "llama4_text": replace(_WIDE, fused="feed_forward.experts", separate="feed_forward.experts", transposed=True),
    "minimax": _MIXTRAL,
    "minimax_m2": replace(
        _MIXTRAL,
        renamed=(
            *_MIXTRAL.renamed,
            ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
        ),
    ),
    "mixtral": _MIXTRAL,
    "phimoe": replace(_MIXTRAL, renamed=(("block_sparse_moe.gate.weight", "mlp.router.weight"),)),
}
"""The layouts by the ``model_type`` in config.json, or in its ``text_config``."""


def text_config_of(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the part of config.json that describes the language model; empty without a config.json."""
    found = config or {}
    nested = found.get("text_config")
    return nested if isinstance(nested, dict) and "model_type" in nested else found
