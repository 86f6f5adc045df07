"""Parses YAML text, into a tree of nodes with line numbers and limits on size and depth.

The tree is built from the parser's events rather than by PyYAML's composer, to enforce the limits during parsing:
aliases and merge keys count for all that they repeat, and the recursion depth does not depend on the input.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import RecipeError
from .local import similar_path
from .nodes import MAX_DEPTH, MAX_NODES, Keys, Node
from .yaml_errors import describe_yaml_error

MAX_BYTES = 16 << 20
"""The maximum size of a recipe file."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser, if PyYAML was built with libyaml
_CORE = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Remark:
    """A problem that is not an error, with its line and key path."""

    message: str
    line: int | None
    path: Keys


@dataclass(frozen=True, slots=True)
class YamlSource:
    """The documents of a YAML text, without empty ones.

    Args:
        text: the text.
        documents: the documents.
        remarks: problems that are not errors.
        repeated: for each document, the key paths of entries with an anchor that an alias outside of them repeats.
    """

    text: str
    documents: tuple[Node, ...]
    remarks: tuple[Remark, ...]
    repeated: tuple[frozenset[Keys], ...] = ()


def read_yaml(path: Path) -> YamlSource:
    """Parse a YAML file. Raises RecipeError if it can't be read or parsed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        near = similar_path(str(path))
        raise RecipeError(f"no such file{f'; did you mean `{near}`?' if near else ''}", source=path) from error
    except IsADirectoryError as error:
        raise RecipeError("this is a directory, not a recipe file", source=path) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the file: {error}", source=path) from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"the file is larger than {MAX_BYTES >> 20} MiB, the maximum for a recipe", source=path)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise RecipeError("this is not a recipe: it is a binary file", source=path) from error
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"this is not {error.encoding} text: {error.reason}", source=path, line=line) from error
    return parse_yaml(text, path)


def parse_yaml(text: str, source: Path | None = None) -> YamlSource:
    """Parse a YAML text. Errors name `source` as the file.

    The dialect is YAML 1.1 as in PyYAML: ``on`` and ``off`` are booleans, ``<<`` merges mappings, and the last of two
    equal keys is used (with a remark). Dates and keys are strings, and tags don't construct objects.

    Raises:
        RecipeError: for invalid YAML, for tags other than those of YAML's scalars, lists and mappings, and for text
            that exceeds `MAX_NODES` or `MAX_DEPTH`.
    """
    builder = _Builder(source)
    try:
        documents = tuple(builder.documents(yaml.parse(text, Loader=_LOADER)))
    except yaml.MarkedYAMLError as error:
        message, line = describe_yaml_error(error, text)
        raise RecipeError(message, source=source, line=line) from error
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        reason = getattr(error, "reason", None) or error
        raise RecipeError(f"this is not valid YAML: {reason}", source=source) from error
    return YamlSource(text, documents, tuple(builder.remarks), tuple(builder.repeated))


@dataclass(slots=True)
class _Open:
    """A list or mapping that is being parsed, with its size and depth after expanding aliases."""

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
        """The current key or index."""
        return self.key if self.is_mapping else len(self.items)


_Built = tuple[Node, int, int]  # the node, its size and its depth


class _Builder:
    """Builds nodes from parser events; keeps the open collections, the anchors and the remarks."""

    def __init__(self, source: Path | None) -> None:
        self.remarks: list[Remark] = []
        self.repeated: list[frozenset[Keys]] = []
        self._source = source
        self._size = 0
        self._open: list[_Open] = []
        self._anchors: dict[str, _Built | None] = {}
        self._anchor_paths: dict[str, Keys] = {}
        self._repeated: set[Keys] = set()
        self._resolver: Any = yaml.resolver.Resolver()
        self._constructor: Any = yaml.constructor.SafeConstructor()

    def documents(self, events: Iterator[Any]) -> Iterator[Node]:
        """Build a node for each non-empty document."""
        for event in events:
            line = event.start_mark.line + 1
            done: _Built | None = None
            anchor: str | None = None
            match event:
                case yaml.DocumentStartEvent():
                    self._anchors, self._anchor_paths, self._repeated = {}, {}, set()
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
                self._anchor_paths[anchor] = self._path()
            if self._open:
                self._add(done, line)
            elif done[0].value is not None:
                self.repeated.append(frozenset(self._repeated))
                yield done[0]

    def _error(self, message: str, line: int) -> RecipeError:
        return RecipeError(message, source=self._source, line=line, path=self._path())

    def _path(self) -> Keys:
        return tuple(part for part in (level.place for level in self._open) if part is not None)

    def _too_deep(self, line: int) -> RecipeError:
        message = f"lists and mappings are nested more than {MAX_DEPTH} levels deep, the maximum for a recipe"
        return RecipeError(message, source=self._source, line=line, path=self._path()[:4])

    def _count(self, size: int, line: int) -> None:
        """Add the size of a value, or of the value that an alias repeats, to the total."""
        self._size += size
        if self._size > MAX_NODES:
            message = f"more than {MAX_NODES} values with aliases expanded, the maximum for a recipe"
            raise RecipeError(message, source=self._source, line=line, path=self._path()[:4])

    def _alias(self, name: str, line: int) -> _Built:
        if name not in self._anchors:
            raise self._error(f"undefined alias *{name}: there is no anchor &{name} before it", line)
        built = self._anchors[name]
        if built is None:
            raise self._error(f"recursive alias *{name}: it is inside the value that it repeats", line)
        self._count(built[1], line)
        anchor, alias = self._anchor_paths.get(name, ()), self._path()
        common = next((i for i, (a, b) in enumerate(zip(anchor, alias, strict=False)) if a != b), 0)
        self._repeated.update(anchor[:end] for end in range(common + 1, len(anchor) + 1))
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
            raise self._error(f"{event.value[:60]!r} is not a valid YAML {kind}", line) from error
        self._count(1, line)
        return Node(value, line), 1, 1

    def _start(self, event: Any, line: int) -> None:
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _CORE + ("map" if is_mapping else "seq")):
            raise self._error(f"the tag {event.tag.replace(_CORE, '!!')} is not allowed in a recipe", line)
        level = self._open[-1] if self._open else None
        if level is not None and level.is_mapping and level.key is None and not level.merging:
            raise self._error("a list or mapping can't be a key", line)
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
            message = f"duplicate key on lines {first} and {line}: the last one is used"
            self.remarks.append(Remark(message, line, self._path()))

    def _add(self, built: _Built, line: int) -> None:
        """Add a value to the innermost open collection."""
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
        elif level.key is None:  # an alias as a key
            if not isinstance(node.value, str):
                raise self._error("a key must be a string", line)
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
            for part in level.merged:  # own keys first, then the merged mappings in order
                assert isinstance(part.value, Mapping)
                for key, node in part.value.items():
                    if key not in value and key not in level.entries:
                        value[key] = node
                        level.key_lines[key] = part.key_lines[key]
            value.update(level.entries)
        return Node(value, level.line, level.key_lines), level.size, level.depth
