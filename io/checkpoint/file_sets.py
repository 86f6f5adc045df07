"""Checks by their names that the weight files in a directory are complete and belong together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice

from ...errors import CheckpointError
from ..open_source import quoted

_NUMBER_OF_TOTAL = re.compile(r"(\d{1,9})([-_.])of\2(\d{1,9})", re.IGNORECASE)
_OF_TRAINING = re.compile(r"(?:epochs?|steps?|iters?|iterations?|rounds?|ckpts?|checkpoints?)[-_.]?$", re.IGNORECASE)
"""What precedes the number of a checkpoint from a training run: ``step-100-of-500`` is complete."""
_SHOWN = 4

SINGLE = "model.safetensors"
"""The weights of a model that is not sharded."""
ONLY_FILES = (SINGLE, "diffusion_pytorch_model.safetensors")
"""Names of the weights of a model that is not sharded, for transformers and diffusers, which ignore all other files."""
_WITH_CONFIG = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(?:fp|bf)\d+)?\.safetensors|pytorch_model\.bin")
"""Names of files that belong to the config.json next to them: those of `ONLY_FILES`, their variants, and PyTorch's."""
ADAPTER = "adapter_model"
"""Prefix of the files of a PEFT adapter."""


def shard_number(name: str) -> tuple[int, int] | None:
    """The number of a shard and the number of shards, as its name states them: ``model-00001-of-00002.safetensors``."""
    match = _find_number(name)
    return None if match is None else (int(match[1]), int(match[3]))


def loaded_with_config(name: str) -> bool:
    """Whether a file has a name under which loaders find the weights of a config.json: the usual ones, and shards."""
    return _WITH_CONFIG.fullmatch(name) is not None or _find_number(name) is not None


def _find_number(name: str) -> re.Match[str] | None:
    """The part of a shard's name with its number and the number of shards: ``00001-of-00002``, ``1_of_2``."""
    match = _NUMBER_OF_TOTAL.search(name)
    return None if match is None or _OF_TRAINING.search(name[: match.start()]) else match


def check_file_set(location: object, names: Sequence[str]) -> list[str]:
    """Check weight files that were found in a directory, without an index that lists them.

    Args:
        location: directory or repository, for messages.
        names: names of all files.

    Returns:
        Warnings for the user: several files are used whose names don't show that they are a complete set.

    Raises:
        CheckpointError: the names state how many files there are, and some are missing or belong to another set.
    """
    sets: dict[tuple[str, str], dict[int, dict[int, str]]] = {}
    for name in names:
        match = _find_number(name)
        if match:
            numbers = sets.setdefault((name[: match.start()], name[match.end() :]), {}).setdefault(int(match[3]), {})
            if int(match[1]) in numbers:
                raise CheckpointError(_describe_mixture(location, (numbers[int(match[1])], name)))
            numbers[int(match[1])] = name
    for (prefix, suffix), totals in sets.items():
        if len(totals) > 1:
            raise CheckpointError(
                _describe_mixture(location, (next(iter(found.values())) for found in totals.values()))
            )
        ((total, found),) = totals.items()
        first = 0 if 0 in found else 1
        missing = (number for number in range(first, first + total) if number not in found)
        examples = list(islice(missing, _SHOWN + 1))
        if examples or len(found) != total:
            raise CheckpointError(_describe_missing(location, found, total, (prefix, suffix), examples))
    if len(names) < 2 or (
        len(sets) == 1 and sum(len(found) for each in sets.values() for found in each.values()) == len(names)
    ):
        return []
    return [
        f"no index lists the files of the model, so {_listed(names)} are all used: make sure that they belong to one "
        "model and that none is missing"
    ]


def unlisted_shards(index: str, shards: Iterable[str]) -> list[str]:
    """Describe the shards that an index does not list, although the names of the others count them.

    Args:
        index: name of the index.
        shards: names of the files that the index lists.
    """
    totals: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in shards:
        match = _find_number(name)
        if match:
            key = name[: match.start()], name[match.end() :], int(match[3])
            totals.setdefault(key, {})[int(match[1])] = name
    return [
        f"{index} lists only {len(found)} of {total} files: {_listed(list(found.values()))}. If the other files have "
        "tensors of the model, they are missing from the merge: download the index and all files again"
        for (_, _, total), found in totals.items()
        if len(found) < total
    ]


def stray_files(index: str | None, ignored: Iterable[str]) -> list[str]:
    """Describe weight files that are not used, although other programs would load them.

    Args:
        index: name of the index, or None for a model without one.
        ignored: names of the .safetensors files that are not used.
    """
    remarks = []
    names = list(ignored)
    if index is not None and SINGLE in names:
        remarks.append(
            f"{SINGLE} is not in {index} and is not used, but transformers loads it instead of the files in the index: "
            "remove the one that is out of date"
        )
    adapters = [name for name in names if name.startswith(ADAPTER)]
    if adapters:
        remarks.append(
            f"{_listed(adapters)} is an adapter, which is not applied, but transformers applies it when it loads the "
            "model: remove the adapter if the weights already include it, or else merge it into them first"
        )
    return remarks


def _describe_mixture(location: object, names: Iterable[str]) -> str:
    return (
        f"{location}: has files of different sets, and no index says which ones to use: {_listed(list(names))}: "
        "remove the files of the older version"
    )


def _describe_missing(
    location: object, found: dict[int, str], total: int, affixes: tuple[str, str], missing: Sequence[int]
) -> str:
    some = next(iter(found.values()))
    if not missing:
        return f"{location}: has {len(found)} files like {quoted(some)}, which states {total}: download the model again"
    match = _find_number(some)
    assert match is not None
    width = len(match[1]) if match[1].startswith("0") else 1
    middle = f"{some[match.end(1) : match.start(3)]}{match[3]}"
    names = [f"{affixes[0]}{number:0{width}}{middle}{affixes[1]}" for number in missing]
    more = " and others" if len(names) > _SHOWN else ""
    return (
        f"{location}: has no index, and {quoted(some)} is one of {total} files, of which only {len(found)} exist: "
        f"{_listed(names[:_SHOWN])}{more} missing: download the missing files (`hf download` resumes)"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(quoted(name) for name in names[:_SHOWN]) + more
