"""Explains why the tensors of two models don't match: another quantization, or other names for the same tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ....errors import CheckpointError
from ....io.units import listed, plural
from ..contents.diffusion import architecture_of, family_of
from ..inputs import Model
from ..roles import is_vision
from .formats import format_name, unquantized
from .names import Renaming, find_leftovers, find_renaming, rename_script, shortest_prefixes


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
    families = [family_of(model.checkpoint.tensors, model.checkpoint.config) for model in error.models]
    if all(families) and families[0] != families[1]:  # their text encoders have similar names
        return _different_types(error) or error
    names, others = first.tensors, second.tensors
    renamings = [(first, second, find_renaming(names, others)), (second, first, find_renaming(others, names))]
    larger = max(len(names), len(others))
    # models of two architectures have similar names, too: advice to rename would be wrong for them
    found = [(m, o, renaming) for m, o, renaming in renamings if renaming and 4 * renaming.matches >= 3 * larger]
    if not found:
        return _different_types(error) or error
    model, other, renaming = min(found, key=lambda item: (-item[2].matches, item[2].cost))
    equal = sum(name in other.tensors for name in model.tensors)
    left, script = _leftovers(model, other, renaming)
    return CheckpointError(
        f"{model.name} and {other.name} have different names for the same tensors: only {equal} of the "
        f"{plural(renaming.total, 'tensor')} of {model.name} {'is' if equal == 1 else 'are'} in {other.name}, but "
        f"{renaming}, {renaming.matches} would be. {left}Rename them in a copy of {model.name}, and use that:\n\n"
        f"{script}\n\nThe first difference: {error}"
    )


def _different_types(error: TensorMismatch) -> CheckpointError | None:
    """The error for models of different architectures by config.json or names; None if they may be of the same."""
    first, second = error.models
    types = [(model.checkpoint.config or {}).get("model_type") for model in (first, second)]
    source = "their model_type"
    if None in types:
        types = [architecture_of(model.checkpoint.tensors, model.checkpoint.config) for model in (first, second)]
        source = "their tensor names"
    if not all(isinstance(name, str) and name for name in types):
        return None
    short, long = sorted(map(str, types), key=len)
    if long.startswith(short):  # equal, or a text model and the model that it is a part of
        return None
    name = re.match(r"tensor (\S+?):? ", str(error))
    return CheckpointError(
        f"{first.name} and {second.name} are of different architectures, by {source}: {types[0]} and "
        f"{types[1]}. Merge models of one architecture{f' (the first different tensor is {name[1]})' if name else ''}"
    )


def _leftovers(model: Model, other: Model, renaming: Renaming) -> tuple[str, str]:
    """Describe the tensors that only one of two models has, and write the script that renames and leaves them out.

    Args:
        model: the model to rename.
        other: the other model.
        renaming: the renaming.
    """
    names = {renaming(name): name for name in model.tensors}
    others = other.tensors
    own, foreign = find_leftovers(names, others), find_leftovers(others, names.keys())
    # models with different numbers of layers, or with a vision tower, need another recipe
    if any(is_vision(name) or any(map(str.isdigit, name.split("."))) for name in (*own, *foreign)):
        own, foreign = [], []
    drop = shortest_prefixes((names[name] for name in own), set(names.values()) - {names[name] for name in own})
    script = rename_script(model.checkpoint, renaming.expression, drop)
    text = ""
    for owner, only, lacking in ((model, [names[name] for name in own], other), (other, foreign, model)):
        if only:
            text += f"{owner.name} has {plural(len(only), 'tensor')} that {lacking.name} lacks ({listed(only)}). "
    if foreign:
        drop = shortest_prefixes(foreign, set(others) - set(foreign))
        script += f"\n\n    # leave out what only {other.name} has\n" + rename_script(other.checkpoint, "name", drop)
        text += "The scripts leave out what only one model has; use both new directories. "
    elif own:
        text += "The script leaves out what only one model has. "
    return text, script


def _describe_formats(models: Sequence[Model], formats: Sequence[str | None]) -> str:
    """Describe two models of which at least one is quantized."""
    parts = []
    advice = []
    for model, label in zip(models, formats, strict=True):
        if label is None:
            parts.append(f"{model.name} is not quantized")
            continue
        name = next(iter(model.quantized))
        parts.append(f"{model.name} is quantized ({label}; tensor {name}: {model.quantized[name]})")
        advice.append(f"for {model.name}, {unquantized(model.reference.text, model.checkpoint)}")
    return (
        f"{' and '.join(parts)}: their tensors can't be combined, and dequantization is not supported yet; "
        f"{'; '.join(advice)}"
    )
