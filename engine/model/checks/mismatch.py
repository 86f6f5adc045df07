"""Explains why the tensors of two models don't match: another quantization, or other names for the same tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ....errors import CheckpointError
from ....io.units import listed, plural
from ..contents.diffusion import architecture_of, family_of
from ..inputs import Model
from ..logical import codes_of
from ..roles import is_vision
from .formats import format_name, unquantized
from .names import Renaming, find_leftovers, find_renaming, rename_entry, rename_script, shortest_prefixes


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


def explain_mismatch(
    error: TensorMismatch, donor_names: Callable[[Model], Mapping[str, str]] | None = None
) -> CheckpointError:
    """The error to raise instead: it names the common cause if many tensors don't match, or else the tensor.

    Args:
        error: the error for one tensor.
        donor_names: function that returns the names of a model's tensors by the donor's names for them, if parts of the
            models were matched by the prefixes of their layers; else None.
    """
    first, second = error.models
    formats = [format_name(m.checkpoint, m.quantized) if m.quantized else None for m in error.models]
    if formats[0] != formats[1]:
        return CheckpointError(_describe_formats(error.models, formats))
    families = [family_of(model.checkpoint.tensors, model.checkpoint.config) for model in error.models]
    if all(families) and families[0] != families[1]:  # their text encoders have similar names
        return _different_types(error) or error
    prefixes = [[stack.prefix for stack in model.layers.mains] for model in error.models]
    if donor_names is not None and prefixes[0] != prefixes[1]:  # complete names differ for this reason
        return _advise_pairs(error, donor_names)
    names, others = first.tensors, second.tensors
    renamings = [(first, second, find_renaming(names, others)), (second, first, find_renaming(others, names))]
    larger = max(len(names), len(others))
    # models of two architectures have similar names, too: advice to rename would be wrong for them
    found = [(m, o, renaming) for m, o, renaming in renamings if renaming and 4 * renaming.matches >= 3 * larger]
    if not found or any(each.checkpoint.stored for each in error.models):  # a recipe renames them already
        return _different_types(error) or error
    model, other, renaming = min(found, key=lambda item: (-item[2].matches, item[2].cost))
    equal = sum(name in other.tensors for name in model.tensors)
    left, script = _leftovers(model, other, renaming)
    advice = f"Rename them in a copy of {model.name}, and use that:\n\n{script}"
    if renaming.entry is not None and not left:
        advice = f"Rename them in the recipe's entry of {model.name}:\n\n    {renaming.entry}"
    return CheckpointError(
        f"{model.name} and {other.name} have different names for the same tensors: only {equal} of the "
        f"{plural(renaming.total, 'tensor')} of {model.name} {'is' if equal == 1 else 'are'} in {other.name}, but "
        f"{renaming}, {renaming.matches} would be. {left}{advice}\n\nThe first difference: {error}"
    )


def require_one_architecture(first: Model, second: Model) -> None:
    """Raise CheckpointError if two models are of different architectures by config.json or by their names."""
    error = _different_types(TensorMismatch("the embeddings differ", first, second))
    if error is not None:
        raise error


def _advise_pairs(error: TensorMismatch, donor_names: Callable[[Model], Mapping[str, str]]) -> CheckpointError:
    """The error with the pairs that give a model the missing names, if there are any, where its parts are matched."""
    for model, other in (error.models, error.models[::-1]):
        names, others = donor_names(model), donor_names(other)
        if all(new == name for new, name in names.items()):
            continue  # the donor, or a model with its names
        rest = [name for name in names if name not in others and names[name] == name]
        renaming = find_renaming(rest, [name for name in others if name not in names])
        if renaming is None or renaming.spellings:
            continue
        changed = {name: renaming(name) for name in rest if renaming(name) in others}
        pairs = sorted({_pair(*item) for item in changed.items()}, key=lambda pair: (-len(pair[0]), pair))
        affected = [name for name in model.tensors if name.startswith(tuple(old for old, _ in pairs))]
        if sorted(affected) != sorted(changed):
            continue
        return CheckpointError(
            f"{error}. {plural(len(changed), 'tensor')} of {model.name} may be the same under another name, such as "
            f"{next(iter(changed))}: if so, write in the recipe's entry of {model.name}:\n\n    {rename_entry(pairs)}"
        )
    return error


def _pair(name: str, new: str) -> tuple[str, str]:
    """The prefixes in which two names differ, with the first component that both have if there is no other."""
    old, other = name.split("."), new.split(".")
    while len(old) > 1 and len(other) > 1 and old[-1] == other[-1]:
        old, other = old[:-1], other[:-1]
    return ".".join((*old, "")), ".".join((*other, ""))


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
            codes = codes_of(model.tensors)
            stored = f"stored in the format {next(iter(codes.values()))}" if codes else "not quantized"
            parts.append(f"{model.name} is {stored}")
            continue
        name = next(iter(model.quantized))
        parts.append(f"{model.name} is quantized ({label}; tensor {name}: {model.quantized[name]})")
        advice.append(f"for {model.name}, {unquantized(model.reference.text, model.checkpoint)}")
    return (
        f"{' and '.join(parts)}: their tensors can't be combined, and dequantization is not supported yet; "
        f"{'; '.join(advice)}"
    )
