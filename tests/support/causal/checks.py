"""Merges two models of a class, and compares what transformers loads with what it loads of the two models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mergeloom
from mergeloom.engine.model.warnings import ModelWarning, ModelWarningKind
from tests.support.causal.models import CausalModel, is_tied, layer_list, load_model, write_model
from tests.support.causal.runs import layer_inputs, layer_settings

SLICES = ((0, 0, 4), (1, 1, 5))
"""Model, first layer and end of each slice. The second moves layers by three, which no period of 2, 4 or 6 divides."""
SOURCES = [(model, layer) for model, first, end in SLICES for layer in range(first, end)]
"""Model and layer that each layer of the stack comes from."""

SHOWN = 4
"""Differences that an outcome describes."""
LENGTH = 200
"""Characters of each."""

_EXPLAINS = (ModelWarningKind.LAYER_RULE, ModelWarningKind.LAYER_TENSORS)


@dataclass(frozen=True)
class Outcome:
    """What became of a merge.

    Args:
        result: ``ok``, ``warned``, ``rejected`` or ``WRONG``.
        text: warnings, or the error; what is wrong, and the differences that the warnings announce.
    """

    result: str
    text: str = ""


@dataclass(frozen=True)
class Loaded:
    """A model as transformers loads it.

    Args:
        model: the model, in evaluation mode.
        state: its tensors.
        remarks: missing, unexpected and mismatched keys.
    """

    model: Any
    state: Mapping[str, Any]
    remarks: Mapping[str, list[str]]


class Pair:
    """Two models of a class with different values.

    Args:
        kind: the class.
        directory: directory for the models and for what is made of them.
    """

    def __init__(self, kind: CausalModel, directory: Path) -> None:
        self.kind = kind
        self.directory = directory
        self.paths = [write_model(kind, directory / name, seed) for seed, name in enumerate("ab", 1)]
        self.models = [self.load(path) for path in self.paths]
        for each in self.models:
            if each.remarks:
                raise ValueError(f"transformers does not load what it saved: {dict(each.remarks)}")

    def load(self, path: Path) -> Loaded:
        """Load a model."""
        model, remarks = load_model(self.kind, path)
        # RWKV scales its weights when it runs
        return Loaded(model, {name: value.clone() for name, value in model.state_dict().items()}, remarks)

    def merge(self, name: str, recipe: Mapping[str, Any]) -> tuple[Path, tuple[ModelWarning, ...]]:
        """Merge, and return the output with the warnings. Raises MergeloomError."""
        plan = mergeloom.plan(dict(recipe), device="cpu", threads=1)
        mergeloom.merge(plan, self.directory / name, device="cpu", threads=1)
        return self.directory / name, plan.findings


def check_linear(pair: Pair) -> Outcome:
    """The linear merge of a pair: every loaded value is the mean, rounded once."""
    recipe = {"merge_method": "linear", "models": [_source(path) for path in pair.paths]}
    try:
        out, warnings = pair.merge("linear", recipe)
    except mergeloom.MergeloomError as error:
        return Outcome("rejected", str(error))
    return _outcome(_differences_of_mean(pair, out), warnings)


def check_stack(pair: Pair) -> Outcome:
    """A stack of a pair's layers: each layer has the values of its source, and runs like it."""
    slices = [
        {"sources": [{"model": str(pair.paths[model]), "layer_range": [first, end]}]} for model, first, end in SLICES
    ]
    try:
        out, warnings = pair.merge("stack", {"merge_method": "passthrough", "slices": slices})
    except mergeloom.MergeloomError as error:
        return Outcome("rejected", str(error))
    return _outcome(_differences_of_stack(pair, out), warnings)


def _source(path: Path) -> dict[str, Any]:
    return {"model": str(path), "parameters": {"weight": 0.5}}


def _outcome(differences: Iterable[str], warnings: Sequence[ModelWarning]) -> Outcome:
    """The outcome of a merge: a difference is wrong unless a warning about layers announces it."""
    found = list(differences)
    explained = any(warning.kind in _EXPLAINS for warning in warnings)
    more = [f"and {len(found) - SHOWN} more differences"] if len(found) > SHOWN else []
    text = "; ".join([*map(str, warnings), *(each[:LENGTH] for each in found[:SHOWN]), *more])
    if found and not explained:
        return Outcome("WRONG", text)
    return Outcome("warned" if warnings else "ok", text)


# --- differences ---------------------------------------------------------------------------------------------------


def _differences_of_mean(pair: Pair, out: Path) -> Iterator[str]:
    import torch

    merged = pair.load(out)
    yield from _remarks(merged)
    first, second = (each.state for each in pair.models)
    for name, value in first.items():
        expected = value
        if value.is_floating_point():
            mean = (value.double() + second[name].double()) / 2
            expected = mean.to(torch.bfloat16).to(value.dtype)
        if not equal(merged.state.get(name), expected):
            yield f"{name} is not the mean"


def _differences_of_stack(pair: Pair, out: Path) -> Iterator[str]:
    prefix = layer_list(pair.models[0].model)
    if prefix is None:
        yield "the layers are not in one list"
        return
    try:
        stack = pair.load(out)
    except Exception as error:  # whatever transformers raises
        yield f"does not load: {type(error).__name__}: {error}"
        return
    yield from _remarks(stack)
    layers = stack.model.get_submodule(prefix)
    if len(layers) != len(SOURCES):
        yield f"{len(layers)} layers instead of {len(SOURCES)}"
        return
    yield from _layer_differences(pair, stack, prefix)
    yield from _other_differences(pair, stack, prefix)


def _layer_differences(pair: Pair, stack: Loaded, prefix: str) -> Iterator[str]:
    """Differences between the layers and their sources: values, settings of their modules, masks and positions."""
    inputs = [layer_inputs(each.model, prefix) for each in pair.models]
    own_inputs = layer_inputs(stack.model, prefix)
    if any(inputs) and not own_inputs:
        yield "does not run"
    for number, (source, layer) in enumerate(SOURCES):
        donor = pair.models[source]
        old = f"{prefix}.{layer}."
        values = {name.removeprefix(old): value for name, value in donor.state.items() if name.startswith(old)}
        new = f"{prefix}.{number}."
        own = {name.removeprefix(new): value for name, value in stack.state.items() if name.startswith(new)}
        for name in dict.fromkeys((*values, *own)):
            if not equal(own.get(name), values.get(name)):
                yield f"layer {number}: {name} is not that of layer {layer}"
        settings = [
            layer_settings(model.get_submodule(path.removesuffix(".")))
            for model, path in ((donor.model, old), (stack.model, new))
        ]
        for name in dict.fromkeys((*settings[0], *settings[1])):
            before, after = (each.get(name, "absent") for each in settings)
            if not equal(before, after):
                yield f"layer {number}: {name} is {after} and was {before} in layer {layer}"
        if own_inputs and inputs[source]:
            for name, value in inputs[source][layer].items():
                if not equal(own_inputs[number].get(name), value):
                    yield f"layer {number}: {name} is not that of layer {layer}"


def _other_differences(pair: Pair, stack: Loaded, prefix: str) -> Iterator[str]:
    """Differences outside the layers: the embedding is the first model's, the head the last one's."""
    first, last = pair.models
    if is_tied(first.model):
        last = first
    for name, value in stack.state.items():
        if name.startswith(f"{prefix}."):
            continue
        if not any(name in each.state and equal(value, each.state[name]) for each in pair.models):
            yield f"{name} is neither model's"
    for method, model in (("get_input_embeddings", first), ("get_output_embeddings", last)):
        own, expected = (getattr(each.model, method)() for each in (stack, model))
        if hasattr(expected, "weight") and not equal(own.weight, expected.weight):
            yield f"{method}: not that of model {pair.models.index(model)}"


def _remarks(loaded: Loaded) -> Iterator[str]:
    for kind, names in loaded.remarks.items():
        yield f"{kind.replace('_', ' ')} {', '.join(names)}"


def equal(first: Any, second: Any) -> bool:
    """Whether two values are equal, bit for bit: tensors, lists and dictionaries of them, numbers, strings."""
    import torch

    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, float):  # a constant computed from another number of layers
        return math.isclose(first, second, rel_tol=1e-12)
    return bool(first == second) if isinstance(first, (int, str)) else True
