"""The output of a merge of single files: one file of weights with the donor's metadata, and no config.json."""

from __future__ import annotations

import re

from ...io.checkpoint.checkpoint import Checkpoint

_OF_DONOR = re.compile(
    r"modelspec\.(?:hash_sha256|date|thumbnail|title|merged_from|predecessor)|sshs_\w*hash|sd_merge_\w+"
)
"""Keys of metadata that are true for the donor's own bytes only: hashes, name, date, picture, an earlier merge."""


def output_metadata(donor: Checkpoint) -> dict[str, str]:
    """The ``__metadata__`` of an output whose donor is a single file: the donor's, without what is not true any more.

    Args:
        donor: the checkpoint that names the output's tensors.
    """
    kept = {key: value for key, value in donor.metadata.items() if not _OF_DONOR.fullmatch(key)}
    return {"format": "pt"} | kept
