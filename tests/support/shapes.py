"""What tables of shapes come to, counted without mergeloom: layers, tensors and elements of models and stacks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tests.support import models


@dataclass(frozen=True)
class Shapes:
    """What a table of shapes comes to, in elements."""

    layers: Mapping[int, int]
    outside: int
    tensors_of_layer: Mapping[int, int]
    tensors_outside: int

    @classmethod
    def of(cls, model: models.Model) -> Shapes:
        """Sum up a model by layer."""
        layers: dict[int, int] = {}
        tensors: dict[int, int] = {}
        outside = count = 0
        for name, shape in model.tensors.items():
            if match := re.match(r"model\.layers\.(\d+)\.", name):
                layer = int(match[1])
                layers[layer] = layers.get(layer, 0) + prod(shape)
                tensors[layer] = tensors.get(layer, 0) + 1
            else:
                outside += prod(shape)
                count += 1
        return cls(layers, outside, tensors, count)

    def stack(self, slices: Sequence[tuple[int, int]]) -> tuple[int, int, int, int]:
        """Layers, tensors and elements of a stack of slices, and the elements of the input that it needs."""
        chosen = [layer for first, end in slices for layer in range(first, end)]
        elements = self.outside + sum(self.layers[layer] for layer in chosen)
        tensors = self.tensors_outside + sum(self.tensors_of_layer[layer] for layer in chosen)
        needed = self.outside + sum(self.layers[layer] for layer in set(chosen))
        return len(chosen), tensors, elements, needed


def big_llama_681b() -> models.Model:
    """210 layers of Llama-3.1-405B."""
    return models.llama(layers=210, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=128256)


def mixture_of_experts() -> models.Model:
    """DeepSeek-V3's 61 layers of 256 experts in bfloat16, with a second, small tensor for every weight."""
    model = models.deepseek_v3(mtp=False)
    tensors = {name.replace("weight_scale_inv", "bias"): shape for name, shape in model.tensors.items()}
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    return models.Model(tensors, config | {"num_nextn_predict_layers": 0})
