"""Reads a model of a recipe: a text, or a mapping as mergekit writes it, with or without adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol, TypeVar

from ....errors import RecipeError
from ..nodes import Keys, Node
from .model_reference import ModelNameError, ModelReference
from .rename_reader import Renames

T = TypeVar("T")


class _Reader(Protocol):
    """What reading a model takes of a `NodeReader`."""

    renames: Renames

    def error(self, message: str, path: Keys, *causes: Keys, advice: str = "") -> RecipeError: ...
    def text(self, node: Node, path: Keys, what: str) -> str: ...
    def check_keys(self, keys: Mapping[str, Node], path: Keys, known: Collection[str]) -> None: ...
    def optional(self, keys: Mapping[str, Node], path: Keys, key: str, read: Callable[[Node, Keys], T]) -> T | None: ...


def read_reference(reader: _Reader, node: Node, path: Keys) -> ModelReference:
    """Read a model.

    It is ``path``, ``id@revision``, or ``{path, revision}``; with adapters, ``base+adapter``, or mergekit's
    ``{model: {path, revision}, lora: {path, revision}}``, in which `lora` can also be a text or a list of adapters.

    Args:
        reader: reads values, and collects mistakes.
        node: the entry.
        path: keys that lead to it.

    Raises:
        RecipeError: the entry does not name a model, or names an adapter where a model is needed.
    """
    if not isinstance(node.value, Mapping):
        text = reader.text(node, path, "a model: a directory or a Hub id")
        try:
            return ModelReference.parse(text)
        except ModelNameError as error:
            raise reader.error(error.problem, path, advice=error.advice) from error
    keys = node.value
    if "model" in keys:
        reader.check_keys(keys, path, ("model", "lora", "rename", "override_architecture"))
        model = read_reference(reader, keys["model"], (*path, "model"))
    elif "path" in keys:
        reader.check_keys(keys, path, ("path", "revision", "lora", "rename"))
        model = _with_revision(reader, keys, path)
    else:
        raise reader.error("expected a model, got a mapping without `path`", path)
    adapters = reader.optional(keys, path, "lora", lambda child, place: _adapters(reader, child, place))
    model = ModelReference(model.path, model.revision, (*model.adapters, *(adapters or ())))
    reader.renames.read(model, keys, path)
    return model


def _with_revision(reader: _Reader, keys: Mapping[str, Node], path: Keys) -> ModelReference:
    """Read ``{path, revision}``."""
    name = reader.text(keys["path"], (*path, "path"), "a directory or a Hub id")
    revision = reader.optional(keys, path, "revision", lambda n, p: reader.text(n, p, "a branch, tag or commit"))
    if not name.strip() or (revision is not None and not revision.strip()):
        raise reader.error("`path` and `revision` can't be empty", path)
    return ModelReference(name, revision)


def _adapters(reader: _Reader, node: Node, path: Keys) -> tuple[ModelReference, ...]:
    """Read the adapters of `lora`: one, or a list of them."""
    children = [(node, path)]
    if isinstance(node.value, tuple):
        children = [(child, (*path, index)) for index, child in enumerate(node.value)]
    found = []
    for child, place in children:
        adapter = read_reference(reader, child, place)
        if adapter.adapters:
            raise reader.error(f"{adapter.text} is a model with an adapter; expected an adapter alone", place)
        found.append(adapter)
    return tuple(found)
