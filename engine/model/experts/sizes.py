"""The sizes of experts by config.json, and the check that stored tensors have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import CheckpointError
from ....io.tensors.dtypes import DType
from ....io.tensors.refs import TensorRef
from .layouts import EXPERT_COUNTS, ExpertLayout, text_config_of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """The sizes of the experts of a model.

    Args:
        experts: number of experts of a layer.
        rows: rows of the gate and the up projection of one expert.
        hidden: hidden size.
    """

    experts: int
    rows: int
    hidden: int

    def separate(self, role: str, *, bias: bool) -> Shape:
        """Return the shape of a separate projection, or of its bias.

        Args:
            role: ``gate``, ``up`` or ``down``.
            bias: whether the bias is meant.
        """
        out, into = (self.hidden, self.rows) if role == "down" else (self.rows, self.hidden)
        return (out,) if bias else (out, into)

    def fused(self, layout: ExpertLayout, role: str, *, bias: bool) -> Shape:
        """Return the shape of a fused tensor, as `separate`; its role is ``gate_up`` or ``down``."""
        out, into = (self.hidden, self.rows) if role == "down" else (2 * self.rows, self.hidden)
        if bias:
            return self.experts, out
        return (self.experts, into, out) if layout.transposed else (self.experts, out, into)


def expert_sizes(name: str, config: Mapping[str, Any] | None, layout: ExpertLayout) -> ExpertSizes:
    """Read the sizes of a model's experts from its config.json.

    Args:
        name: name of the model, for errors.
        config: content of config.json.
        layout: layout of the model's architecture.

    Raises:
        CheckpointError: a size is missing or contradictory.
    """
    found = text_config_of(config)
    counts = {key: found[key] for key in EXPERT_COUNTS if found.get(key) is not None}
    if len(set(map(str, counts.values()))) > 1:
        raise CheckpointError(f"{name}: config.json gives several numbers of experts: {counts}: remove the wrong one")
    count_key = next(iter(counts), " or ".join(EXPERT_COUNTS))
    experts, rows, hidden = (_size(name, found, key) for key in (count_key, layout.intermediate, "hidden_size"))
    return ExpertSizes(experts, rows, hidden)


def _size(name: str, config: Mapping[str, Any], key: str) -> int:
    """Return a size in config.json. Raises CheckpointError."""
    value = config.get(key)
    if type(value) is not int or value < 1:
        problem = f"has no {key}" if value is None else f"has {key} {value!r}"
        raise CheckpointError(
            f"{name}: config.json {problem}, which is needed to rearrange its experts: add the correct value"
        )
    return value


def check_tensor(model: str, name: str, ref: TensorRef, shape: Shape, dtype: DType) -> None:
    """Check that a tensor of experts has the shape that config.json gives, and the dtype of the others.

    Raises:
        CheckpointError: it has not, or it is quantized.
    """
    if not ref.dtype.is_wide_float:
        raise CheckpointError(
            f"tensor {name} of {model} is {ref.dtype.name}: quantized experts can't be rearranged into the layout of "
            f"another model: use a bfloat16 version of {model}"
        )
    if ref.shape != shape:
        raise CheckpointError(
            f"tensor {name} of {model} has shape {list(ref.shape)}, but config.json and the layout of its architecture "
            f"give {list(shape)}: the experts are stored in another layout, which can't be determined; convert the "
            "model with transformers (from_pretrained, then save_pretrained)"
        )
    if ref.dtype != dtype:
        raise CheckpointError(
            f"tensor {name} of {model} is {ref.dtype.name}, but others of these experts are {dtype.name}: a fused "
            "tensor has one dtype; convert the model to one dtype, or use it as base_model"
        )
