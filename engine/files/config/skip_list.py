"""Lists the modules that are no longer quantized in the description of quantized tensors in config.json.

Loaders create a quantized module for each linear layer that the list does not name, so every weight that the merge
decoded has to be in it. Its name depends on the format: transformers' ``modules_to_not_convert``, vLLM's
``ignored_layers``, compressed-tensors' and ModelOpt's ``ignore``. The rules by which entries match modules are those of
transformers (`engine.model.formats.skip_lists`) and of vLLM (``is_layer_skipped`` in
model_executor/layers/quantization/utils/quant_utils.py, ``should_ignore_layer`` in compressed_tensors/utils.py). Both
have one module for the experts of a layer, so experts are listed together where none of them is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ....io.units import plural
from ...graph.build import BuiltGraph
from ...graph.checks.quantized_outputs import decoded_outputs
from ...graph.encoding.linear import experts_of
from ...model.checks.formats import quantization_config
from ...model.formats.skip_lists import KEYS, SkipList
from ...model.roles import is_head
from ...model.warnings import ModelWarning, ModelWarningKind

_IGNORE = ("compressed-tensors", "modelopt")
"""Values of ``quant_method`` of formats whose list is ``ignore``."""


def extend_skip_list(config: dict[str, Any], built: BuiltGraph) -> list[ModelWarning]:
    """Add the modules of which the donor's weights are quantized and the output's are not.

    Args:
        config: config.json, which is modified.
        built: graph of the stage.
    """
    found = quantization_config(config)
    if found is None:
        return []
    key, section = found
    method = str(section.get("quant_method") or "").lower()
    names = [each for each in KEYS if isinstance(section.get(each), list)]
    outputs = decoded_outputs(built.graph, built.models[built.donor])
    modules = [name.removesuffix(".weight") for name, _ in outputs]
    if not modules:
        return []
    quantized, count = lists_of_codes(built), 0
    assert isinstance(section, dict)
    extended = []
    for name in names or ["ignore" if method in _IGNORE else KEYS[0]]:  # loaders differ in the list that they read
        listed = list(section.get(name) or ())
        known = SkipList(name, (each for each in listed if isinstance(each, str)), method)
        missing = [module for module in modules if known.entry_of(module) is None]
        count, added = max(count, len(missing)), list(entries_of(missing, quantized, method))
        if added and not listed:  # without a list, transformers leaves the head as it is
            added = [*_heads(built), *added]
        if added:
            section[name] = listed + added
            extended.append(f"{key}.{name}")
    if not extended:
        return []
    where = " and ".join(extended)
    problem = f"{plural(count, 'module')} added to {where} of config.json: the output has them unquantized"
    return [ModelWarning(ModelWarningKind.QUANTIZATION, problem, names=tuple(extended))]


def _heads(built: BuiltGraph) -> Iterator[str]:
    """Yield the modules of the output's heads that are not quantized."""
    graph = built.graph
    for name, node in zip(graph.outputs.names, graph.outputs.nodes, strict=True):
        if is_head(name) and graph.node_dtype[node].is_wide_float:
            yield name.removesuffix(".weight")


def entries_of(modules: Iterable[str], quantized: Collection[str], method: str) -> Iterator[str]:
    """Yield the entries for modules.

    Args:
        modules: names of the modules.
        quantized: names of the lists of experts of which the output has quantized ones.
        method: ``quant_method``, which decides how entries are matched.
    """
    experts: set[str] = set()
    for module in modules:
        owner = experts_of(module)
        if owner is None or owner in quantized:
            yield module
        elif owner not in experts:
            experts.add(owner)
            yield _entry_of_experts(owner, method)


def _entry_of_experts(experts: str, method: str) -> str:
    """The entry for a list of experts and for every module in it."""
    if method == "compressed-tensors":
        return rf"re:{re.escape(experts)}(\..*)?$"
    return f"{experts}*" if method == "modelopt" else experts


def lists_of_codes(built: BuiltGraph) -> set[str]:
    """The lists of experts of which the output has quantized ones."""
    graph = built.graph
    outputs = zip(graph.outputs.names, graph.outputs.nodes, strict=True)
    owners = (experts_of(name) for name, node in outputs if not graph.node_dtype[node].is_wide_float)
    return {owner for owner in owners if owner is not None}
