"""Lists the modules that are no longer quantized in the description of quantized tensors in config.json.

Loaders create a quantized module for each linear layer that the list does not name, so every weight that the merge
decoded has to be in it. Its name depends on the format: transformers' ``modules_to_not_convert``, vLLM's
``ignored_layers``, compressed-tensors' ``ignore``, ModelOpt's ``exclude_modules``.
"""

from __future__ import annotations

from typing import Any

from ....io.units import plural
from ...graph.build import BuiltGraph
from ...graph.checks.quantized_outputs import decoded_outputs
from ...model.checks.formats import quantization_config
from ...model.warnings import ModelWarning, ModelWarningKind

_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
_OF_METHODS = {"compressed-tensors": "ignore", "modelopt": "exclude_modules"}


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
    default = _OF_METHODS.get(method, _KEYS[0])
    name = next((each for each in _KEYS if isinstance(section.get(each), list)), default)
    listed = list(section.get(name) or ())
    outputs = decoded_outputs(built.graph, built.models[built.donor])
    modules = (output.name.removesuffix(".weight") for output in outputs)
    added = [module for module in modules if module not in listed]
    if not added:
        return []
    assert isinstance(section, dict)
    section[name] = listed + added
    problem = f"{plural(len(added), 'module')} added to {key}.{name} of config.json: the output has them unquantized"
    return [ModelWarning(ModelWarningKind.QUANTIZATION, problem, names=(f"{key}.{name}",))]
