"""Describes FP8 blocks that a recipe asks for in config.json, as transformers, vLLM and SGLang read it.

The keys are those of DeepSeek-V3's config.json (transformers' ``FineGrainedFP8Config``).
"""

from __future__ import annotations

from typing import Any

from ...graph.build import BuiltGraph
from ...model.logical import Encoding
from ...model.roles import is_embedding
from ...model.warnings import ModelWarning, ModelWarningKind
from ...recipe.entries.block_format import BlockFormat
from .adapt import remove_quantization

_KEY = "quantization_config"
_TIED_HEAD = "lm_head"
"""Module of a head that is tied to the embedding, so no tensor names it; transformers would quantize it."""


def stores_blocks(built: BuiltGraph) -> bool:
    """Whether any tensor of the output is stored as blocks. None is if the filters that ask for them match no name."""
    names = set(built.graph.outputs.names)
    return any(Encoding.names(name)[1] in names for name in names)


def replace_description(config: dict[str, Any], form: BlockFormat) -> list[ModelWarning]:
    """Remove any other description of quantized tensors from a config, and return a warning if there is one."""
    replaced = remove_quantization(config)
    problem = f"{' and '.join(replaced)} of config.json is replaced: the recipe asks for {form.label}"
    return [ModelWarning(ModelWarningKind.QUANTIZATION, problem, names=replaced)] if replaced else []


def describe_blocks(config: dict[str, Any], built: BuiltGraph, form: BlockFormat) -> None:
    """Add ``quantization_config`` to a config.

    Args:
        config: config.json, which is modified.
        built: graph of the stage, with at least one tensor that is stored as blocks.
        form: format of the blocks.
    """
    section: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [form.rows, form.columns],
        "modules_to_not_convert": _unquantized_modules(built),
    }
    if form.scales.name == "F8_E8M0":
        section["scale_fmt"] = "ue8m0"
    config[_KEY] = section


def _unquantized_modules(built: BuiltGraph) -> list[str]:
    """The modules of the output with matrices that are not stored as blocks, but for embeddings."""
    graph = built.graph
    outputs = dict(zip(graph.outputs.names, graph.outputs.nodes, strict=True))
    modules = {} if built.head else {_TIED_HEAD: None}
    scales = {Encoding.names(name)[1] for name in outputs}
    for name, node in outputs.items():
        stored = Encoding.names(name)[1] in outputs or name in scales
        if not stored and len(graph.shape(node)) >= 2 and not is_embedding(name):
            modules[name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]] = None
    return list(modules)
