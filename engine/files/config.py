"""The config.json of the output: the donor's, with what speaks of layers, dtype and tied heads made true again.

Layers that come from a slice keep the attention type, window or width that they had in the donor. Where config.json
lists those a layer at a time, the lists follow the slices. Where it gives a rule over the layer's number ("every fourth
layer has full attention"), the rule must still give each layer what it had, else a warning says so.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.layers import COUNT_KEYS, LENGTH_KEYS

# Lists with one entry a layer, which may go on with entries for prediction heads beyond the last layer.
_PER_LAYER = frozenset(
    """layer_types layers_block_type mlp_layer_types attention_layers attn_layers block_configs no_rope_layers
    num_key_value_heads num_attention_heads num_key_value_heads_per_layer num_attention_heads_per_layer num_kv_heads
    num_query_heads ffn_multipliers intermediate_size moe_intermediate_size moe_topk num_experts num_shared_expert
    indexer_types layer_rope_theta swiglu_limits swiglu_limits_shared activation_sparsity_pattern attn_type_list
    hybrid_layer_pattern moe_layer_freq sliding_window sliding_window_size compress_ratios hybrid_override_pattern
    index_topk_pattern attention_window""".split()  # noqa: SIM905
)
# Lists whose entries are numbers of layers, from 0; and those that count from 1.
_NUMBERS = frozenset(
    """attn_layer_indices attention_layer_indices cross_attention_layers mlp_only_layers moe_layers moe_layers_enum
    full_attn_idxs full_attention_layers global_attention_layers global_attn_layers hybrid_layer_ids local_layer_ids
    rope_scaling_layers slstm_at dense_layers""".split()  # noqa: SIM905
)
_NUMBERS_FROM_1 = frozenset({"full_attn_layers", "kda_layers", "ple_layer_ids"})
# Lists that are not about layers, whatever their length.
_NOT_PER_LAYER = re.compile(
    r"token|architectures|words|_ids?$|id2|label|langu?ages|image_|patch_|video_|conv_|tdnn_|mrope|scaling|multipliers"
    r"|out_features|out_indices|stage|depths|hidden_sizes|num_heads|grid|limit$|strides?$|ratios?$|dims?$|vision_|pruned"
)
# A rule over the layer's number: what it was for a layer it still is if the layer moved by a multiple of the number.
# Each with the list that, where it is there, says it instead.
_PERIODS: dict[str, str | None] = {
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": None,
    "full_attention_interval": "layer_types",
    "sliding_window_pattern": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "layer_group_size": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "moe_layer_freq": "mlp_layer_types",
    "moe_layer_interval": "mlp_layer_types",
    "decoder_sparse_step": "mlp_layer_types",
    "index_topk_freq": "indexer_types",
}
# How many of the first layers are different, with the list that says it instead.
_LEADING = {
    "first_k_dense_replace": "mlp_layer_types",
    "num_dense_layers": "mlp_layer_types",
    "moe_layer_start_index": "mlp_layer_types",
    "num_hash_layers": "mlp_layer_types",
    "max_window_layers": "layer_types",
}
# Families whose layers differ by their number even where config.json doesn't say so: the list that can say it, the key
# of the period, the period without that key, what every layer of that period is, and what the others are.
_SLIDING = ("layer_types", "sliding_window_pattern", "full_attention", "sliding_attention")
_NO_ROPE = ("no_rope_layers", "no_rope_layer_interval", 0, 1)
_FAMILIES: dict[str, tuple[int, tuple[str, str, Any, Any]]] = {
    "gemma2": (2, _SLIDING),
    "gemma3_text": (6, _SLIDING),
    "gemma3n_text": (5, _SLIDING),
    "vaultgemma": (2, _SLIDING),
    "cohere2": (4, _SLIDING),
    "olmo3": (4, _SLIDING),
    "gpt_oss": (2, _SLIDING),
    "qwen3_next": (4, ("layer_types", "full_attention_interval", "full_attention", "linear_attention")),
    "llama4_text": (4, _NO_ROPE),
    "smollm3": (4, _NO_ROPE),
}
_SIDES = re.compile(r"encoder|decoder")


@dataclass(frozen=True, slots=True)
class MergedConfig:
    """The output's config.json, and what a user should know about it."""

    config: dict[str, Any]
    warnings: tuple[str, ...]


def merged_config(
    donor: Mapping[str, Any],
    *,
    layers: int,
    source_layers: Sequence[int],
    tied: bool | None = None,
    dtype: str | None = None,
    main: Sequence[str] = (),
    key: str | None = None,
    donor_layers: int | None = None,
) -> MergedConfig:
    """The donor's config.json for a model with other layers.

    Keys keep their order, and values that need no change keep theirs. An encoder-decoder model takes one call a stack,
    the second on the first one's result.

    Args:
        donor: its config.json. It is not changed.
        layers: how many layers the output has.
        source_layers: for each of them the donor's layer that it was; of a layer of another model the same number, and
            the donor's last layer where it has none of that number.
        tied: whether the head is tied to the embedding, that is, not written; None where a model has neither.
        dtype: torch's name of the output's dtype, such as ``bfloat16``; None leaves it.
        main: the keys that lead to the config that holds the number of layers: `Stack.config_path`.
        key: the key of that number: `Stack.config_key`.
        donor_layers: the donor's number of layers: `Stack.count`. Needed where config.json doesn't say it.

    Raises:
        ValueError: `source_layers` has not `layers` entries.
    """
    if len(source_layers) != layers:
        raise ValueError(f"{layers} layers from {len(source_layers)} source layers")
    config = copy.deepcopy(dict(donor))
    warnings: list[str] = []
    sections = [config]
    for name in main:
        sections.append(sections[-1][name])
    before = donor_layers or stated_layers(sections[-1], key)
    if list(source_layers) != list(range(before or 0)):
        before = before or max(source_layers) + 1
        work = _Layers(before, [min(layer, before - 1) for layer in source_layers], warnings)
        if work.source != list(source_layers):
            warnings.append(f"layers beyond the donor's {before} are described in config.json as its last one")
        # Qwen2-VL's config.json states its language model's layers at the top and in text_config.
        for section in sections[:-1]:
            if stated_layers(section, None) == before and any(name in section for name in COUNT_KEYS):
                work.follow(section, None)
        work.follow(sections[-1], key)
        if "quantization_config" in config:
            warnings.append("quantization_config is kept as it is: it may name layers that have moved")
    if tied is not None:
        _set_tied(sections, tied)
    if dtype is not None:
        _set_dtype(config, dtype)
    return MergedConfig(config, tuple(dict.fromkeys(warnings)))


def stated_layers(section: Mapping[str, Any], key: str | None) -> int | None:
    """The number of layers in a config: under `key`, else under the first known key, else a list's length."""
    for name in (key,) if key else COUNT_KEYS:
        if isinstance(section.get(name), int):
            return int(section[name])
    return next((len(section[name]) for name in LENGTH_KEYS if isinstance(section.get(name), (list, str))), None)


@dataclass(frozen=True, slots=True)
class _Layers:
    """A change of layers: their number in the donor, and the donor's layer of each new one."""

    before: int
    source: list[int]
    warnings: list[str]

    def follow(self, section: dict[str, Any], key: str | None) -> None:
        """Make everything in a config that speaks of layers speak of the new ones."""
        is_shared = bool(section.get("is_encoder_decoder")) or (key is not None and bool(_SIDES.search(key)))
        self._set_count(section, key, is_shared)
        if is_shared:  # lists could speak of either stack; the only known one is Longformer's, about the encoder
            if key is None or "decoder" not in key:
                section |= {k: self._mapped(k, v) for k, v in section.items() if k == "attention_window"}
            return
        old = dict(section)
        for name, value in old.items():
            if name == "linear_attn_config" and isinstance(value, dict):
                section[name] = {k: self._mapped(k, v) for k, v in value.items()}
            elif name == "per_layer_config" and isinstance(value, dict):
                section[name] = self._by_number(value)
            else:
                section[name] = self._mapped(name, value)
        for name in _LEADING:
            self._set_leading(section, name)
        self._set_ends(section)
        if section.get("hidden_size_per_layer_input"):
            self.warnings.append(
                "hidden_size_per_layer_input: every layer's own embeddings are in one matrix, which mergeloom does not "
                "slice; it won't fit other layers"
            )
        self._explain(section, old)

    def _set_count(self, section: dict[str, Any], key: str | None, is_shared: bool) -> None:
        names = [name for name in COUNT_KEYS if section.get(name) == self.before]
        if is_shared:
            alias = "num_hidden_layers" if key in ("encoder_layers", "num_layers", "num_encoder_layers") else None
            names = [name for name in names if name in (key, alias)]
        else:
            names = [name for name in names if not _SIDES.search(name) or name == key]
        for name in names:
            section[name] = len(self.source)
        has_list = any(isinstance(section.get(name), (list, str)) for name in LENGTH_KEYS)
        if not names and not has_list:
            section["num_hidden_layers"] = len(self.source)
            self.warnings.append(
                f"config.json stated no number of layers; num_hidden_layers = {len(self.source)} added"
            )

    def _mapped(self, name: str, value: Any) -> Any:
        """The value of one key, following the layers where it is a list of them."""
        if name in _NUMBERS:
            return self._numbers(value, 0)
        if name in _NUMBERS_FROM_1:
            return self._numbers(value, 1)
        if name == "kv_source_layers" and isinstance(value, list) and len(value) >= self.before:
            return self._shared_sources(value)
        if name == "attention_types":
            types = _spelt_out(value)
            return [[self._each(types), 1]] if len(types) == self.before else value
        if name in _PER_LAYER:
            if isinstance(value, str) and len(value) >= self.before:
                return "".join(self._each(list(value)))
            return self._each(value) if isinstance(value, list) and len(value) >= self.before else value
        is_list = isinstance(value, list) and len(value) == self.before > 1
        if not is_list or _NOT_PER_LAYER.search(name):
            return value
        self.warnings.append(f"{name} has as many entries as there were layers, and was taken to be one a layer")
        return self._each(value)

    def _each(self, entries: list[Any]) -> list[Any]:
        """One entry a layer; what the list has beyond the last layer stays at its end."""
        return [copy.deepcopy(entries[i]) for i in self.source] + entries[self.before :]

    def _numbers(self, value: Any, first: int) -> Any:
        """Numbers of layers, as a list or as step3's "4,5,6"."""
        if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)*", value):
            return ",".join(str(i) for i in self._numbers([int(i) for i in value.split(",")], first))
        if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
            return value
        beyond = [i - self.before + len(self.source) for i in value if i - first >= self.before]
        return [new + first for new, old in enumerate(self.source) if old + first in value] + beyond

    def _by_number(self, value: dict[str, Any]) -> dict[str, Any]:
        """A dict with a layer's number for each key; one keyed by a layer's type stays."""
        if not all(name.isdecimal() for name in value):
            return value
        by_number = {int(name): entry for name, entry in value.items()}
        width = min(map(len, value), default=1)  # transformers writes 02, 10
        return {str(new).zfill(width): by_number[old] for new, old in enumerate(self.source) if old in by_number}

    def _shared_sources(self, value: list[int]) -> list[int]:
        """For each layer the layer whose keys and values it uses: the nearest copy of it that comes before."""
        result: list[int] = []
        for new, old in enumerate(self.source):
            wanted = value[old]
            copies = [i for i in range(new + 1) if self.source[i] == wanted]
            if not copies:
                self.warnings.append(
                    f"kv_source_layers: layer {new} uses the keys of layer {wanted}, which is left out"
                )
            result.append(copies[-1] if copies else new)
        return result

    def _set_leading(self, section: dict[str, Any], name: str) -> None:
        """A count of first layers that are different from the others."""
        count = section.get(name)
        if not isinstance(count, int) or isinstance(count, bool):
            return
        if count >= self.before:
            section[name] = len(self.source) if count == self.before else max(count, len(self.source))
            return
        inside = [old < count for old in self.source]
        section[name] = inside.index(False) if False in inside else len(inside)
        is_used = name != "max_window_layers" or section.get("use_sliding_window") is True
        if any(inside[section[name] :]) and is_used and _LEADING[name] not in section:
            self._warn_of_rule(name, count)

    def _set_ends(self, section: dict[str, Any]) -> None:
        """A count of last layers that are different, and Ernie's number of the last layer with experts."""
        count = section.get("num_kv_shared_layers")
        if isinstance(count, int) and count > 0:
            inside = [old >= self.before - count for old in reversed(self.source)]
            section["num_kv_shared_layers"] = inside.index(False) if False in inside else len(inside)
            if any(inside[section["num_kv_shared_layers"] :]):
                self._warn_of_rule("num_kv_shared_layers", count)
        last = section.get("moe_layer_end_index")
        if isinstance(last, int) and last >= 0:
            inside = [old <= last for old in self.source]
            section["moe_layer_end_index"] = max((i for i, is_in in enumerate(inside) if is_in), default=-1)

    def _explain(self, section: dict[str, Any], old: Mapping[str, Any]) -> None:
        """Check the rules over a layer's number; where one fails that a list can replace, write the list."""
        family = str(section.get("model_type"))
        rules = {name: section[name] for name in _PERIODS if isinstance(section.get(name), int)}
        if family in _FAMILIES:
            default, (list_name, period_name, special, other) = _FAMILIES[family]
            period = rules.pop(period_name, 0) or default
            if not section.get(list_name) and not self._keeps(period):
                kinds = [special if (i + 1) % period == 0 else other for i in range(self.before)]
                section[list_name] = self._each(kinds)
                self.warnings.append(
                    f"{list_name} was added: {family} tells every layer's attention from its number, and these layers "
                    "have moved; transformers before 4.53 may not read it"
                )
        for name, period in rules.items():
            if period > 1 and _PERIODS[name] not in section and not self._keeps(period):
                self._warn_of_rule(name, period)
        repeated = old.get("block_types")  # RecurrentGemma's
        if isinstance(repeated, list) and repeated and not self._keeps(len(repeated)):
            self._warn_of_rule("block_types", repeated)

    def _keeps(self, period: int) -> bool:
        return all((new - old) % period == 0 for new, old in enumerate(self.source))

    def _warn_of_rule(self, name: str, value: object) -> None:
        self.warnings.append(
            f"{name} = {value} no longer says of every layer what it said in the donor: a slice moved layers by a "
            "number that does not fit; the model will load, but some layers may be taken for others"
        )


def _spelt_out(types: Any) -> list[Any]:
    """GPT-Neo's ``[[["global", "local"], 12]]`` as 24 entries; [] where it is something else."""
    entries: list[Any] = []
    for item in types if isinstance(types, list) else []:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], int)):
            return []
        entries += item[0] * min(item[1], 10_000)
    return entries


def _set_tied(sections: Sequence[dict[str, Any]], tied: bool) -> None:
    """`tie_word_embeddings`, at the top and where the layers are: which one counts differs between transformers."""
    said = [section["tie_word_embeddings"] for section in sections if "tie_word_embeddings" in section]
    if not said or any(value is not tied for value in said):
        for section in sections:
            section["tie_word_embeddings"] = tied


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """`torch_dtype` or `dtype`, whichever is there, nested ones too. Where there is none, no key means float32."""
    if "torch_dtype" not in config and "dtype" not in config and dtype != "float32":
        config["torch_dtype"] = dtype
    for name in ("torch_dtype", "dtype"):
        if name in config:
            config[name] = dict.fromkeys(config[name], dtype) if isinstance(config[name], dict) else dtype

    def descend(section: dict[str, Any]) -> None:
        for name, value in section.items():
            if not isinstance(value, dict) or not (name.endswith("_config") or _SIDES.search(name)):
                continue
            if name in ("quantization_config", "compression_config"):
                continue
            value.update({k: dtype for k in ("torch_dtype", "dtype") if isinstance(value.get(k), str)})
            descend(value)

    descend(config)
