"""YAML text, or plain Python data, into a tree of nodes that know their lines, within bounds and without surprises.

The tree is built from the parser's events rather than by PyYAML's composer, so that the bounds hold while it grows:
what aliases and merge keys repeat is counted as it is met, and nothing here recurses as deep as the text says.
"""

from __future__ import annotations

import codecs
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import RecipeError

Keys = tuple[str | int, ...]
"""The keys that lead to a place, such as ``("slices", 0, "sources")``."""

MAX_BYTES = 16 << 20
"""The largest file that is read."""

MAX_NODES = 200_000
"""The most values in one file, counted as often as aliases and merge keys repeat them."""

MAX_DEPTH = 64
"""The most lists and mappings inside each other, aliases followed."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it
_CORE = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Node:
    """One value and where it stands.

    Args:
        value: a scalar, a tuple of nodes (a list), or a mapping of nodes by their keys' text.
        line: the 1-based line on which the value begins, or None for data that comes from no file.
        key_lines: of a mapping, the line of each key.
    """

    value: str | int | float | bool | tuple[Node, ...] | Mapping[str, Node] | None
    line: int | None
    key_lines: Mapping[str, int] = field(default_factory=dict)

    def plain(self) -> Any:
        """The value as plain lists and dicts."""
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        if isinstance(self.value, Mapping):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value

    def lines(self, prefix: Keys = ()) -> dict[Keys, int]:
        """The line of everything below this node: a mapping's entries by their keys' lines, a list's by their own."""
        found: dict[Keys, int] = {} if self.line is None else {prefix: self.line}
        todo: list[tuple[Keys, Node]] = [(prefix, self)]
        while todo:
            path, node = todo.pop()
            if isinstance(node.value, tuple):
                for index, child in enumerate(node.value):
                    if child.line is not None:
                        found[(*path, index)] = child.line
                    todo.append(((*path, index), child))
            elif isinstance(node.value, Mapping):
                for key, child in node.value.items():
                    if key in node.key_lines:
                        found[(*path, key)] = node.key_lines[key]
                    todo.append(((*path, key), child))
        return found


@dataclass(frozen=True, slots=True)
class Remark:
    """Something odd that is no error: what, and where it stands."""

    message: str
    line: int | None
    path: Keys


@dataclass(frozen=True, slots=True)
class YamlSource:
    """The documents of one YAML text; empty ones are left out."""

    text: str
    documents: tuple[Node, ...]
    remarks: tuple[Remark, ...]


def read_yaml(path: Path) -> YamlSource:
    """The documents of a file. Raises RecipeError for one that can't be read or isn't YAML that we take."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError("there is no such file", source=path) from error
    except IsADirectoryError as error:
        raise RecipeError("it is a directory, not a recipe file", source=path) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"it can't be read: {error}", source=path) from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"it has more than {MAX_BYTES >> 20} MiB, so it can be no recipe", source=path)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"it is not {error.encoding} text: {error.reason}", source=path, line=line) from error
    return parse_yaml(text, path)


def parse_yaml(text: str, source: Path | None = None) -> YamlSource:
    """The documents of a YAML text; `source` is the file that errors name.

    YAML 1.1 as PyYAML reads it: ``on`` and ``off`` are booleans, ``<<`` merges mappings, the last of two equal keys
    holds (with a remark). Dates stay text, keys are taken as text, and no tag makes an object.

    Raises:
        RecipeError: for text that is not YAML, has other tags than YAML's own scalars, lists and mappings, or passes
            `MAX_NODES` or `MAX_DEPTH`.
    """
    builder = _Builder(source)
    try:
        documents = tuple(builder.documents(yaml.parse(text, Loader=_LOADER)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "it can't be parsed"
        line = min(mark.line + 1, max(1, len(text.splitlines()))) if mark is not None else None  # the end is past it
        message = f"this is not valid YAML: {problem}{_advice(problem, text, mark)}"
        raise RecipeError(message, source=source, line=line) from error
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        reason = getattr(error, "reason", None) or error
        raise RecipeError(f"this is not valid YAML: {reason}", source=source) from error
    return YamlSource(text, documents, tuple(builder.remarks))


def _advice(problem: str, text: str, mark: Any) -> str:
    """What to do about a character that YAML doesn't take where it stands."""
    line = text.splitlines()[mark.line : mark.line + 1] if mark is not None else []
    character = line[0][mark.column : mark.column + 1] if line else ""
    if character == "\t":
        return "; indent with spaces, not with tabs"
    if character and "cannot start any token" in problem:
        return f"; put text with a {character} at its start in quotes"
    return ""


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not come yet, and what it would hold with every alias written out."""

    line: int
    anchor: str | None
    is_mapping: bool
    size: int = 1
    depth: int = 1
    items: list[Node] = field(default_factory=list)
    entries: dict[str, Node] = field(default_factory=dict)
    key_lines: dict[str, int] = field(default_factory=dict)
    merged: list[Node] = field(default_factory=list)
    key: str | None = None
    key_line: int = 0
    merging: bool = False

    @property
    def place(self) -> str | int | None:
        """The key or index that comes next, or comes now."""
        return self.key if self.is_mapping else len(self.items)


_Built = tuple[Node, int, int]  # with its size and its depth


class _Builder:
    """The collections that are open, the anchors met, and the odd things found, while a text is parsed."""

    def __init__(self, source: Path | None) -> None:
        self.remarks: list[Remark] = []
        self._source = source
        self._size = 0
        self._open: list[_Open] = []
        self._anchors: dict[str, _Built | None] = {}
        self._resolver: Any = yaml.resolver.Resolver()
        self._constructor: Any = yaml.constructor.SafeConstructor()

    def documents(self, events: Iterator[Any]) -> Iterator[Node]:
        """A node for each document that isn't empty."""
        for event in events:
            line = event.start_mark.line + 1
            done: _Built | None = None
            anchor: str | None = None
            match event:
                case yaml.DocumentStartEvent():
                    self._anchors = {}
                case yaml.AliasEvent():
                    done = self._alias(event.anchor or "", line)
                case yaml.ScalarEvent():
                    anchor = event.anchor
                    done = self._scalar(event, line)
                case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                    self._start(event, line)
                case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                    anchor = self._open[-1].anchor
                    done = self._end()
            if done is None:
                continue
            if anchor is not None:
                self._anchors[anchor] = done
            if self._open:
                self._add(done, line)
            elif done[0].value is not None:
                yield done[0]

    def _error(self, message: str, line: int) -> RecipeError:
        return RecipeError(message, source=self._source, line=line, path=self._path())

    def _path(self) -> Keys:
        return tuple(part for part in (level.place for level in self._open) if part is not None)

    def _too_deep(self, line: int) -> RecipeError:
        message = f"more than {MAX_DEPTH} lists and mappings inside each other: that can be no recipe"
        return RecipeError(message, source=self._source, line=line, path=self._path()[:4])

    def _count(self, size: int, line: int) -> None:
        """Count what a value, or the repetition of one by an alias, adds to the whole."""
        self._size += size
        if self._size > MAX_NODES:
            message = f"more than {MAX_NODES} values, with what aliases repeat: that can be no recipe"
            raise RecipeError(message, source=self._source, line=line, path=self._path()[:4])

    def _alias(self, name: str, line: int) -> _Built:
        if name not in self._anchors:
            raise self._error(f"the alias *{name} has no anchor &{name} before it", line)
        built = self._anchors[name]
        if built is None:
            raise self._error(f"the alias *{name} stands inside what it repeats", line)
        self._count(built[1], line)
        return built

    def _scalar(self, event: Any, line: int) -> _Built | None:
        tag = event.tag
        if tag is None or tag == "!":
            tag = self._resolver.resolve(yaml.ScalarNode, event.value, event.implicit)
        level = self._open[-1] if self._open else None
        if level is not None and level.is_mapping and level.key is None and not level.merging:
            self._start_entry(level, event.value, tag == _CORE + "merge", line)
            if event.anchor is not None:
                self._anchors[event.anchor] = (Node(event.value, line), 1, 1)
            return None
        value: str | int | float | bool | None = event.value
        node = yaml.ScalarNode(tag, event.value, event.start_mark)
        try:
            match tag.removeprefix(_CORE):
                case "str" | "timestamp" | "merge" | "value":
                    pass
                case "null":
                    value = None
                case "bool":
                    value = bool(self._constructor.construct_yaml_bool(node))
                case "int":
                    value = int(self._constructor.construct_yaml_int(node))
                case "float":
                    value = float(self._constructor.construct_yaml_float(node))
                case _:
                    raise self._error(f"the tag {tag.replace(_CORE, '!!')} is not allowed in a recipe", line)
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            kind = tag.removeprefix(_CORE)
            raise self._error(f"{event.value[:60]!r} can't be read as YAML's {kind}", line) from error
        self._count(1, line)
        return Node(value, line), 1, 1

    def _start(self, event: Any, line: int) -> None:
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _CORE + ("map" if is_mapping else "seq")):
            raise self._error(f"the tag {event.tag.replace(_CORE, '!!')} is not allowed in a recipe", line)
        level = self._open[-1] if self._open else None
        if level is not None and level.is_mapping and level.key is None and not level.merging:
            raise self._error("a list or mapping can't be a key here", line)
        if len(self._open) == MAX_DEPTH:
            raise self._too_deep(line)
        self._count(1, line)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        self._open.append(_Open(line, event.anchor, is_mapping))

    def _start_entry(self, level: _Open, key: str, merging: bool, line: int) -> None:
        level.merging = merging
        level.key_line = line
        if merging:
            return
        level.key = key
        if key in level.entries:
            first = level.key_lines[key]
            message = f"the key stands twice, on lines {first} and {line}: the last one holds"
            self.remarks.append(Remark(message, line, self._path()))

    def _add(self, built: _Built, line: int) -> None:
        """`built` into the innermost open collection."""
        node, size, depth = built
        level = self._open[-1]
        level.size += size
        level.depth = max(level.depth, depth + 1)
        if len(self._open) + depth > MAX_DEPTH + 1:
            raise self._too_deep(line)
        if not level.is_mapping:
            level.items.append(node)
        elif level.merging:
            parts = node.value if isinstance(node.value, tuple) else (node,)
            if not all(isinstance(part.value, Mapping) for part in parts):
                raise self._error("the merge key << takes a mapping, or a list of mappings", line)
            level.merged.extend(parts)
            level.merging = False
        elif level.key is None:  # an alias where a key stands
            if not isinstance(node.value, str):
                raise self._error("only text can be a key here", line)
            self._start_entry(level, node.value, False, line)
        else:
            level.entries[level.key] = node
            level.key_lines[level.key] = level.key_line
            level.key = None

    def _end(self) -> _Built:
        level = self._open.pop()
        value: tuple[Node, ...] | dict[str, Node] = tuple(level.items)
        if level.is_mapping:
            value = {}
            for part in level.merged:  # the first mapping that has a key holds, and the mapping's own keys before all
                assert isinstance(part.value, Mapping)
                for key, node in part.value.items():
                    if key not in value and key not in level.entries:
                        value[key] = node
                        level.key_lines[key] = part.key_lines[key]
            value.update(level.entries)
        return Node(value, level.line, level.key_lines), level.size, level.depth


def node_of(data: object) -> Node:
    """Plain Python data, as a recipe given as a dict, as a node without lines.

    Takes mappings with text keys, lists and tuples, text, paths, numbers (numpy's too), booleans and None.

    Raises:
        RecipeError: for anything else, and past `MAX_NODES` or `MAX_DEPTH`.
    """
    left = MAX_NODES

    def convert(item: object, path: Keys) -> Node:
        nonlocal left
        left -= 1
        if left < 0:
            raise RecipeError(f"it holds more than {MAX_NODES} values", path=path[:4])
        if len(path) > MAX_DEPTH:
            raise RecipeError(f"more than {MAX_DEPTH} lists and mappings inside each other", path=path[:4])
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
                        raise RecipeError(f"the key {key!r} is no text", path=path)
                return Node({key: convert(value, (*path, key)) for key, value in item.items()}, None)
            case Sequence() if not isinstance(item, (bytes, bytearray, memoryview)):
                return Node(tuple(convert(value, (*path, index)) for index, value in enumerate(item)), None)
        raise RecipeError(
            f"a {type(item).__name__} can't stand in a recipe: use text, numbers, lists, dicts", path=path
        )

    return convert(data, ())
