"""Explains why the tensors of two models don't match: another quantization, or other names for the same tensors."""

from __future__ import annotations

from collections.abc import Sequence

from ....errors import CheckpointError
from ....io.units import plural
from ..inputs import Model
from .formats import format_name, unquantized
from .names import find_renaming, rename_script


class TensorMismatch(CheckpointError):
    """A tensor is missing from a model, or has another shape or dtype than in another model.

    Args:
        message: description of the first tensor for which this is so.
        first: the model that the other one is compared with.
        second: the other model.
    """

    def __init__(self, message: str, first: Model, second: Model) -> None:
        super().__init__(message)
        self.models = (first, second)


def explain_mismatch(error: TensorMismatch) -> CheckpointError:
    """The error to raise instead: it names the common cause if many tensors don't match, or else the tensor."""
    first, second = error.models
    formats = [format_name(m.checkpoint, m.quantized) if m.quantized else None for m in error.models]
    if formats[0] != formats[1]:
        return CheckpointError(_describe_formats(error.models, formats))
    names, others = first.checkpoint.tensors, second.checkpoint.tensors
    renamings = [(first, second, find_renaming(names, others)), (second, first, find_renaming(others, names))]
    larger = max(len(names), len(others))
    # models of two architectures have similar names, too: advice to rename would be wrong for them
    found = [(m, o, renaming) for m, o, renaming in renamings if renaming and 4 * renaming.matches >= 3 * larger]
    if not found:
        return error
    # removing a prefix is simpler than adding one
    model, other, renaming = min(found, key=lambda item: (-item[2].matches, len(item[2].added), len(item[2].prefix)))
    equal = sum(name in other.checkpoint.tensors for name in model.checkpoint.tensors)
    return CheckpointError(
        f"{model.name} and {other.name} have different names for the same tensors: only {equal} of the "
        f"{plural(renaming.total, 'tensor')} of {model.name} {'is' if equal == 1 else 'are'} in {other.name}, but "
        f"{renaming}, {renaming.matches} would be. Rename them in a copy of {model.name}, and use that:\n\n"
        + rename_script(model.checkpoint, renaming.expression)
        + f"\n\nThe first difference: {error}"
    )


def _describe_formats(models: Sequence[Model], formats: Sequence[str | None]) -> str:
    """Describe two models of which at least one is quantized."""
    parts = []
    advice = []
    for model, label in zip(models, formats, strict=True):
        if label is None:
            parts.append(f"{model.name} is not quantized")
            continue
        name = next(iter(model.quantized))
        parts.append(f"{model.name} is quantized ({label}; {name}: {model.quantized[name]})")
        advice.append(f"for {model.name}, {unquantized(model.reference.text, model.checkpoint)}")
    return (
        f"{' and '.join(parts)}: their tensors can't be combined, and dequantization is not supported yet; "
        f"{'; '.join(advice)}"
    )
