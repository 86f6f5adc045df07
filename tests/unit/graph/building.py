"""Builds graphs of recipes over checkpoints without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mergeloom.engine.graph.build import BuiltGraph, build_graph
from mergeloom.engine.graph.graph import Kind
from mergeloom.engine.recipe.load import load_recipe
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.methods import merge_methods

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def checkpoint(
    name: str, shapes: Shapes, dtype: str | Mapping[str, str] = "BF16", config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint without data; `dtype` is the dtype of all tensors, or of some by name (the others are BF16)."""
    tensors: dict[str, TensorRef] = {}
    offset = 4096
    for tensor, shape in shapes.items():
        element = DTYPES[dtype if isinstance(dtype, str) else dtype.get(tensor, "BF16")]
        nbytes = element.nbytes(prod(shape))
        tensors[tensor] = TensorRef(Path(name, "model.safetensors"), offset, nbytes, element, shape)
        offset += nbytes
    return Checkpoint(Path(name), MappingProxyType(tensors), config, {}, (Path(name, "model.safetensors"),), ())


def layers(count: int, rests: Shapes | None = None, prefix: str = "model.layers") -> dict[str, Shape]:
    """The tensors of a stack."""
    chosen = rests or {"attn.q_proj.weight": (4, 4), "norm.weight": (4,)}
    return {f"{prefix}.{number}.{rest}": shape for number in range(count) for rest, shape in chosen.items()}


def decoder(count: int = 4, *, head: bool = True, rests: Shapes | None = None) -> dict[str, Shape]:
    """The tensors of a small language model."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (8, 4)}
    return shapes | layers(count, rests) | {"model.norm.weight": (4,)} | ({"lm_head.weight": (8, 4)} if head else {})


@dataclass
class Built:
    """A built graph with queries by output name."""

    found: BuiltGraph

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        return [output.name for output in self.found.graph.outputs]

    def node(self, name: str) -> int:
        """The node of an output."""
        return next(output.node for output in self.found.graph.outputs if output.name == name)

    def sources(self, name: str) -> list[str]:
        """The sources of an output, as ``model:tensor``."""
        graph = self.found.graph
        return [
            f"{graph.models[graph.read_models[read]]}:{graph.read_names[read]}"
            for read in graph.node_sources[self.node(name)]
        ]

    def how(self, name: str) -> str:
        """How an output is computed: ``copy``, ``same``, or the method."""
        operation = self.found.graph.operation(self.node(name))
        return operation.method if operation.kind is Kind.MERGE else operation.kind.value

    def dtype(self, name: str) -> str:
        """The dtype of an output."""
        return self.found.graph.node_dtype[self.node(name)].name

    def parameter(self, name: str, parameter: str) -> Any:
        """The value of a parameter for an output."""
        return dict(self.found.graph.operation(self.node(name)).parameters)[parameter]

    def unused(self) -> dict[str, list[str]]:
        """The unused input tensors as ``model:tensor``, by reason."""
        found: dict[str, list[str]] = {}
        for unused in self.found.unused:
            found.setdefault(unused.reason, []).extend(f"{unused.model}:{name}" for name in unused.tensors)
        return found

    def check_usage(self) -> None:
        """Assert that every input tensor is either read, or unused for one reason."""
        graph = self.found.graph
        read = {(graph.models[model], name) for model, name in zip(graph.read_models, graph.read_names, strict=True)}
        named = [(unused.model, name) for unused in self.found.unused for name in unused.tensors]
        everything = [(model.name, name) for model in self.found.models for name in model.checkpoint.tensors]
        assert sorted([*read, *named]) == sorted(everything)
        assert all(unused.reason for unused in self.found.unused)
        assert len(set(self.names)) == len(self.names)


def build(recipe: Mapping[str, object], models: Mapping[str, Checkpoint], *, seed: int = 0) -> Built:
    """Build the graph of a recipe with these checkpoints as models."""
    methods = merge_methods()
    loaded = load_recipe(recipe, methods=methods)
    found = Built(build_graph(loaded, loaded.output, methods, lambda ref: models[ref.text], seed=seed))
    found.check_usage()
    return found


def complete(method: str, *models: str, base: str | None = None, **more: object) -> dict[str, object]:
    """A recipe of complete models."""
    known = {parameter.name for parameter in merge_methods()[method].parameters}
    parameters = {name: value for name, value in {"weight": 1, "t": 0.5}.items() if name in known}
    recipe: dict[str, object] = {"merge_method": method, "models": [{"model": model} for model in models]}
    return recipe | {"parameters": parameters} | ({"base_model": base} if base else {}) | more


def stacked(*parts: tuple[str, int, int], **more: object) -> dict[str, object]:
    """A recipe that stacks layers."""
    slices = [{"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in parts]
    return {"merge_method": "passthrough", "slices": slices, **more}


def pair(first: Shapes, second: Shapes, **dtypes: Any) -> dict[str, Checkpoint]:
    """Models ``a`` and ``b``."""
    return {"a": checkpoint("a", first, **dtypes), "b": checkpoint("b", second, **dtypes)}
