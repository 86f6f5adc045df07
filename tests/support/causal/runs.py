"""How a model runs its layers: the settings of their modules, and the masks and positions that they get."""

from __future__ import annotations

import re
from typing import Any

TOKENS = 12
"""More than the windows of sliding attention."""

_INDEX = re.compile(
    r"layer_?(?:idx|id|index|number|num)|block_idx|num_hidden_layers|training|_.*|call_super_init|dump_patches"
)
_GIVEN = re.compile(r"mask|position|rope|rotary|freqs|layer_type|window")


def layer_settings(layer: Any) -> dict[str, Any]:
    """How a layer's modules are set up, other than by stored tensors.

    These are the classes of the modules, their attributes that are numbers, strings or None (but not the layer's
    index), and buffers that checkpoints do not contain.
    """
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        settings = {"class": type(module).__name__}
        for name, value in vars(module).items():
            # MiniMax notes the number of layers as well, to initialize buffers that checkpoints contain
            if isinstance(value, (bool, int, float, str, type(None))) and not _INDEX.fullmatch(name):
                settings[name] = value
        settings |= {name: module.get_buffer(name) for name in module._non_persistent_buffers_set}
        found |= {f"{path}.{name}" if path else name: value for name, value in settings.items()}
    return found


def layer_inputs(model: Any, prefix: str) -> list[dict[str, Any]]:
    """The masks and positions that each layer gets when the model runs; [] if it does not run on tokens alone."""
    import torch

    layers = model.get_submodule(prefix)
    found: list[dict[str, Any]] = [{} for _ in layers]

    def note(number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            found[number] = {name: value for name, value in kwargs.items() if _GIVEN.search(name)}

        return hook

    hooks = [layer.register_forward_pre_hook(note(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            model(torch.arange(6, 6 + TOKENS).view(1, -1))
    except Exception:  # some classes need images or patches as well; then only settings are compared
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return found
