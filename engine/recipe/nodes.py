"""The nodes of a recipe: plain values with line numbers, whether they come from YAML or from Python data."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import Location, RecipeError

Keys = tuple[str | int, ...]
"""The keys that lead to an entry, such as ``("slices", 0, "sources")``."""


MAX_NODES = 200_000
"""The maximum number of values in one file, with aliases and merge keys expanded."""

MAX_DEPTH = 64
"""The maximum nesting depth of lists and mappings, with aliases expanded."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value and its line.

    Args:
        value: a scalar, a tuple of nodes for a list, or a mapping of nodes by key.
        line: the 1-based line of the value, or None for data that is not from a file.
        key_lines: line of each key of a mapping.
        override: the override that has set the value, such as ``--set dtype=float32``; None if none has.
    """

    value: str | int | float | bool | tuple[Node, ...] | Mapping[str, Node] | None
    line: int | None
    key_lines: Mapping[str, int] = field(default_factory=dict)
    override: str | None = None

    def plain(self) -> Any:
        """The value as plain lists and dicts."""
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        if isinstance(self.value, Mapping):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value

    def lines(self, prefix: Keys = ()) -> dict[Keys, int]:
        """The line of every entry below this node; an entry of a mapping has the line of its key."""
        lines: dict[Keys, int] = {} if self.line is None else {prefix: self.line}
        for path, node in self._walk(prefix):
            if isinstance(node.value, tuple):
                for index, child in enumerate(node.value):
                    if child.line is not None:
                        lines[(*path, index)] = child.line
            for key, line in node.key_lines.items():
                lines[(*path, key)] = line
        return lines

    def overrides(self, prefix: Keys = ()) -> dict[Keys, str]:
        """The override of every entry below this node that one has set."""
        return {path: node.override for path, node in self._walk(prefix) if node.override is not None}

    def _walk(self, prefix: Keys) -> Iterator[tuple[Keys, Node]]:
        """Yield this node and all nodes below it, with their key paths."""
        todo: list[tuple[Keys, Node]] = [(prefix, self)]
        while todo:
            path, node = todo.pop()
            yield path, node
            if isinstance(node.value, tuple):
                todo += (((*path, index), child) for index, child in enumerate(node.value))
            elif isinstance(node.value, Mapping):
                todo += (((*path, key), child) for key, child in node.value.items())


@dataclass(frozen=True, slots=True)
class Origins:
    """What the entries of a recipe come from: lines of its file, and overrides.

    Args:
        source: the recipe's file, or None.
        lines: line number of every key and value.
        overrides: the override of every entry that one has set.
    """

    source: Path | None = None
    lines: Mapping[Keys, int] = field(default_factory=dict)
    overrides: Mapping[Keys, str] = field(default_factory=dict)

    def __contains__(self, place: Keys) -> bool:
        """Whether the entry at `place` itself has a line or an override."""
        return place in self.lines or place in self.overrides

    def locate(self, place: Keys, *causes: Keys) -> Location:
        """The location of the entry at `place`.

        It has the line or the override of the innermost entry that has one, of those that contain the entry. With a
        line, it also has the overrides of parts of the entry, and of the other entries that a message about it depends
        on, because the file shows other values for them.

        Args:
            place: key path of the entry.
            causes: key paths of the other entries.
        """
        enclosing = (place[:end] for end in range(len(place), -1, -1))
        known = next((each for each in enclosing if each in self), None)
        if known is not None and known in self.overrides:
            return Location(self.source, None, place, self.overrides[known])
        inside = [text for keys, text in self.overrides.items() if place and keys[: len(place)] == place]
        inside += (self.overrides[cause] for cause in causes if cause in self.overrides)
        line = None if known is None else self.lines[known]
        return Location(self.source, line, place, " ".join(dict.fromkeys(inside)) or None)


def node_of(data: object) -> Node:
    """Convert plain Python data, such as a recipe given as a dict, to a node without lines.

    Accepts mappings with string keys, lists, tuples, strings, paths, numbers (including numpy's), booleans and None.

    Raises:
        RecipeError: for anything else, and for data that exceeds `MAX_NODES` or `MAX_DEPTH`.
    """
    left = MAX_NODES

    def convert(item: object, path: Keys) -> Node:
        nonlocal left
        left -= 1
        if left < 0:
            raise RecipeError(f"more than {MAX_NODES} values, the maximum for a recipe", path=path[:4])
        if len(path) > MAX_DEPTH:
            message = f"lists and mappings are nested more than {MAX_DEPTH} levels deep, the maximum for a recipe"
            raise RecipeError(message, path=path[:4])
        match item:
            case None | bool() | str() | int() | float():
                return Node(item, None)
            case os.PathLike():
                return Node(os.fsdecode(item), None)
            case numbers.Integral():
                return Node(int(item), None)
            case numbers.Real():
                return Node(float(item), None)
            case Mapping():
                for key in item:
                    if not isinstance(key, str):
                        raise RecipeError(f"the key {key!r} is not a string", path=path)
                return Node({key: convert(value, (*path, key)) for key, value in item.items()}, None)
            case Sequence() if not isinstance(item, (bytes, bytearray, memoryview)):
                return Node(tuple(convert(value, (*path, index)) for index, value in enumerate(item)), None)
        raise RecipeError(
            f"a recipe can't contain a {type(item).__name__}: use strings, numbers, lists and dicts", path=path
        )

    return convert(data, ())
