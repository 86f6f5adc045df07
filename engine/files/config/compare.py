"""Compares the config.json files of the models whose tensors a stage combines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import CheckpointError
from ...graph.graph import MergeGraph
from ...model.layer_keys import LAYER_INDICES, LAYER_INDICES_FROM_1, NOT_PER_LAYER, PER_LAYER
from ...model.layers import COUNT_KEYS
from ...model.warnings import ModelWarning, ModelWarningKind
from .architectures import TRANSPOSED_EXPERTS, TRANSPOSED_WEIGHTS
from .rearrange import stated_layers

_HARMLESS = re.compile(
    r"^_|transformers_version|dtype|architectures|auto_map|token_?ids?$|use_cache|cache_impl|dropout|pdrop|layerdrop"
    r"|(?:^|_)init(?:ial\w*)?(?:_|$)|pretraining_tp|return_dict|id2label|label2id|num_labels|problem_type"
    r"|^output_(?:\w*attentions|hidden_states|\w*logits|scores|past)$|finetuning_task|task_specific|tokenizer|attn_impl"
    r"|flash|gradient_checkpointing|unsloth|aux_loss|router_jitter|quantization|^compression_config$|vocab|torchscript"
    r"|pruned_heads|^(?:min|max|default)_(?:new_)?length$|early_stopping|num_beam|^temperature$|^top_[pk]$|^typical_p$"
    r"|repetition_penalty|length_penalty|diversity_penalty|no_repeat_ngram|do_sample|num_return|bad_words|^forced?_"
    r"|suppress_tokens|remove_invalid|generation|seq_aux|ep_size|model_name|model_max_length|tie_word|use_pretrained"
    r"|^(?:use|disable)_\w*kernels$|^(?:chunkwise|sequence|step)_kernel$|use_bfloat16|keys_to_ignore|chunk_size_feed"
    r"|(?:^|_)train(?:ed|er|ing|able)?(?:_|$)|label_smoothing|spec_augment|^mask_(?:time|feature)_|^ctc_"
)
"""Names of keys that do not change what a loaded model computes, or that mergeloom derives from the tensors."""

_HEADS = re.compile(r"(?:^|_)heads?(?:_dim|_kv)?$|^(?:d_kv|kv_channels|multi_query_group_num)$")
"""Names of numbers that split the same matrix into heads."""

_ACTIVATION = re.compile(r"^(?:hidden_act|hidden_activation|activation|activation_function|afn|feed_forward_proj)$")
_GELU = re.compile(r"^(?:gelu_\w+|gelu|quick_gelu)$")

_VISION = re.compile(r"vis(?:ion|ual)_|image_token|vit_|mm_")
"""Keys that only models with other inputs than text have."""

_NULL_MATTERS = re.compile(r"rope|sliding|softcap|window|chunk|multiplier|scal")
"""Keys for which null is a value of its own. For others, null means the same as a missing key: the default."""

_ADVICE = "if the config.json that is used is not the right one, name the model that has the right one with {keys}"
_MISSING = object()


@dataclass(frozen=True, slots=True)
class NamedConfig:
    """A model's config.json.

    Args:
        name: name of the model in the recipe.
        config: content of config.json.
        path: keys that lead to the section of the main stack: `Stack.config_path`.
    """

    name: str
    config: Mapping[str, Any]
    path: tuple[str, ...] = ()

    @property
    def section(self) -> Mapping[str, Any]:
        """The section of the main stack; empty if there is none."""
        section: Any = self.config
        for key in self.path:
            section = section.get(key) if isinstance(section, Mapping) else None
        return section if isinstance(section, Mapping) else {}

    @property
    def types(self) -> set[str]:
        """The model types that the top level and the section state."""
        stated = (part.get("model_type") for part in (self.config, self.section))
        return {text for text in stated if isinstance(text, str)}


def compare_configs(
    used: NamedConfig, models: Sequence[NamedConfig], *, chosen: bool, has_base: bool = False
) -> list[ModelWarning]:
    """Compare the config.json files of models whose tensors are combined.

    Args:
        used: the config that the output's is derived from.
        models: the models that provide tensors, in the order of the recipe; `used` can be one of them.
        chosen: whether the recipe names the config explicitly (`files_from`). Then a value that one of the models has
            is the user's choice, and differences that are errors otherwise are warnings.

    Returns:
        At most one warning for all keys whose values differ, and one for a difference that would otherwise be an error.

    Raises:
        CheckpointError: the models have different model types, head counts or activations, and none is chosen.
    """
    of_model = chosen and any(model.name == used.name for model in models)
    conflicts = list(_type_conflicts(models if chosen else (used, *models)))
    fatal = [text for text, is_related in conflicts if not is_related]
    different = [text for text, is_related in conflicts if is_related]
    models = [model for model in models if model.name != used.name]
    values = {model.name: _comparable(model) for model in (used, *models)}
    _drop_other_spellings(values)
    keys = list(dict.fromkeys(key for flat in values.values() for key in flat))
    names = ["model_type"] if conflicts else []
    for key in keys:
        given = {name: flat.get(key, _MISSING) for name, flat in values.items()}
        if not _differs(key, given.values()):
            continue
        text = _describe(key, given, used.name)
        if _is_fatal(key, [value for value in given.values() if value is not _MISSING]):
            fatal.append(text)
        elif of_model or (chosen and given[used.name] in [given[model.name] for model in models]):
            continue
        else:
            different.append(text)
        names.append(key)
    if fatal and not chosen:
        raise CheckpointError(
            f"config.json differs between the models: {'; '.join(fatal)}. The tensors have the same shapes but another "
            "meaning. To merge them anyway, name the model whose config.json is right with files_from"
        )
    different = fatal + different
    if not different:
        return []
    problem = f"config.json differs between the models: {'; '.join(different)}"
    advice = "" if chosen else _ADVICE.format(keys="files_from" if has_base else "base_model or files_from")
    return [ModelWarning(ModelWarningKind.CONFIG_DIFFERS, problem, advice, tuple(names))]


def _type_conflicts(models: Sequence[NamedConfig]) -> Iterator[tuple[str, bool]]:
    """Describe model types that differ, and whether one model is a variant of the other model's text part.

    A text model and the text part of another one may have a type in common, such as ``gemma3_text``.
    """
    first = next((model for model in models if model.types), None)
    for model in models:
        if first is not None and model.types and not first.types & model.types:
            text = f"model_type is {_one(first)} in {first.name} and {_one(model)} in {model.name}"
            yield text, _is_text_part(first, model) or _is_text_part(model, first)


def _is_text_part(whole: NamedConfig, text: NamedConfig) -> bool:
    """Whether a vision-language model was made from a text model of another one's type.

    The first type then contains all words of the second: ``qwen3_vl_moe_text`` and ``qwen3_moe``.
    """
    if not any(_VISION.match(key) for key in whole.config) or any(_VISION.match(key) for key in text.config):
        return False
    words = _one(text).lower().split("_")
    return any(all(word in known for word in words) for known in whole.types)


def _one(model: NamedConfig) -> str:
    return str(model.section.get("model_type") or model.config.get("model_type"))


def _comparable(model: NamedConfig) -> dict[str, Any]:
    """The keys that can be compared: those of the main section by name, those of other sections with their path."""
    flat: dict[str, Any] = {}
    _flatten(model.config, "", model.path, flat)
    _flatten(model.section, "", (), flat)
    for key in [key for key in flat if _is_per_layer(key, model)]:
        del flat[key]
    _normalize_rope(flat)
    if isinstance(flat.get("pos_att_type"), str):  # DeBERTa's "p2c|c2p"
        flat["pos_att_type"] = flat["pos_att_type"].lower().split("|")
    if flat.get("use_sliding_window") is False:
        flat.pop("sliding_window", None)
        flat.pop("max_window_layers", None)
    if any(text.startswith("gemma") for text in model.types):  # its code reads `gelu` as the tanh approximation
        act = flat.pop("hidden_activation", None) or flat.get("hidden_act")
        flat["hidden_act"] = "gelu_pytorch_tanh" if act in ("gelu", None) else act
    return flat


def _flatten(section: Mapping[str, Any], prefix: str, skip: tuple[str, ...], flat: dict[str, Any]) -> None:
    """Add the keys of a section, except those about layers and the harmless ones; `skip` is the main section's path."""
    for key, value in section.items():
        if isinstance(value, Mapping) and (key.endswith("_config") or key in ("encoder", "decoder")):
            if skip[:1] != (key,) and not _HARMLESS.search(key):
                _flatten(value, f"{prefix}{key}.", (), flat)
        elif not _HARMLESS.search(key) and not _is_about_layers(key, value) and key != "model_type":
            flat[prefix + key] = value


def _is_about_layers(key: str, value: Any) -> bool:
    """Whether a key counts or lists layers: the layers that are merged decide, not the models."""
    is_list = key in PER_LAYER and isinstance(value, (list, str))
    is_other = key in ("max_window_layers", "per_layer_config", "attention_types", "kv_source_layers")
    is_indices = key in LAYER_INDICES or key in LAYER_INDICES_FROM_1
    return is_list or is_other or is_indices or key in COUNT_KEYS or "nextn" in key or "mtp" in key


def _normalize_rope(flat: dict[str, Any]) -> None:
    """Write rope parameters as older versions of transformers do: `rope_theta`, and a `rope_scaling` or null."""
    parameters = flat.get("rope_parameters")
    if isinstance(parameters, Mapping) and not _is_nested(parameters):
        del flat["rope_parameters"]
        scaling: dict[str, Any] = dict(parameters)
    elif isinstance(flat.get("rope_scaling"), Mapping):
        scaling = dict(flat["rope_scaling"])
    else:
        flat["rope_scaling"] = None
        return
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in scaling:
            flat.setdefault(key, scaling.pop(key))
    kinds = [scaling.pop(key, None) for key in ("rope_type", "type")]
    kind = kinds[0] or kinds[1]
    if kind not in (None, "default", "mrope"):
        scaling["rope_type"] = kind
    flat["rope_scaling"] = scaling or None


def _is_nested(parameters: Mapping[str, Any]) -> bool:
    """Whether rope parameters are given by layer type, as for Gemma 3."""
    return any(isinstance(value, Mapping) for value in parameters.values())


def _drop_other_spellings(values: Mapping[str, dict[str, Any]]) -> None:
    """Remove rope keys that cannot be compared, since only some models state them by layer type."""
    nested = ["rope_parameters" in flat for flat in values.values()]
    if any(nested):
        for flat in values.values():
            for key in [key for key in flat if key.startswith("rope_") or key == "rope_local_base_freq"]:
                if key != "rope_parameters" or not all(nested):
                    del flat[key]
    elif any(flat.get("rope_theta") not in (None, 10000) for flat in values.values()):
        for flat in values.values():  # nearly every architecture's default
            flat.setdefault("rope_theta", 10000)


def _differs(key: str, values: Iterable[Any]) -> bool:
    """Whether values that models state for a key differ. A missing key has an unknown default, so it never differs."""
    name = key.rpartition(".")[2]
    stated = [value for value in values if value is not _MISSING]
    if not _NULL_MATTERS.search(name):
        stated = [value for value in stated if value is not None]
    return any(value != stated[0] for value in stated[1:])


def _is_fatal(key: str, values: Sequence[Any]) -> bool:
    """Whether models with different values of a key cannot be combined."""
    name = key.rpartition(".")[2]
    if _ACTIVATION.search(name):
        families = {_family(value) for value in values if isinstance(value, str)}
        return len(families) > 1
    return bool(_HEADS.search(name)) and any(isinstance(value, int) for value in values)


def _family(activation: str) -> str:
    """The activation without its approximation: the variants of gelu differ by less than a merge changes."""
    text = activation.lower().removeprefix("gated-")
    return "gelu" if _GELU.search(text) else "silu" if text == "swish" else text


def _describe(key: str, given: Mapping[str, Any], used: str) -> str:
    """Describe the values of a key, such as ``rope_theta is 10000.0 in a (used) and 500000.0 in b and c``."""
    models: dict[str, list[str]] = {}
    for name, value in given.items():
        models.setdefault(_short(value), []).append(f"{name} (used)" if name == used else name)
    return f"{key} is " + " and ".join(f"{value} in {' and '.join(names)}" for value, names in models.items())


def _short(value: Any) -> str:
    if value is _MISSING:
        return "not stated"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def check_layouts(models: Mapping[str, NamedConfig], graph: MergeGraph) -> None:
    """Check that models store their matrices in the same order of dimensions, where the shapes don't show it.

    Args:
        models: the models by name, and the model whose config.json is used.
        graph: graph of the output.

    Raises:
        CheckpointError: a square matrix is stored transposed in one of the models.
    """
    for table, what in ((TRANSPOSED_EXPERTS, "experts"), (TRANSPOSED_WEIGHTS, "")):
        transposed = [name for name, model in models.items() if model.types & table]
        others = [name for name, model in models.items() if model.types and not model.types & table]
        if not transposed or not others:
            continue
        for output in graph.outputs:
            name, shape = output.name, graph.shape(output.node)
            if len(shape) == (3 if what else 2) and shape[-1] == shape[-2] and what in name:
                raise CheckpointError(
                    f"tensor {name} is stored transposed in {transposed[0]} ({_one(models[transposed[0]])}) compared "
                    f"with {others[0]} ({_one(models[others[0]])}), which its shape {list(shape)} does not show: "
                    "convert one of the models to the other's architecture"
                )


# --- the layers that are combined ------------------------------------------------------------------------------


def compare_layers(
    models: Mapping[int, NamedConfig], inputs: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[ModelWarning]:
    """Warn if layers of different kinds are combined into one, by the lists in config.json with an entry per layer.

    Args:
        models: the models by number.
        inputs: for each layer of the output, the models and the layers in them that are combined.
    """
    for key in sorted({key for model in models.values() for key in model.section if _is_per_layer(key, model)}):
        combined = ((layer, list(_entries(key, models, sources))) for layer, sources in enumerate(inputs))
        found = [(layer, parts) for layer, parts in combined if len({kind for kind, _ in parts}) > 1]
        if found:
            layer, parts = found[0]
            more = f", and {len(found) - 1} more layers do, too" if len(found) > 1 else ""
            described = " and ".join(f"{kind} ({where})" for kind, where in parts)
            yield ModelWarning(
                ModelWarningKind.LAYER_RULE,
                f"{key}: layer {layer} of the output combines {described}{more}",
                "merge layers of the same kind: change the layer ranges",
                (key,),
            )


def _is_per_layer(key: str, model: NamedConfig) -> bool:
    """Whether a key lists layers, or has a list of an unknown name with as many entries as the model has layers."""
    if key in PER_LAYER or key in LAYER_INDICES or key in LAYER_INDICES_FROM_1:
        return isinstance(model.section.get(key), (list, str))
    value = model.section.get(key)
    return (
        isinstance(value, list) and len(value) == stated_layers(model.section, None) and not NOT_PER_LAYER.search(key)
    )


def _entries(
    key: str, models: Mapping[int, NamedConfig], sources: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """What a list says about each layer, and which layer that is; nothing for models without the list."""
    for number, index in sources:
        model = models.get(number)
        value = model.section.get(key) if model is not None else None
        if model is None or not isinstance(value, (list, str)):
            continue
        where = f"layer {index} of {model.name}"
        if key in LAYER_INDICES or key in LAYER_INDICES_FROM_1:
            if isinstance(value, list):
                yield ("listed" if index + (key in LAYER_INDICES_FROM_1) in value else "not listed"), where
        elif index < len(value):
            yield _short(value[index]), where
