"""Changes values of a recipe before it is validated: the option ``--set KEY=VALUE``, and the API's `overrides`.

A key is a path of keys and list indices: ``parameters.weight``, ``models.0.parameters.weight``, or
``models[0].parameters.weight`` as error messages show it. In a recipe of several stages it begins with the stage's name
or number. The value is YAML. The text of a changed recipe is the changed one, so another value makes another merge.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import yaml

from ...errors import RecipeError, UsageError, format_key_path
from .nodes import MAX_DEPTH, Node, node_of
from .yaml import YamlSource, parse_yaml

_LINES_SHOWN = 4
_MAX_SHOWN = 120
"""The number of characters of an override that messages show."""
_KEY = re.compile(r"(?:[^\s.\[\]=]+|\[\d+\])(?:\.[^\s.\[\]=]+|\[\d+\])*")
_PART = re.compile(r"[^.\[\]]+")


def override(source: YamlSource, overrides: Sequence[str]) -> YamlSource:
    """Apply overrides in order.

    Args:
        source: the parsed recipe.
        overrides: the overrides, each a ``KEY=VALUE``.

    Raises:
        UsageError: if an override is invalid, or its key doesn't fit the recipe.
    """
    if not overrides:
        return source
    if not source.documents:
        raise RecipeError("the recipe is empty: --set has nothing to change")
    documents = list(source.documents)
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not _KEY.fullmatch(key):
            raise UsageError(
                f"--set {text}: expected KEY=VALUE, such as parameters.weight=0.3 or models.0.parameters.weight=0.3"
            )
        keys = _PART.findall(key)
        number = 0 if len(documents) == 1 else _document(documents, keys.pop(0), text)
        if not keys or len(keys) > MAX_DEPTH // 2:
            raise UsageError(f"--set {text}: expected a key of the stage, such as {key}.merge_method=linear")
        documents[number] = _with(documents[number], tuple(keys), (), _value(value, text), text)
    return replace(source, text="", documents=tuple(documents))


def override_text(key: str, value: object) -> str:
    """Return the override ``KEY=VALUE`` that sets an entry to plain data.

    Raises:
        UsageError: if the key is invalid, or a recipe can't contain the value.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise UsageError(
            f"invalid key {key!r} of overrides: expected a path of keys and indices, such as models.0.parameters.weight"
        )
    try:
        data = node_of(value).plain()
    except RecipeError as error:
        raise UsageError(f"invalid value of overrides[{key!r}]: {error.message}") from error
    return f"{key}={_one_line(data)}"


def parse_without_lines(text: str) -> YamlSource:
    """Parse the text of a recipe, whose lines may not be those of its file. Raises RecipeError."""
    source = parse_yaml(text)
    return replace(source, documents=tuple(map(_without_lines, source.documents)))


def _one_line(data: object) -> str:
    """Return data as YAML on one line."""
    text = yaml.safe_dump(data, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").rstrip("\n")  # the end of a document after a scalar


def recipe_difference(old: str, new: str) -> str:
    """The first lines in which the texts of two recipes differ, after a colon; empty if none do.

    Comments and empty lines are left out if other lines differ, too.
    """
    lines = changed_lines(old, new)
    if len(lines) > _LINES_SHOWN:  # perhaps only the layout differs: --set writes the recipe anew
        lines = min(lines, changed_lines(uniform_layout(old), uniform_layout(new)), key=len)
    lines = [line for line in lines if not re.fullmatch(r".\s*(#.*)?", line)] or lines
    return ": " + " | ".join(lines[:_LINES_SHOWN]) if lines else ""


def changed_lines(old: str, new: str) -> list[str]:
    """The lines in which two texts differ, with ``-`` or ``+`` before each."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return [line for line in lines if line[:3] not in ("---", "+++", "@@ ")]


def uniform_layout(text: str) -> str:
    """Return the text of a recipe in the layout of a changed recipe; the text itself if it isn't valid YAML."""
    try:
        documents = parse_yaml(text).documents
    except RecipeError:
        return text
    return yaml.safe_dump_all((node.plain() for node in documents), sort_keys=False, allow_unicode=True, width=10**9)


def _value(value: str, text: str) -> Node:
    """Parse the value of the override `text`."""
    try:
        documents = parse_yaml(value).documents
    except RecipeError as error:
        raise UsageError(f"--set {text}: {error.message}") from error
    if len(documents) > 1:
        raise UsageError(f"--set {text}: the value has several YAML documents: use one value")
    node = _without_lines(documents[0]) if documents else Node(None, None)
    return replace(node, override=_shown(text))


def _shown(text: str) -> str:
    """Return an override as messages about its value show it."""
    return f"--set {text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + '...'}"


def _without_lines(node: Node) -> Node:
    """Return a value without line numbers, which would be taken for lines of the recipe's file."""
    if isinstance(node.value, tuple):
        return Node(tuple(map(_without_lines, node.value)), None)
    if isinstance(node.value, Mapping):
        return Node({key: _without_lines(child) for key, child in node.value.items()}, None)
    return Node(node.value, None)


def _document(documents: Sequence[Node], name: str, text: str) -> int:
    """Return the index of the stage that a key begins with."""
    names = [
        node.value["name"].value if isinstance(node.value, Mapping) and "name" in node.value else None
        for node in documents
    ]
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(documents):
        return int(name)
    known = ", ".join(str(number if known is None else known) for number, known in enumerate(names))
    raise UsageError(f"--set {text}: the recipe has {len(documents)} stages: begin the key with one of {known}")


def _with(node: Node, keys: tuple[str, ...], place: tuple[str | int, ...], value: Node, text: str) -> Node:
    """Return a value in which the entry at `keys` is replaced or added; missing mappings are created.

    Args:
        node: the value.
        keys: the keys that lead to the entry from here.
        place: the keys that lead here, for messages.
        value: the new entry.
        text: the override, for messages.
    """
    if not keys:
        return value
    first, rest = keys[0], keys[1:]
    if isinstance(node.value, tuple):
        count = len(node.value)
        if not first.isdecimal() or int(first) >= count:
            indices = "which is empty" if not count else f"whose indices are 0 to {count - 1}"
            raise UsageError(f"--set {text}: {_named(place)} is a list, {indices}, got {first!r}")
        index = int(first)
        changed = _with(node.value[index], rest, (*place, index), value, text)
        return replace(node, value=(*node.value[:index], changed, *node.value[index + 1 :]))
    if node.value is None or isinstance(node.value, Mapping):
        entries: Mapping[str, Node] = node.value or {}
        if first.isdecimal() and first not in entries:
            close = f"; its keys are {', '.join(entries)}" if entries else ""
            raise UsageError(f"--set {text}: {_named(place)} is not a list{close}")
        child = _with(entries.get(first, Node(None, None, override=_shown(text))), rest, (*place, first), value, text)
        lines = {key: line for key, line in node.key_lines.items() if rest or key != first}  # not a line of the file
        return replace(node, value={**entries, first: child}, key_lines=lines)
    raise UsageError(f"--set {text}: {_named(place)} is {node.plain()!r}, which has no entry {first!r}")


def _named(place: tuple[str | int, ...]) -> str:
    return f"`{format_key_path(place)}`" if place else "the recipe"
