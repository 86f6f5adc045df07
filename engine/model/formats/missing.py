"""The errors for codes whose scales are missing."""

from __future__ import annotations

import re
from collections.abc import Collection

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint

_SCALE = re.compile(r"scale|absmax|zero|quant", re.IGNORECASE)
"""Words in the names of tensors that can be scales."""
_OF_ACTIVATIONS = re.compile(r"(?:^|_)(?:input|activation|output|act|k|v|q)_|_act$|_ub$")
"""Parts of the names of scales that are not those of weights."""
_ENDINGS = re.compile(r"_scale(?:_inv|s)?$")


def refuse_missing_scales(checkpoint: Checkpoint, siblings: Collection[str], name: str, scale: str, key: str) -> None:
    """Raise CheckpointError if nothing in the module of some codes can be their scales.

    Scales under a name that mergeloom does not know are not an error: such codes are not decoded, and can be copied.

    Args:
        checkpoint: the checkpoint.
        siblings: last components of the names in the module of the codes.
        name: name of the codes, of which no scales were found.
        scale: name under which they are expected.
        key: key of config.json by which the codes have scales.
    """
    own = name.rpartition(".")[2]
    if not any(_may_be_scale(last, own, siblings) for last in siblings):
        raise missing(checkpoint, name, scale, key)


def missing(checkpoint: Checkpoint, name: str, scale: str, key: str) -> CheckpointError:
    """Return the error for codes without scales. The arguments are those of `refuse_missing_scales`."""
    ref = checkpoint.tensors[name]
    return CheckpointError(
        f"{checkpoint.path}: {name} ({ref.dtype.name} of shape {list(ref.shape)}) is quantized by config.json ({key}), "
        f"but its scales are missing: expected {scale}. Download the model again"
    )


def _may_be_scale(last: str, own: str, siblings: Collection[str]) -> bool:
    """Whether a tensor next to codes can be their scales: it is not those of activations, or of other codes."""
    if last == own or not _SCALE.search(last) or _OF_ACTIVATIONS.search(last):
        return False
    return _ENDINGS.sub("", last) not in siblings
