"""Presents the experts of a model in the layout of the donor, which decides the layout of the output.

Fused experts become separate ones, which are ranges of the fused tensors, and separate experts become fused ones, whose
bytes are assembled from them. Where a layout is transposed, an access turns them. No data is read or copied for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from sys import intern
from typing import NamedTuple

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.tensors.refs import TensorRef
from ....io.tensors.table import TensorTable
from ..logical import ArrangedTensors, LogicalTensor
from .fuse_experts import fused_tensors
from .layouts import LAYOUTS, ExpertLayout, text_config_of
from .separate_experts import separate_tensors
from .sizes import expert_sizes
from .storage import ExpertStorage, share_names, storage_of


class NamedCheckpoint(NamedTuple):
    """A checkpoint with its name in the recipe."""

    name: str
    checkpoint: Checkpoint


class Mapped(NamedTuple):
    """A checkpoint in the layout of another one.

    Args:
        checkpoint: the checkpoint, with tensors under the names that they have in the layout.
        note: what was rearranged, for display; empty if nothing.
    """

    checkpoint: Checkpoint
    note: str = ""


def in_layout_of(donor: NamedCheckpoint, other: NamedCheckpoint) -> Mapped:
    """Return a checkpoint with its experts in the layout of the donor: itself if it has that layout.

    Args:
        donor: the checkpoint whose layout the output has.
        other: the checkpoint to return.

    Raises:
        CheckpointError: the layouts differ, and names and config.json don't determine how, or an expert is missing.
    """
    ours, theirs = donor.checkpoint.tensors, other.checkpoint.tensors
    if ours is theirs or share_names(ours, theirs):
        return Mapped(other.checkpoint)
    target, own = storage_of(ours), storage_of(theirs)
    to_separate = _differing(own.fused, target.separate, target.fused)
    to_fused = _differing(own.separate, target.fused, target.separate)
    if not to_separate and not to_fused:
        return Mapped(other.checkpoint)
    layout = _layout(donor, target, other, own)
    if not other.checkpoint.files:
        raise CheckpointError(
            f"{_difference(donor, target, other, own)}: {other.name} is a stage, whose output can't be rearranged; "
            f"set base_model of the stage to a model that stores its experts like {donor.name}"
        )
    sizes = expert_sizes(other.name, other.checkpoint.config, layout)
    tensors: Mapping[str, TensorRef] = theirs
    values: list[LogicalTensor] = []
    if to_separate:
        tensors, values = separate_tensors(other.name, tensors, to_separate, layout, sizes)
    if to_fused:
        tensors, added = fused_tensors(other.name, tensors, to_fused, layout, sizes)
        values += added
    lost = next((name for name in other.checkpoint.views if name not in tensors), None)
    if lost is not None:
        raise CheckpointError(
            f"{_difference(donor, target, other, own)}: tensor {lost} of {other.name} is not contiguous, so it "
            "can't be rearranged: call .contiguous() on it and save the model again"
        )
    if values:
        tensors = ArrangedTensors(tensors)
        tensors.found = tuple(values)
    else:  # a table takes less memory
        tensors = TensorTable.of({intern(name): ref for name, ref in tensors.items()})
    forms = [form for form, owners in (("fused", to_separate), ("separate", to_fused)) if owners]
    note = f"{' and '.join(forms)} experts, merged in the layout of {donor.name}"
    return Mapped(replace(other.checkpoint, tensors=tensors), note)


def _differing(own: Mapping[str, str], other_form: Mapping[str, str], same_form: Mapping[str, str]) -> set[str]:
    """Return the owners of experts that the donor stores in the other form.

    Args:
        own: owners in one form, in the model.
        other_form: owners in the other form, in the donor.
        same_form: owners in the same form, in the donor.
    """
    if not other_form:
        return set()
    # a layer that the donor lacks, as a deeper model has it, is stored like the donor's others
    return {owner for owner in own if owner not in same_form and (owner in other_form or not same_form)}


def _layout(donor: NamedCheckpoint, target: ExpertStorage, other: NamedCheckpoint, own: ExpertStorage) -> ExpertLayout:
    """Return the layout of the architecture of both models. Raises CheckpointError."""
    difference = _difference(donor, target, other, own)
    types = [text_config_of(each.checkpoint.config).get("model_type") for each in (donor, other)]
    advice = "convert one of them to the layout of the other with transformers (from_pretrained, then save_pretrained)"
    found = []
    for each, kind in zip((donor, other), types, strict=True):
        if each.checkpoint.config is None:
            raise CheckpointError(
                f"{difference}: {each.name} has no config.json, whose model_type determines the order and orientation "
                f"of fused experts; add it, or {advice}"
            )
        layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
        if layout is None:
            raise CheckpointError(
                f"{difference}: the order and orientation of fused experts follow from the architecture, and "
                f"mergeloom doesn't know those of model_type {kind!r} in the config.json of {each.name}; {advice}"
            )
        found.append(layout)
    if found[0] != found[1]:
        raise CheckpointError(
            f"{difference}: model_type is {types[0]!r} in {donor.name} and {types[1]!r} in {other.name}, whose layouts "
            "differ; choose models of one architecture"
        )
    return found[1]


def _difference(donor: NamedCheckpoint, target: ExpertStorage, other: NamedCheckpoint, own: ExpertStorage) -> str:
    def described(model: NamedCheckpoint, storage: ExpertStorage) -> str:
        form, names = ("fused", storage.fused) if storage.fused else ("separately", storage.separate)
        return f"{model.name} stores experts {form} ({next(iter(names.values()))})"

    return f"{described(other, own)}, but {described(donor, target)}"
