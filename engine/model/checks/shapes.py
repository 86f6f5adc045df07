"""Checks that the inputs of an output tensor have the same shape, and explains why they don't."""

from __future__ import annotations

from collections.abc import Sequence

from ..contents.diffusion import INPUT_CONVOLUTION
from ..inputs import Model
from ..roles import is_embedding, is_head
from .mismatch import TensorMismatch


def shape_mismatch(
    name: str, first: Model, first_shape: Sequence[int], second: Model, shape: Sequence[int], key: str = ""
) -> str:
    """The error message for a tensor whose shapes differ between two models.

    Args:
        name: name of the tensor.
        first: the first model.
        first_shape: shape of the tensor in the first model.
        second: the second model.
        shape: shape of the tensor in the second model.
        key: key of `non_layer` that would take the tensor from the first model instead; empty if there is none.
    """
    if len(shape) == len(first_shape) == 2 and shape[1] == first_shape[1] and (is_embedding(name) or is_head(name)):
        return (
            f"tensor {name}: {first.name} has a vocabulary of {first_shape[0]} rows and {second.name} one of "
            f"{shape[0]}: set `tokenizer_source: union` (or base, or a model) to merge embeddings token by token, "
            "which needs the tokenizer files of both"
            + (f"; or take it from {first.name} with `non_layer: {{{key}: {first.name}}}`" if key else "")
        )
    advice = ""
    if INPUT_CONVOLUTION.fullmatch(name) and len(shape) == len(first_shape) == 4:
        more = first if first_shape[1] > shape[1] else second
        advice = (
            "; if one is for inpainting, which has more input channels, copy this tensor from it: "
            f"`tensors_from: [{{filter: {name}, model: {more.name}}}]`"
        )
    return (
        f"tensor {name} has shape {list(first_shape)} in {first.name} and {list(shape)} in {second.name}: only models "
        f"of the same shape can be merged{advice}"
    )


def check_shapes(name: str, inputs: Sequence[tuple[Model, Sequence[int]]]) -> None:
    """Raise TensorMismatch if the models have different shapes of a tensor."""
    first, first_shape = inputs[0]
    for other, shape in inputs[1:]:
        if shape != first_shape:
            raise TensorMismatch(shape_mismatch(name, first, first_shape, other, shape), first, other)
