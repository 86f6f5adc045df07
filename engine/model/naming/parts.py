"""Maps the names of a model's tensors to the donor's, for a part that has another prefix in each of the two models.

A text model has ``model.layers`` and ``model.norm.weight``. As a part of a vision-language model, it has
``model.language_model.layers`` and ``model.language_model.norm.weight``, or ``language_model.model.layers``. The
prefixes follow from the stacks of layers that were found in both models; no other names are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..inputs import Model
from ..layers import Stack
from ..roles import is_head, is_side_module

PROJECTOR_NAME = re.compile(r"(?<![a-z])(?:projector|connector|aligner|merger|resampler)(?![a-z])")
"""The word in the name of a projector between a vision encoder and a text model."""


class AmbiguousNames(ValueError):
    """The tensors of two models can't be matched by the prefixes of their layers."""


@dataclass(frozen=True, slots=True)
class _Change:
    """A prefix of a model's names and the one that the donor has instead."""

    own: str
    donor: str

    def __call__(self, name: str) -> str | None:
        return self.donor + name[len(self.own) :] if name.startswith(self.own) else None


def match_part(donor: Model, stack: Stack, model: Model, own: Stack) -> Mapping[str, str]:
    """Match the tensors outside the main layers of one part of a model with those of the donor.

    Args:
        donor: the model that names the output's tensors.
        stack: the layers of the part in the donor.
        model: the other model.
        own: the layers of the part in the other model.

    Returns:
        The names in the model by the donor's names for them, in the order of the model. Tensors of other parts of the
        model are left out.

    Raises:
        AmbiguousNames: two tensors would be the same one of the donor.
    """
    change = prefix_change(own.prefix, stack.prefix) or _Change("", "")
    heads = _match_heads(donor, stack, model, own, change)
    only_text = own in model.layers.mains and len(donor.layers.parts) == 1 < len(model.layers.parts)
    found: dict[str, str] = {}
    for name in model.non_layer:
        owner = model.layers.owner(name)
        if owner is not None and owner != own:
            continue
        if only_text and name not in donor.tensors and _is_side(name.removeprefix(change.own)):
            continue  # a projector next to the text model, say
        new = next((head(name) for head in heads if name.startswith(head.own)), None) or change(name) or name
        other = found.setdefault(new, name)
        if other != name:
            raise AmbiguousNames(f"both {other} and {name} of {model.name} would be {new} of {donor.name}")
    return found


def prefix_change(own: str, donor: str) -> _Change | None:
    """The prefixes in which two stacks differ: without the components at the end that they have in common.

    None if not even the last components are the same, such as ``model.layers`` and ``transformer.h``.
    """
    ours, theirs = own.split("."), donor.split(".")
    same = 0
    while same < min(len(ours), len(theirs)) and ours[-1 - same] == theirs[-1 - same]:
        same += 1
    if not same:
        return None
    return _Change(_beginning(ours[: len(ours) - same]), _beginning(theirs[: len(theirs) - same]))


def _beginning(components: Iterable[str]) -> str:
    return "".join(f"{each}." for each in components)


def _is_side(rest: str) -> bool:
    return is_side_module(rest) or PROJECTOR_NAME.search(rest) is not None


def _match_heads(donor: Model, stack: Stack, model: Model, own: Stack, change: _Change) -> list[_Change]:
    """The modules of a model's head, as changes of their prefixes: a head can be next to the part, not inside."""
    if own not in model.layers.mains:
        return []
    ours, theirs = _heads(model, own), _heads(donor, stack)
    changes = []
    for head in ours:
        wanted = change(head) or head
        if len(ours) == 1 and len(theirs) == 1:
            wanted = theirs[0]
        elif wanted not in theirs and head in theirs:
            wanted = head
        elif not theirs and change(head) is None and head.count(".") > 1 and change.own != change.donor:
            raise AmbiguousNames(f"{donor.name} has no head, so it is unclear what {head} of {model.name} would be")
        changes.append(_Change(head.removesuffix("weight"), wanted.removesuffix("weight")))
    return changes


def _heads(model: Model, stack: Stack) -> list[str]:
    return [name for name in model.non_layer if is_head(name) and model.layers.owner(name) in (None, stack)]
