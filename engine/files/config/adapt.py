"""Makes config.json agree with the tensors that are written: vocabulary size, tied head, biases, prediction layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ....io.tensors.dtypes import DType
from ....io.tensors.dtypes import Kind as ElementKind
from ....io.units import plural
from ...graph.build import BuiltGraph
from ...model.logical import LogicalTensor
from ...model.roles import is_after_layers, is_buffer, is_embedding, is_head, is_prediction, tied_embedding
from ...model.warnings import ModelWarning, ModelWarningKind
from .architectures import ATTENTION_BIAS, MLP_BIAS, TIED_BY_DEFAULT
from .rearrange import set_dtype

_LANGUAGE_MODEL = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM")
_T5 = frozenset({"longt5", "mt5", "switch_transformers", "t5", "umt5"})
"""Types whose code scales the decoder's output if ``tie_word_embeddings`` is true, so mergeloom does not set it."""

_DESCRIBES_INPUTS = ("quantization_config", "compression_config", "quantization")
"""Keys that describe quantized tensors. The last is MLX's."""
_PACKED = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})

_PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_?forward|ffn|experts")


def drop_quantization(config: dict[str, Any], built: BuiltGraph, used: str) -> list[ModelWarning]:
    """Remove the description of quantized tensors from a config if no tensor of the output is quantized.

    A model that is quantized when it is loaded, from weights in full precision (BitNet's online mode), keeps it.

    Args:
        config: config.json, which is modified.
        built: graph of the stage.
        used: name of the model that `config` comes from.
    """
    found = list(_descriptions(config))
    quantized = next(_quantized(built), None)
    if not found and quantized is not None and not any(config.get(key) for key in _DESCRIBES_INPUTS):
        problem = (
            f"the output has quantized tensors ({quantized}), and config.json of {used} has no quantization_config"
        )
        advice = "loaders need one: name the quantized model with base_model or files_from"
        return [ModelWarning(ModelWarningKind.QUANTIZATION, problem, advice, ("quantization_config",))]
    if not found or quantized is not None:
        return []
    keys = remove_quantization(config)
    return [
        ModelWarning(
            ModelWarningKind.QUANTIZATION,
            f"{' and '.join(keys)} of {used} is removed from config.json: no tensor of the output is quantized",
            names=keys,
        )
    ]


def remove_quantization(config: dict[str, Any]) -> tuple[str, ...]:
    """Remove the descriptions of quantized tensors from a config, and return their keys, each once."""
    found = list(_descriptions(config))
    for section, key in found:
        del section[key]
        section.pop("expert_dtype", None)  # the format of DeepSeek-V4's experts
    return tuple(dict.fromkeys(key for _, key in found))


def _descriptions(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The descriptions of tensors that are stored quantized, each with the section that has it and its key."""
    for section in _sections(config):
        for key in _DESCRIBES_INPUTS:
            if isinstance(section.get(key), Mapping) and section[key].get("quantization_mode") != "online":
                yield section, key


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and its sections at any depth: Qwen2.5-Omni's text model is in ``thinker_config.text_config``."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in _DESCRIBES_INPUTS:
            yield from _sections(value)


def _quantized(built: BuiltGraph) -> Iterator[str]:
    """Names of output tensors that are quantized or belong to quantized ones.

    A name like a scale's is not enough: DeepSeek-V4 has parameters named ``hc_attn_scale``.
    """
    graph = built.graph
    has_quantized = any(model.quantized for model in built.models)
    dtypes = {dtype.name: dtype for dtype in graph.node_dtype}
    if not has_quantized and not any(map(_may_be_codes, dtypes.values())):
        return
    for output in graph.outputs:
        dtype = graph.node_dtype[output.node]
        if _may_be_codes(dtype) and (dtype.kind is ElementKind.FLOAT or not is_buffer(output.name)):
            yield output.name
        elif has_quantized:
            for read in graph.reads_of(output.node):
                if graph.read_names[read] in built.models[graph.read_models[read]].quantized:
                    yield output.name


def _may_be_codes(dtype: DType) -> bool:
    return dtype.name in _PACKED or (dtype.kind is ElementKind.FLOAT and dtype.bits < 16)


def adapt_config(config: dict[str, Any], built: BuiltGraph, *, is_mixed: bool) -> list[ModelWarning]:
    """Set the keys that follow from the written tensors, and return a warning for each change.

    Args:
        config: config.json with updated layers, which is modified.
        built: graph of the stage.
        is_mixed: whether the output has several dtypes, and the recipe does not set one.
    """
    main = built.stacks[0].donor.config_path if built.stacks else ()
    sections = [config]
    for key in main:
        if not isinstance(sections[-1].get(key), dict):
            break
        sections.append(sections[-1][key])
    nodes = dict(zip(built.graph.outputs.names, built.graph.outputs.nodes, strict=True))
    outside = list(dict.fromkeys(name for model in built.models for name in model.non_layer if name in nodes))
    warnings = [
        *_set_vocabulary(sections, built, nodes, outside),
        *_set_tied_head(sections, built, outside, nodes),
        *_set_biases(sections[-1], built),
        *_set_prediction_layers(sections, built, nodes),
    ]
    if is_mixed:
        warnings += _set_stated_dtype(config, built)
    return warnings


# --- vocabulary and head ---------------------------------------------------------------------------------------


def _set_vocabulary(
    sections: Sequence[dict[str, Any]], built: BuiltGraph, nodes: Mapping[str, int], outside: Sequence[str]
) -> Iterator[ModelWarning]:
    """Set `vocab_size` to the number of rows of the embedding."""
    donor = built.models[built.donor]
    own = [name for name in outside if is_embedding(name) and donor.layers.owner(name) in (None, *donor.layers.mains)]
    embedding = tied_embedding("lm_head.weight", own)
    if embedding is None or len(shape := built.graph.shape(nodes[embedding])) != 2:
        return
    rows = shape[0]
    section = next((section for section in reversed(sections) if isinstance(section.get("vocab_size"), int)), None)
    if section is None or section["vocab_size"] == rows or "decoder_vocab_size" in section:
        return
    stated = section["vocab_size"]
    multiple = section.get("pad_vocab_size_multiple")  # Mamba states the size before padding, OLMo both sizes
    is_padded = isinstance(multiple, int) and multiple > 0 and -(-stated // multiple) * multiple == rows
    if is_padded or rows in (section.get("padded_vocab_size"), section.get("embedding_size")):
        return
    if any(is_head(name) and built.graph.shape(nodes[name])[:1] == (stated,) for name in outside):
        return  # Mllama and Moshi embed tokens that they never predict, and state the number of the others
    for each in sections:
        if each.get("vocab_size") == stated:
            each["vocab_size"] = rows
    table = donor.tensors.get(embedding)
    if built.vocabulary is not None or (isinstance(table, LogicalTensor) and table.adapted and table.shape[0] == rows):
        return  # the recipe asks for it, or the donor's adapter has an embedding of other rows
    yield ModelWarning(
        ModelWarningKind.CONFIG_CHANGED,
        f"vocab_size is set to {rows}, the number of rows of {embedding}: config.json of the input states {stated}",
        names=("vocab_size", embedding),
    )


def _set_tied_head(
    sections: Sequence[dict[str, Any]], built: BuiltGraph, outside: Sequence[str], nodes: Mapping[str, int]
) -> Iterator[ModelWarning]:
    """Set `tie_word_embeddings` if a language model has no head, since loaders initialize a missing one at random."""
    if built.head or not any(is_embedding(name) for name in outside):
        return
    architectures = sections[0].get("architectures")
    is_language_model = isinstance(architectures, list) and any(_LANGUAGE_MODEL.search(str(a)) for a in architectures)
    if not is_language_model or any(_may_be_head(name, built.graph.shape(nodes[name])) for name in outside):
        return
    types = [str(section.get("model_type")) for section in sections]
    stated = [section.get("tie_word_embeddings") for section in sections]
    wrong = False in stated
    if stated[0] is True:  # the section that transformers reads; others may read the section of the text model
        for section in sections:
            section["tie_word_embeddings"] = True
        return
    if not wrong and (True in stated or not TIED_BY_DEFAULT.isdisjoint(types[:1])):
        return
    reason = "is false in config.json" if wrong else f"is not stated in config.json, and not the default of {types[0]}"
    problem = f"the output has no head (lm_head), and tie_word_embeddings {reason}"
    names = ("tie_word_embeddings",)
    if not _T5.isdisjoint(types):
        advice = "check that the inputs are complete: loaders may initialize the head at random"
        yield ModelWarning(ModelWarningKind.HEAD, problem, advice, names)
        return
    for section in sections:
        section["tie_word_embeddings"] = True
    yield ModelWarning(
        ModelWarningKind.HEAD,
        f"{problem}: it is set to true, since loaders would initialize the head at random",
        "check that the inputs are complete",
        names,
    )


def _may_be_head(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor could be a head under a name that mergeloom does not know, or a quantized one."""
    return len(shape) > 1 and is_after_layers(name) and not is_embedding(name) and "transform" not in name


# --- biases ----------------------------------------------------------------------------------------------------


def _set_biases(section: dict[str, Any], built: BuiltGraph) -> Iterator[ModelWarning]:
    """Set the keys that enable biases that the donor lacks and another model adds to the output."""
    added = [each for each in built.partial if built.donor in each.absent and not is_head(each.name)]
    for part, pattern, key, types in (
        ("attention", _ATTENTION, "attention_bias", ATTENTION_BIAS),
        ("MLP", _MLP, "mlp_bias", MLP_BIAS),
    ):
        tensors = [each for each in added if pattern.search(each.name)]
        names = {each.name for each in tensors}
        added = [each for each in added if each.name not in names]
        if tensors:
            changed = dict(_enabling(section, built, tensors[0].present, part == "MLP"))
            if not changed and str(section.get("model_type")) in types:
                changed = {} if section.get(key) is True else {key: True}
            elif not changed and section.get(key) is not True:
                yield _unread([each.name for each in tensors], section)
                continue
            section |= changed
            biases = plural(len(tensors), f"{part} bias", f"{part} biases")
            for name, value in changed.items():
                yield ModelWarning(
                    ModelWarningKind.CONFIG_CHANGED,
                    f"{name} is set to {str(value).lower()}: the output has {biases} that "
                    f"{built.models[built.donor].name} lacks, such as {tensors[0].name}",
                    names=(name,),
                )
    if added:
        yield _unread([each.name for each in added], section)


def _enabling(
    section: Mapping[str, Any], built: BuiltGraph, present: Sequence[int], is_mlp: bool
) -> Iterator[tuple[str, bool]]:
    """The keys about biases that a model with the tensors sets otherwise: ``qkv_bias: true``, ``no_bias: false``."""
    for number in present[:1]:
        model = built.models[number]
        other: Any = model.checkpoint.config or {}
        for key in model.layers.main.config_path:
            other = other.get(key, {})
        for key, value in other.items():
            enables = isinstance(value, bool) and value is not key.startswith("no_")
            is_own = "attention" not in key and "qkv" not in key if is_mlp else "mlp" not in key
            if "bias" in key and enables and is_own and section.get(key) is not value:
                yield key, value


def _unread(names: Sequence[str], section: Mapping[str, Any]) -> ModelWarning:
    return ModelWarning(
        ModelWarningKind.OPTIONAL_TENSOR,
        f"the output has {plural(len(names), 'tensor')} that the donor lacks, such as {names[0]}, and mergeloom knows "
        f"no key of config.json that makes a {section.get('model_type', 'model')} read them",
        "loaders may ignore them: use a model that has them as base_model",
        tuple(names),
    )


# --- prediction layers -----------------------------------------------------------------------------------------


def _set_prediction_layers(
    sections: Sequence[dict[str, Any]], built: BuiltGraph, nodes: Mapping[str, int]
) -> Iterator[ModelWarning]:
    """Set the number of prediction layers to those that are written, and report those that are not."""
    donor = built.models[built.donor].layers.main
    for section in sections:
        for key in _PREDICTION_KEYS:
            count = section.get(key)
            if not isinstance(count, int) or isinstance(count, bool):
                continue
            written = _prediction_layers(key, built, nodes)
            if written is None or written == count or (count < written and donor.extras):
                continue  # a number that was too small before the merge stays as it is
            section[key] = written
            yield ModelWarning(
                ModelWarningKind.PREDICTION_LAYERS,
                f"{key} is set to {written}, the number of prediction layers in the output: config.json of the input "
                f"states {count}",
                names=(key,),
            )
    last = {number for stack in built.stacks[:1] for number, _ in stack.inputs[-1]}
    for number in sorted({built.donor, *last}):
        model, main = built.models[number], built.models[number].layers.main
        unused = (each.layer for each in built.unused if each.model == model.name and each.layer in main.extras)
        for layer in dict.fromkeys(unused):
            yield ModelWarning(
                ModelWarningKind.PREDICTION_LAYERS,
                f"{model.name}: layer {layer} is beyond the {main.count} layers that config.json counts (probably a "
                "prediction head), and is not part of the output: a stack has those of its last slice",
                names=(f"{main.prefix}.{layer}",),
            )


def _prediction_layers(key: str, built: BuiltGraph, nodes: Mapping[str, int]) -> int | None:
    """The number of prediction layers in the output; None if it is not known.

    Modules of prediction layers are not counted: their number is what the model that has them states under `key`.
    """
    if not any(map(is_prediction, nodes)):
        return len(set(_written_extras(built, nodes)))
    for model in (built.models[built.donor], *built.models):
        if any(map(is_prediction, model.non_layer)):
            stated = (section.get(key) for section in _sections(dict(model.checkpoint.config or {})))
            return next((number for number in stated if type(number) is int), None)
    return None


def _written_extras(built: BuiltGraph, nodes: Mapping[str, int]) -> Iterator[int]:
    """Yield the numbers in the output of the layers beyond its count."""
    for stack in built.stacks[:1]:
        for model in built.models:
            main = model.layers.main
            for extra in main.extras:
                number = len(stack.sources) + extra - main.count
                rest = next(iter(model.by_layer.get((0, extra), {})), "")
                if f"{stack.donor.prefix}.{number}.{rest}" in nodes:
                    yield number


# --- dtype -----------------------------------------------------------------------------------------------------


def main_dtype(built: BuiltGraph) -> str | None:
    """torch's name of the floating-point dtype of most of the output's parameters; None if it has none."""
    sizes = _sizes_by_dtype(built)
    return max(sizes, key=lambda name: sizes[name], default=None)


def _sizes_by_dtype(built: BuiltGraph) -> dict[str, int]:
    """The number of the output's parameters of each unquantized floating-point dtype, by torch's name."""
    graph = built.graph
    sizes: dict[str, int] = {}
    for number, count in Counter(map(graph.node_class.__getitem__, graph.outputs.nodes)).items():
        node = graph.class_nodes[number]
        dtype = graph.node_dtype[node]
        if dtype.is_wide_float and dtype.torch_name:
            sizes[dtype.torch_name] = sizes.get(dtype.torch_name, 0) + count * graph.elements(node)
    return sizes


def _set_stated_dtype(config: dict[str, Any], built: BuiltGraph) -> Iterator[ModelWarning]:
    """Set the dtype that config.json states to the output's most frequent one, if no tensor has the stated dtype."""
    sizes = _sizes_by_dtype(built)
    key = next((key for key in ("torch_dtype", "dtype") if isinstance(config.get(key), str)), None)
    if key is None or not sizes or config[key] in sizes:
        return
    stated, dtype_name = config[key], main_dtype(built)
    assert dtype_name is not None
    set_dtype(config, dtype_name)
    yield ModelWarning(
        ModelWarningKind.CONFIG_CHANGED,
        f"{key} is set to {dtype_name}, the dtype of most parameters: no tensor of the output is {stated}",
        names=(key,),
    )
