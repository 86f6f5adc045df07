"""What a recipe makes of its models, in float64: read from the raw YAML, by the rules of a mergekit configuration.

It shares no code with mergeloom. It covers what published recipes use: several stages, models, slices and the default
module, scopes, filters and gradients of parameters, buffers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import yaml
from torch import Tensor

from tests.support.methods.expected import WITHOUT_BASE, expected
from tests.support.methods.reference import Expected
from tests.support.published import masks

Tensors = Mapping[str, Tensor]

DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"weight": None, "normalize": True},
    "passthrough": {"scale": 1.0},
    "slerp": {"t": None},
    "nuslerp": {"weight": None},
    "multislerp": {"weight": None},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {},
    "arcee_fusion": {},
    "sce": {"select_topk": 1.0},
    "task_arithmetic": {"weight": None, "normalize": False, "lambda": 1.0},
    "ties": {"weight": None, "density": 1.0, "normalize": True, "lambda": 1.0},
    "dare_linear": {"weight": None, "density": 1.0, "normalize": False, "rescale": True, "lambda": 1.0},
    "dare_ties": {"weight": None, "density": 1.0, "normalize": False, "rescale": True, "lambda": 1.0},
    "della": {"weight": None, "density": 1.0, "epsilon": 0.15, "normalize": True, "rescale": True, "lambda": 1.0},
    "della_linear": {
        "weight": None,
        "density": 1.0,
        "epsilon": 0.15,
        "normalize": False,
        "rescale": True,
        "lambda": 1.0,
    },
    "breadcrumbs": {"weight": None, "density": 1.0, "gamma": 0.01, "normalize": False, "lambda": 1.0},
    "breadcrumbs_ties": {"weight": None, "density": 1.0, "gamma": 0.01, "normalize": False, "lambda": 1.0},
}
"""The parameters of each method and their defaults; None for a required one."""

PER_INPUT = frozenset(("weight", "density", "gamma", "epsilon", "scale"))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
AFTER = re.compile(r"(?:^|\.)(?:norm|lm_head|pooler|final_layer_norm|embed_out|merger)(?:\.|$)")
BUFFER = re.compile(r"(?:inv_freq|position_ids)$")


@dataclass
class Part:
    """A slice of a stage.

    Args:
        names: model of each source.
        ranges: first layer and the one after the last of each source; None for all.
        scopes: parameters of each source, the innermost scope first.
        shared: parameters of the slice and the scopes around it.
    """

    names: list[str]
    ranges: list[tuple[int, int] | None]
    scopes: list[list[Mapping[str, Any]]] = field(default_factory=list)
    shared: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass
class Evaluated:
    """The expected tensors of a model.

    Args:
        tensors: by name; a tensor instead of `Expected` is a copy.
        dtype: dtype of all tensors that are not copies.
    """

    tensors: dict[str, Expected | Tensor]
    dtype: torch.dtype


def evaluate(text: str, load: Callable[[str], Tensors], stack: str, *, seed: int = 0) -> Evaluated:
    """Evaluate a recipe whose documents are in the order of their use.

    Args:
        text: the recipe.
        load: function that returns the stored tensors of a model by its name in the recipe.
        stack: prefix of the layers' names.
        seed: seed of methods that sample.
    """
    stages: dict[str | None, Evaluated] = {}
    load = cache(load)  # which may compute the values of a model with adapters

    def tensors_of(name: str) -> Mapping[str, Expected | Tensor]:
        return stages[name].tensors if name in stages else load(name)

    result = None
    for document in yaml.safe_load_all(text):
        result = stages[document.get("name")] = _Stage(document, tensors_of, stack, seed).evaluate()
    assert result is not None
    return result


def lookup(name: str, scopes: Sequence[Mapping[str, Any]], tensor: str, t: float, default: Any) -> Any:
    """The value of a parameter: the first scope with a value for the tensor, else the default."""
    for scope in scopes:
        setting = scope.get(name)
        if setting is None:
            continue
        conditions = [setting] if isinstance(setting, dict) else setting
        if not (isinstance(conditions, list) and conditions and isinstance(conditions[0], dict)):
            conditions = [{"value": setting}]
        for condition in conditions:
            if condition.get("filter") in (None, "*") or condition["filter"] in tensor:
                return _at(condition["value"], t)
    assert default is not None, f"{name} has no value for {tensor}"
    return default


def _at(value: Any, t: float) -> Any:
    """A value, or a gradient's value at `t`. Numbers may be text, as YAML 1.1 reads 1e-10."""
    if not isinstance(value, list):
        return float(value) if isinstance(value, str) else value
    left = min(math.floor(t * (len(value) - 1)), max(len(value) - 2, 0))
    share = t * (len(value) - 1) - left
    return value[left] + share * (value[min(left + 1, len(value) - 1)] - value[left])


class _Stage:
    def __init__(
        self, document: Mapping[str, Any], load: Callable[[str], Mapping[str, Any]], stack: str, seed: int
    ) -> None:
        self.method: str = document["merge_method"]
        self.base: str | None = document.get("base_model")
        self.load, self.seed = load, seed
        self.dtype = document.get("out_dtype") or document.get("dtype")
        self.layer = re.compile(rf"{re.escape(stack)}\.(\d+)\.(.*)")
        self.stack = stack
        outer = document.get("parameters") or {}
        content = document["modules"]["default"] if "modules" in document else document
        if "slices" in content:
            self.parts = [
                self._part(entry["sources"], [entry.get("parameters") or {}, outer]) for entry in content["slices"]
            ]
        else:
            models = list(content["models"])
            if self.base is not None and all(entry["model"] != self.base for entry in models):
                models.append({"model": self.base})
            self.parts = [self._part(models, [outer])]
        self.numbers = {name: i for i, name in enumerate(dict.fromkeys(n for part in self.parts for n in part.names))}

    def _part(self, entries: Sequence[Mapping[str, Any]], shared: list[Mapping[str, Any]]) -> Part:
        last = {entry["model"]: entry for entry in entries}  # a model that is listed twice counts once, the last entry
        kept = [entry for entry in entries if last[entry["model"]] is entry]
        ranges = [tuple(entry["layer_range"]) if "layer_range" in entry else None for entry in kept]
        scopes = [[entry.get("parameters") or {}, *shared] for entry in kept]
        return Part([entry["model"] for entry in kept], ranges, scopes, shared)

    def evaluate(self) -> Evaluated:
        stored = self.load(self.parts[0].names[0])
        dtypes = [
            x.dtype
            for part in self.parts
            for name in part.names
            for x in self.load(name).values()
            if isinstance(x, Tensor)
        ]
        dtype = DTYPES[self.dtype] if self.dtype else max(set(dtypes) & {*DTYPES.values()}, key=dtypes.count)
        result = Evaluated({}, dtype)
        for part, after in ((self.parts[0], False), (self.parts[-1], True)):
            for name in dict.fromkeys(n for model in part.names for n in self.load(model)):
                if not self.layer.fullmatch(name) and bool(AFTER.search(name)) is after:
                    self._add(result, part, name, [name] * len(part.names), 0.0)
        count = 0
        for part in self.parts:
            whole = (0, 1 + max(int(match[1]) for name in stored if (match := self.layer.fullmatch(name))))
            ranges = [each or whole for each in part.ranges]
            number = ranges[0][1] - ranges[0][0]
            for index in range(number):
                layers = [f"{self.stack}.{first + index}." for first, _ in ranges]
                rests = dict.fromkeys(
                    name.removeprefix(layer)
                    for model, layer in zip(part.names, layers, strict=True)
                    for name in self.load(model)
                    if name.startswith(layer)
                )
                t = index / (number - 1) if number > 1 else 1.0
                for rest in rests:
                    names = [f"{layer}{rest}" for layer in layers]
                    self._add(result, part, f"{self.stack}.{count + index}.{rest}", names, t)
            count += number
        return result

    def _add(self, result: Evaluated, part: Part, name: str, names: Sequence[str], t: float) -> None:
        sources = [self.load(model).get(own) for model, own in zip(part.names, names, strict=True)]
        if BUFFER.search(name):
            present = [i for i, x in enumerate(sources) if x is not None]
            chosen = next((i for i in present if part.names[i] == self.base), present[0])
            copy = sources[chosen]
            assert copy is not None
            result.tensors[name] = copy
            return
        x = []
        for source in sources:
            assert source is not None, name
            x.append(source.outputs[0] if isinstance(source, Expected) else source.to(torch.float64))
        base = part.names.index(self.base) if self.base in part.names and self.method not in WITHOUT_BASE else None
        values: dict[str, Any] = {}
        for parameter, default in DEFAULTS[self.method].items():
            if parameter not in PER_INPUT:
                values[parameter] = lookup(parameter, part.shared, name, t, default)
                continue
            values[parameter] = tuple(
                0.0 if i == base else lookup(parameter, scopes, own, t, default)
                for i, (scopes, own) in enumerate(zip(part.scopes, names, strict=True))
            )
        if self.method == "nuslerp" or self.method == "multislerp":
            base = part.names.index(self.base) if self.base in part.names else None

        def drawn() -> list[list[Tensor]]:
            return [
                [self._mask(name, part.names[i], x[i] - x[base or 0], i, values)] for i in range(len(x)) if i != base
            ]

        wanted = expected(self.method, x, base=base, parameters=values, drawn=drawn)
        for source in sources:  # the rounding of intermediate stages
            if isinstance(source, Expected):
                wanted.size = wanted.size + source.size
        result.tensors[name] = wanted

    def _mask(self, name: str, model: str, delta: Tensor, index: int, values: Mapping[str, Any]) -> Tensor:
        draw: dict[str, Any] = {"key": masks.key_of(self.seed, name), "position": self.numbers[model]}
        density = values["density"][index]
        if self.method.startswith("della"):
            return masks.della(delta, density, values["epsilon"][index], **draw)
        return masks.dare(tuple(delta.shape), density, **draw)
