"""Sorts the tensors of an adapter by the modules that they change.

Names as PEFT saves them, after ``base_model.model.``: the module's path in the model at the time of training, and then

    .lora_A.weight [rank, in]           .lora_B.weight [out, rank]          .lora_B.bias [out]
    .lora_embedding_A [rank, rows]      .lora_embedding_B [columns, rank]   .lora_magnitude_vector [out]
    .token_adapter.trainable_tokens_delta [tokens, columns]

All other names are those of tensors that the adapter has its own copy of: modules_to_save, biases, and embeddings that
were saved with it. A wrapped module has its own tensors in ``.base_layer``, and in ``.token_adapter.base_layer`` if
rows are trained. Where embeddings were resized, PEFT saves a trained copy twice, once with ``.modules_to_save``, and
next to it the values before the training, as ``.original_module``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ....errors import CheckpointError
from ....io.tensors.refs import TensorRef

PREFIX = "base_model.model."
"""Beginning of the names of tensors in a PEFT adapter."""
A, B = "lora_A.weight", "lora_B.weight"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
WRAPPED = ".base_layer"
"""End of the path of a module that is wrapped: that of the inner one of two adapted parameters, for example."""
TOKENS = "token_adapter.trainable_tokens_delta"
_BASE_LAYERS = (".token_adapter.base_layer.", ".base_layer.")
_COPY, _ORIGINAL = ".modules_to_save.", ".original_module."
_ROLES = (A, B, BIAS, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, TOKENS)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of an adapter: its name in the file, and where it is."""

    name: str
    ref: TensorRef


@dataclass(slots=True)
class AdapterTensors:
    """The tensors of an adapter.

    Args:
        modules: for each changed module, its tensors by role, such as `A`. The path of a module with several adapted
            parameters has ``.base_layer`` at its end, once for each parameter but the last.
        replaced: copies of tensors of the model, by their names at the time of training.
    """

    modules: dict[str, dict[str, Stored]] = field(default_factory=dict)
    replaced: dict[str, Stored] = field(default_factory=dict)


def sort_tensors(adapter: str, tensors: Mapping[str, TensorRef]) -> AdapterTensors:
    """Sort the tensors of an adapter by what they change.

    Args:
        adapter: name of the adapter, for errors.
        tensors: its tensors by name.

    Raises:
        CheckpointError: a tensor is quantized or of an unknown kind, or there are two of the same.
    """
    found = AdapterTensors()
    for stored, ref in tensors.items():
        if not ref.dtype.is_wide_float:
            raise CheckpointError(
                f"{adapter}: tensor {stored} is {ref.dtype.name}: quantized adapters can't be applied; use the adapter "
                "as it was before it was quantized"
            )
        if _ORIGINAL in stored or (_COPY in stored and stored.replace(_COPY, ".") in tensors):
            continue
        name = stored.removeprefix(PREFIX)
        module, role = _role(name)
        if role:
            known = found.modules.setdefault(module, {}).setdefault(role, Stored(stored, ref))
        elif unknown := next((part for part in name.split(".") if part.startswith("lora_")), None):
            raise CheckpointError(
                f"{adapter}: tensor {stored} is not one of a LoRA adapter of PEFT ({unknown}): its meaning is unknown"
            )
        else:
            for wrapped in (*_BASE_LAYERS, _COPY):
                name = name.replace(wrapped, ".")
            known = found.replaced.setdefault(name, Stored(stored, ref))
        if known.name != stored:
            raise CheckpointError(f"{adapter}: tensors {known.name} and {stored} are the same one of a module")
    return found


def _role(name: str) -> tuple[str, str]:
    """The module and the role of a tensor; ("", "") for a copy of one of the model's."""
    name = name.removesuffix(".weight") if name.endswith(f".{MAGNITUDE}.weight") else name
    for role in _ROLES:
        if name.endswith(f".{role}"):
            return name[: -len(role) - 1], role
    return "", ""
