"""Updates the donor's config.json for the merged layers, dtype and tied head.

Each layer of the output keeps the attention type, window and width that it has in the donor. Lists in config.json with
one entry per layer are rearranged like the layers. A rule over layer indices ("every fourth layer has full attention")
must still hold for each layer in its new position; otherwise a warning is issued.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...model.layer_keys import (
    FAMILIES,
    LAYER_INDICES,
    LAYER_INDICES_FROM_1,
    LEADING,
    NOT_PER_LAYER,
    PER_LAYER,
    PERIODS,
    SIDES,
)
from ...model.layers import COUNT_KEYS, LENGTH_KEYS
from ...model.warnings import ModelWarning, ModelWarningKind
from .layer_depth import adapt_to_depth
from .unknown_rules import unknown_rules


@dataclass(frozen=True, slots=True)
class MergedConfig:
    """The output's config.json and warnings about it."""

    config: dict[str, Any]
    warnings: tuple[ModelWarning, ...]


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
    others: Mapping[int, tuple[Mapping[str, Any], int]] | None = None,
) -> MergedConfig:
    """Update the donor's config.json for a model with different layers.

    Keys keep their order, and unaffected values are not modified. For an encoder-decoder model, call the function once
    per stack, the second time with the result of the first.

    Args:
        donor: config.json of the donor, which is not modified.
        layers: number of layers in the output.
        source_layers: index in the donor of each output layer. A layer of another model keeps its index there, but at
            most the donor's last index.
        tied: whether the head is tied to the embedding and not written; None for a model with neither.
        dtype: torch name of the output dtype, such as ``bfloat16``; None to keep the donor's.
        main: path of the section that states the number of layers: `Stack.config_path`.
        key: key of that number: `Stack.config_key`.
        donor_layers: number of layers in the donor: `Stack.count`. Required if config.json does not state it.
        others: for each output layer that another model provides, that model's config section and the layer there.
            Lists with an entry per layer take the entry from there.

    Raises:
        ValueError: `source_layers` does not have `layers` entries.
    """
    if len(source_layers) != layers:
        raise ValueError(f"got {len(source_layers)} source layers for {layers} layers")
    config = copy.deepcopy(dict(donor))
    warnings: list[ModelWarning] = []
    sections = [config]
    for name in main:
        sections.append(sections[-1][name])
    before = donor_layers or stated_layers(sections[-1], key)
    if list(source_layers) != list(range(before or 0)) or others:
        before = before or max(source_layers) + 1
        _rearrange(sections, key, before, source_layers, others or {}, warnings)
    if tied is not None:
        _set_tied(sections, tied)
    if dtype is not None:
        set_dtype(config, dtype)
    return MergedConfig(config, tuple(dict.fromkeys(warnings)))


def _rearrange(
    sections: Sequence[dict[str, Any]],
    key: str | None,
    before: int,
    source_layers: Sequence[int],
    others: Mapping[int, tuple[Mapping[str, Any], int]],
    warnings: list[ModelWarning],
) -> None:
    """Update what a config says about layers. `sections` lead to the main one; `before` is the donor's layer count."""
    rearranged = _Layers(before, [min(layer, before - 1) for layer in source_layers], warnings, others)
    if any(layer >= before for new, layer in enumerate(source_layers) if new not in others):
        rearranged.warn(
            ModelWarningKind.LAYER_RULE,
            f"config.json describes layers beyond the donor's {before} like its last layer",
        )
    # Qwen2-VL states the layers of its language model both at the top level and in text_config.
    for section in sections[:-1]:
        if stated_layers(section, None) == before and any(name in section for name in COUNT_KEYS):
            rearranged.update(section, None)
    rearranged.update(sections[-1], key)


def stated_layers(section: Mapping[str, Any], key: str | None) -> int | None:
    """The number of layers in a section: the value of `key`, else of the first known key, else a list's length."""
    for name in (key,) if key else COUNT_KEYS:
        if isinstance(section.get(name), int):
            return int(section[name])
    return next((len(section[name]) for name in LENGTH_KEYS if isinstance(section.get(name), (list, str))), None)


@dataclass(frozen=True, slots=True)
class _Layers:
    """A rearrangement of layers.

    Args:
        before: number of layers in the donor.
        source: index in the donor of each output layer.
        warnings: list to which warnings are appended.
        others: config section and layer in it of each output layer that is another model's.
    """

    before: int
    source: list[int]
    warnings: list[ModelWarning]
    others: Mapping[int, tuple[Mapping[str, Any], int]]

    def warn(self, kind: ModelWarningKind, problem: str, *names: str, advice: str = "") -> None:
        """Add a warning about the keys `names`."""
        self.warnings.append(ModelWarning(kind, problem, advice, names))

    def update(self, section: dict[str, Any], key: str | None) -> None:
        """Update all keys of a config section that describe layers."""
        is_shared = bool(section.get("is_encoder_decoder")) or (key is not None and bool(SIDES.search(key)))
        self._set_count(section, key, is_shared)
        if is_shared:  # lists can describe either stack; the only known one is Longformer's, for the encoder
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
        for name in LEADING:
            self._set_leading(section, name)
        self._set_ends(section)
        if section.get("hidden_size_per_layer_input"):
            self.warn(
                ModelWarningKind.LAYER_RULE,
                "hidden_size_per_layer_input: the per-layer embeddings are stored in one matrix, which mergeloom does "
                "not slice; it does not match the merged layers",
                "hidden_size_per_layer_input",
            )
        self._check_rules(section, old)
        self.warnings.extend(adapt_to_depth(section, old, self.before, self.source))

    def _set_count(self, section: dict[str, Any], key: str | None, is_shared: bool) -> None:
        names = [name for name in COUNT_KEYS if section.get(name) == self.before]
        if is_shared:
            alias = "num_hidden_layers" if key in ("encoder_layers", "num_layers", "num_encoder_layers") else None
            names = [name for name in names if name in (key, alias)]
        else:
            names = [name for name in names if not SIDES.search(name) or name == key]
        for name in names:
            section[name] = len(self.source)
        has_list = any(isinstance(section.get(name), (list, str)) for name in LENGTH_KEYS)
        if not names and not has_list:
            section["num_hidden_layers"] = len(self.source)
            self.warn(
                ModelWarningKind.CONFIG_CHANGED,
                f"config.json did not state the number of layers; added num_hidden_layers = {len(self.source)}",
                "num_hidden_layers",
            )

    def _mapped(self, name: str, value: Any) -> Any:
        """The value of a key, rearranged if it is a list of layers."""
        if name in LAYER_INDICES:
            return self._indices(name, value, 0)
        if name in LAYER_INDICES_FROM_1:
            return self._indices(name, value, 1)
        if name == "kv_source_layers" and isinstance(value, list) and len(value) >= self.before:
            return self._shared_sources(value)
        if name == "attention_types":
            types = _expanded(value)
            return [[self._rearranged(name, types), 1]] if len(types) == self.before else value
        if name in PER_LAYER:
            if isinstance(value, str) and len(value) >= self.before:
                return "".join(self._rearranged(name, list(value)))
            return self._rearranged(name, value) if isinstance(value, list) and len(value) >= self.before else value
        is_list = isinstance(value, list) and len(value) == self.before > 1
        if not is_list or NOT_PER_LAYER.search(name):
            return value
        self.warn(
            ModelWarningKind.LAYER_RULE,
            f"{name} has as many entries as the donor has layers, and was treated as one entry per layer",
            name,
        )
        return self._rearranged(name, value)

    def _rearranged(self, name: str, entries: list[Any]) -> list[Any]:
        """Rearrange a list with one entry per layer; entries beyond the last layer stay at the end."""
        result = []
        for new, old in enumerate(self.source):
            others, layer = self._other(name, new)
            entry = others[layer] if isinstance(others, (list, str)) and layer < len(others) else entries[old]
            result.append(copy.deepcopy(entry))
        return result + entries[self.before :]

    def _other(self, name: str, new: int) -> tuple[Any, int]:
        """The value of a key in the model that provides an output layer, and the layer there; None for the donor."""
        section, layer = self.others.get(new, ({}, 0))
        nested = section.get("linear_attn_config")
        value = section.get(name, nested.get(name) if isinstance(nested, Mapping) else None)
        return (_expanded(value) if name == "attention_types" else value), layer

    def _indices(self, name: str, value: Any, first: int) -> Any:
        """Translate layer indices, given as a list or as Step3's "4,5,6"."""
        if isinstance(value, str) and re.fullmatch(r"\d+(,\d+)*", value):
            return ",".join(str(i) for i in self._indices(name, [int(i) for i in value.split(",")], first))
        if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
            return value
        beyond = [i - self.before + len(self.source) for i in value if i - first >= self.before]
        inside = []
        for new, old in enumerate(self.source):
            others, layer = self._other(name, new)
            if isinstance(others, str):
                others = [int(i) for i in others.split(",") if i.isdecimal()]
            is_in = layer + first in others if isinstance(others, list) else old + first in value
            inside += [new + first] * is_in
        return inside + beyond

    def _by_number(self, value: dict[str, Any]) -> dict[str, Any]:
        """Translate a dict with layer indices as keys; one with layer types as keys is not changed."""
        if not all(name.isdecimal() for name in value):
            return value
        by_number = {int(name): entry for name, entry in value.items()}
        width = min(map(len, value), default=1)  # transformers writes 02, 10
        return {str(new).zfill(width): by_number[old] for new, old in enumerate(self.source) if old in by_number}

    def _shared_sources(self, value: list[int]) -> list[int]:
        """Translate the layer whose keys and values each layer uses to its nearest preceding copy."""
        result: list[int] = []
        for new, old in enumerate(self.source):
            wanted = value[old]
            copies = [i for i in range(new + 1) if self.source[i] == wanted]
            if not copies:
                self.warn(
                    ModelWarningKind.LAYER_RULE,
                    f"kv_source_layers: layer {new} uses the keys of layer {wanted}, which is not part of the output",
                    "kv_source_layers",
                )
            result.append(copies[-1] if copies else new)
        return result

    def _set_leading(self, section: dict[str, Any], name: str) -> None:
        """Update a count of leading layers that differ from the others."""
        count = section.get(name)
        if not isinstance(count, int) or isinstance(count, bool):
            return
        if count >= self.before:
            section[name] = len(self.source) if count == self.before else max(count, len(self.source))
            return
        inside = [old < count for old in self.source]
        section[name] = inside.index(False) if False in inside else len(inside)
        is_used = name != "max_window_layers" or section.get("use_sliding_window") is True
        if any(inside[section[name] :]) and is_used and LEADING[name].replaced_by not in section:
            self._warn_about_rule(name, count)

    def _set_ends(self, section: dict[str, Any]) -> None:
        """Update a count of trailing layers that differ, and Ernie's index of the last layer with experts."""
        count = section.get("num_kv_shared_layers")
        if isinstance(count, int) and count > 0:
            inside = [old >= self.before - count for old in reversed(self.source)]
            section["num_kv_shared_layers"] = inside.index(False) if False in inside else len(inside)
            if any(inside[section["num_kv_shared_layers"] :]):
                self._warn_about_rule("num_kv_shared_layers", count)
        last = section.get("moe_layer_end_index")
        if isinstance(last, int) and last >= 0:
            inside = [old <= last for old in self.source]
            section["moe_layer_end_index"] = max((i for i, is_in in enumerate(inside) if is_in), default=-1)

    def _check_rules(self, section: dict[str, Any], old: Mapping[str, Any]) -> None:
        """Check the rules over layer indices. Where one fails and a list can replace it, add the list."""
        model_type = str(section.get("model_type"))
        family = FAMILIES.get(model_type)
        rules = {name: section[name] for name in PERIODS if isinstance(section.get(name), int)}
        if family is not None:
            period = rules.pop(family.period_key, 0) or family.period
            if not section.get(family.list_key) and not self._keeps(period):
                kinds = [family.last if (i + 1) % period == 0 else family.others for i in range(self.before)]
                section[family.list_key] = self._rearranged(family.list_key, kinds)
                self.warn(
                    ModelWarningKind.CONFIG_CHANGED,
                    f"added {family.list_key}: {model_type} derives the attention of a layer from its index, and these "
                    "layers have moved; transformers before 4.53 may ignore it",
                    family.list_key,
                )
        for name, period in rules.items():
            if period > 1 and PERIODS[name].replaced_by not in section and not self._keeps(period):
                self._warn_about_rule(name, period)
        repeated = old.get("block_types")  # RecurrentGemma's
        if isinstance(repeated, list) and repeated and not self._keeps(len(repeated)):
            self._warn_about_rule("block_types", repeated)
        for name, value in unknown_rules(old, self.before, self.source):
            self.warn(
                ModelWarningKind.LAYER_RULE,
                f"{name} = {value} looks like a rule for layers, and layers have moved: mergeloom does not know this "
                "key and keeps its value",
                name,
                advice="check that it still describes every layer of the output, and edit config.json if it does not",
            )

    def _keeps(self, period: int) -> bool:
        return all((new - old) % period == 0 for new, old in enumerate(self.source))

    def _warn_about_rule(self, name: str, value: object) -> None:
        self.warn(
            ModelWarningKind.LAYER_RULE,
            f"{name} = {value} no longer describes every layer as in the donor: a slice moves layers by a number that "
            "does not fit; some layers may be run as the wrong kind, or lack tensors when the model is loaded",
            name,
        )


def _expanded(types: Any) -> list[Any]:
    """Expand GPT-Neo's ``[[["global", "local"], 12]]`` to 24 entries; [] for any other value."""
    entries: list[Any] = []
    for item in types if isinstance(types, list) else []:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], int)):
            return []
        entries += item[0] * min(item[1], 10_000)
    return entries


def _set_tied(sections: Sequence[dict[str, Any]], tied: bool) -> None:
    """Set `tie_word_embeddings` at the top level and next to the layers; transformers versions read either one."""
    values = [section["tie_word_embeddings"] for section in sections if "tie_word_embeddings" in section]
    if not values or any(value is not tied for value in values):
        for section in sections:
            section["tie_word_embeddings"] = tied


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set `torch_dtype` or `dtype`, whichever is present, also in nested sections. A missing key means float32."""
    if "torch_dtype" not in config and "dtype" not in config and dtype != "float32":
        config["torch_dtype"] = dtype
    for name in ("torch_dtype", "dtype"):
        if name in config:
            config[name] = dict.fromkeys(config[name], dtype) if isinstance(config[name], dict) else dtype

    def descend(section: dict[str, Any]) -> None:
        for name, value in section.items():
            if not isinstance(value, dict) or not (name.endswith("_config") or SIDES.search(name)):
                continue
            if name in ("quantization_config", "compression_config"):
                continue
            value.update({k: dtype for k in ("torch_dtype", "dtype") if isinstance(value.get(k), str)})
            descend(value)

    descend(config)
