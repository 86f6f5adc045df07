"""Looks at the local file system for messages about a recipe: paths that resemble a misspelt one, and layer counts."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_ENTRIES = 2000
"""How many entries of a directory are compared with a misspelt name."""
_MOST_MATCHES = 3
"""How many similar names are followed at each level of a path."""
_SHORTEST_WORD = 4
"""Letters of the shortest word in which a typo is recognized: ``expert-a`` and ``expert-b`` are different names."""


def is_local(path: str) -> bool:
    """Whether a file or directory with this path exists."""
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111  these never raise


def similar_path(path: str, *, typo: bool = False) -> str | None:
    """An existing path that resembles a missing one, or None.

    Args:
        path: the missing path.
        typo: whether only typos within a word count: letters swapped, missing, added or replaced, and other case.
    """
    matches = _is_typo if typo else _is_similar
    anchor, *names = _split(path)
    return next(_walk(anchor, names, matches), None) if names else None


def siblings(path: str) -> tuple[str, tuple[str, ...]] | None:
    """The parent of a missing path and the directories in it; None if it has none or is the current directory."""
    anchor, *names = _split(path)
    parent = os.path.join(anchor, *names[:-1])  # noqa: PTH118  an empty anchor stays empty
    found = tuple(sorted(name for name in _names(parent) if (Path(parent).expanduser() / name).is_dir()))
    return (parent, found) if len(names) > 1 and found else None


def _split(path: str) -> list[str]:
    """The start of a path (empty for the current directory), and its components."""
    parts = Path(path).parts
    if path.startswith("./"):
        return ["./", *parts]
    if parts and (parts[0] in ("~", "..") or Path(path).is_absolute()):
        return [*parts]
    return ["", *parts]


def _walk(start: str, names: list[str], matches: Callable[[str, str], bool]) -> Iterator[str]:
    """Yield existing paths that resemble `start` followed by `names`, the most similar first."""
    if not names:
        # a broken link would be suggested for itself
        if is_local(start) and not _holds_only_directories(start):
            yield start
        return
    name, *rest = names
    exact = os.path.join(start, name)  # noqa: PTH118
    if is_local(exact):
        yield from _walk(exact, rest, matches)
        return

    def distance(other: str) -> float:
        return -difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    similar = sorted((other for other in _names(start) if matches(name, other)), key=distance)
    for other in similar[:_MOST_MATCHES]:
        yield from _walk(os.path.join(start, other), rest, matches)  # noqa: PTH118


def _names(directory: str) -> list[str]:
    """The names in a directory without hidden files; none if it can't be listed."""
    try:
        with os.scandir(os.path.expanduser(directory) or ".") as entries:  # noqa: PTH111
            return [entry.name for entry in islice(entries, _MOST_ENTRIES) if not entry.name.startswith(".")]
    except (OSError, ValueError):
        return []


def _holds_only_directories(path: str) -> bool:
    """Whether a directory holds other directories only, such as those of models, so it is not a model itself."""
    names = _names(path)
    return bool(names) and all((Path(path).expanduser() / name).is_dir() for name in names)


def _is_similar(name: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio() >= 0.7


def _is_typo(name: str, other: str) -> bool:
    """Whether the names have the same words and numbers, except for a typo in words."""
    words, others = (re.findall(r"\d+|[^\W\d_]+", text.lower()) for text in (name, other))
    if len(words) != len(others):
        return False
    return all(
        a == b or (max(len(a), len(b)) >= _SHORTEST_WORD and a.isalpha() and b.isalpha() and _one_edit(a, b))
        for a, b in zip(words, others, strict=True)
    )


def _one_edit(a: str, b: str) -> bool:
    """Whether one letter was added, removed or replaced, or two neighbours were swapped."""
    while a[:1] == b[:1] != "":
        a, b = a[1:], b[1:]
    while a[-1:] == b[-1:] != "":
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b)) <= 1 or (len(a) == len(b) == 2 and a == b[::-1])


def range_problem(first: int, end: int, model: str | None) -> tuple[str, str]:
    """What is wrong with the range of layers from `first` to before `end`, and advice; empty for a valid range.

    Args:
        first: the first layer.
        end: the layer after the last.
        model: path of the model, or None if it is unknown.
    """
    rule = "the second number is the layer after the last"
    if first < 0:
        return "starts before layer 0: layers are numbered from 0", ""
    if end < 0:
        layers = None if model is None else local_layers(model)
        owner = f"all {layers} layers of {model}" if layers else "all layers of a model with 32 layers"
        return f"ends before layer 0: {rule}", f"; for {owner}, write [0, {layers or 32}]"
    if end < first:
        return f"is reversed: {rule}", ""
    if end > first:
        return "", ""
    layers = None if model is None else local_layers(model)
    instead = f"; for layer {first} alone, write [{first}, {first + 1}]" if layers is None or first < layers else ""
    if layers is not None and first < layers:
        return f"is empty{instead}", f": {rule}"
    outside = "to take only tensors outside the layers from this model, remove the slice and set "
    outside += f"`non_layer: {{head: {model or 'MODEL'}}}`; other keys there are `norm` and `embeddings`"
    return f"is empty{instead}", f": {rule}; {outside}"


def local_layers(path: str) -> int | None:
    """The number of layers by config.json, or None if the directory or the number is missing or invalid."""
    try:
        file = Path(os.path.expanduser(path)) / "config.json"  # noqa: PTH111  expanduser of Path fails for "~nobody"
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        counts = [part.get(key) for key in _LAYER_COUNTS] if isinstance(part, dict) else []
        number = next((count for count in counts if type(count) is int and count > 0), None)
        if number is not None:
            return number
    return None
