"""Pairs the tensors of two models by name, and rejects models whose values can't be computed from what they store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.open_source import quoted
from ....io.tensors.refs import TensorRef
from ....io.units import plural
from ....methods.kernel.fused.formats import STORED
from ...model.adapters.loaded import Adapter
from ...model.adapters.values import with_adapters
from ...model.checks.identify import check_is_model
from ...model.formats.registry import tensors_of, unknown_quantized
from ...model.layers import LayerMap, find_layers
from ...model.logical import LogicalTensor, Tensors
from ...model.roles import is_embedding, is_head, tied_embedding
from .computed import ComputedTensor, ComputedTensors
from .result import NotCompared
from .values import can_decode

_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,5})(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Opened:
    """A model to compare.

    Args:
        name: name as the user gave it.
        checkpoint: the model's checkpoint.
        adapters: adapters that are applied to it.
    """

    name: str
    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...] = ()

    @property
    def base(self) -> str:
        """The name without the adapters."""
        added = "".join(f"+{adapter.name}" for adapter in self.adapters)
        return self.name.removesuffix(added)

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that its values are computed from."""
        return self.checkpoint, *(adapter.checkpoint for adapter in self.adapters)


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor that both models have.

    Args:
        name: name of the tensor.
        stack: prefix of the layers that contain the tensor; empty outside of layers.
        layer: number of the layer; None outside of layers.
        a: tensor of A.
        b: tensor of B.
        tied_to: for a head that one model lacks, name of the embedding that it is tied to there; otherwise empty.
    """

    name: str
    stack: str
    layer: int | None
    a: TensorRef | ComputedTensor
    b: TensorRef | ComputedTensor
    tied_to: str = ""


@dataclass(frozen=True, slots=True)
class Pairing:
    """The tensors of two models: pairs to compare, and all others.

    Args:
        pairs: tensors that both models have.
        only_in_a: names of the tensors that only A has.
        only_in_b: names of the tensors that only B has.
        not_compared: tensors of both models that can't be compared.
        computed: tensors in `pairs` that are not stored as they are.
    """

    pairs: tuple[Pair, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    not_compared: tuple[NotCompared, ...]
    computed: ComputedTensors


def pair_tensors(a: Opened, b: Opened) -> Pairing:
    """Pair the tensors of two models by name. A head that one model ties to its embedding is paired with that.

    Raises:
        CheckpointError: a model is quantized in an unknown format or an adapter, or the models have no tensor name in
            common.
    """
    ours, theirs = (_tensors(model) for model in (a, b))
    found = [(name, ours[name], theirs[name], "") for name in ours if name in theirs]
    if not found:
        raise CheckpointError(
            f"{a.name} and {b.name} have no tensor name in common ({a.name} has {quoted(next(iter(ours)))}, {b.name} "
            f"has {quoted(next(iter(theirs)))}): choose two models of the same architecture"
        )
    for head, embedding in _tied_heads(ours, theirs, b.checkpoint):
        found.append((head, ours[head], theirs[embedding], embedding))
    for head, embedding in _tied_heads(theirs, ours, a.checkpoint):
        found.append((head, ours[embedding], theirs[head], embedding))
    locate = _Layers(a, ours)
    owners = dict.fromkeys(adapter.reference for model in (a, b) for adapter in model.adapters)
    computed = ComputedTensors((a.name, b.name), tuple(owners))
    pairs, not_compared = [], []
    for name, one, other, tied_to in found:
        views = [side for side, model in (("A", a), ("B", b)) if name in model.checkpoint.views]
        if reason := f"not contiguous in {views[0]}" if views else _obstacle(one, other):
            not_compared.append(NotCompared(name, reason))
        else:
            pairs.append(Pair(name, *locate(name), computed.add(0, one), computed.add(1, other), tied_to))
    names = {name for name, *_ in found}
    return Pairing(
        tuple(pairs),
        tuple(name for name in ours if name not in names),
        tuple(name for name in theirs if name not in names),
        tuple(not_compared),
        computed,
    )


def _tensors(model: Opened) -> Tensors:
    """The tensors of a model. Raises CheckpointError if it is not a model, or quantized in an unknown format."""
    check_is_model(model.name, model.checkpoint)
    tensors = tensors_of(model.checkpoint)
    quantized = unknown_quantized(model.checkpoint, tensors)
    if quantized:
        name, reason = next(iter(quantized.items()))
        raise CheckpointError(
            f"{model.name} is quantized: {plural(len(quantized), 'tensor')} ({quoted(name)}: {reason}); comparing "
            "quantized models is not supported yet: use a bfloat16 version of the model"
        )
    return with_adapters(model.name, model.checkpoint, tensors, model.adapters) if model.adapters else tensors


def _obstacle(a: TensorRef | LogicalTensor, b: TensorRef | LogicalTensor) -> str:
    """Return why two tensors can't be compared; empty if they can."""
    if a.shape != b.shape:
        return f"shape {list(a.shape)} in A, {list(b.shape)} in B"
    if not _has_values(a) or not _has_values(b):
        return f"dtype {a.dtype.name} in A, {b.dtype.name} in B"
    return ""


def _has_values(tensor: TensorRef | LogicalTensor) -> bool:
    """Whether the values of a tensor are numbers that float64 can hold."""
    if isinstance(tensor, TensorRef):
        return can_decode(tensor.dtype)
    if tensor.picked:
        return can_decode(tensor.parts[0].ref.dtype)
    return tensor.decode is not None or tensor.parts[0].ref.dtype.name in STORED


def _tied_heads(tensors: Iterable[str], others: Tensors, other: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield each head that another model lacks because it is tied to an embedding there, with that embedding."""
    if _is_untied(other.config or {}):
        return
    embeddings = [name for name in others if is_embedding(name)]
    for name in tensors:
        if is_head(name) and name not in others:
            embedding = tied_embedding(name, embeddings)
            if embedding is not None:
                yield name, embedding


def _is_untied(config: Mapping[str, Any]) -> bool:
    """Whether a config, or one nested in it, says that the head is not tied to the embedding."""
    if config.get("tie_word_embeddings") is False:
        return True
    return any(
        _is_untied(value) for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)
    )


class _Layers:
    """Finds the layer of a tensor by its name, in any stack of layers of a model."""

    def __init__(self, model: Opened, tensors: Tensors) -> None:
        try:
            layers = find_layers(tensors, model.checkpoint.config)
        except CheckpointError:  # the values can be compared without
            layers = LayerMap((), ())
        self._stacks = {stack.prefix for stack in layers.stacks if stack in layers.mains or stack.count > 1}

    def __call__(self, name: str) -> tuple[str, int | None]:
        """The prefix of the stack and the number of the layer; ("", None) outside of layers."""
        for match in _NUMBER.finditer(name):
            prefix = name[: match.start()]
            if prefix in self._stacks:
                return prefix, int(match[1])
        return "", None
