"""The names and the metadata of the files with the weights, which depend on the programs that load them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...io.checkpoint.checkpoint import Checkpoint

_OF_DONOR = re.compile(
    r"modelspec\.(?:hash_sha256|date|thumbnail|title|merged_from|predecessor)|sshs_\w*hash|sd_merge_\w+"
)
"""Keys of metadata that are true for the donor's own bytes only: hashes, name, date, picture, an earlier merge."""


def weights_stem(config: Mapping[str, Any] | None) -> str:
    """The beginning of the names of the weights: diffusers looks for other names than transformers.

    Args:
        config: content of the output's config.json, or None.
    """
    return "diffusion_pytorch_model" if config is not None and "_class_name" in config else "model"


def output_metadata(donor: Checkpoint) -> dict[str, str]:
    """The ``__metadata__`` of an output whose donor is a single file: the donor's, without what is not true any more.

    Args:
        donor: the checkpoint that names the output's tensors.
    """
    kept = {key: value for key, value in donor.metadata.items() if not _OF_DONOR.fullmatch(key)}
    return {"format": "pt"} | kept
