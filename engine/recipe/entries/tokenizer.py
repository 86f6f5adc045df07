"""Reads a recipe's ``tokenizer_source`` and ``tokenizer``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ..node_reader import NodeReader, describe_node
from ..nodes import Keys, Node
from .tokenizer_source import TokenEmbedding, TokenizerSource

_MOST_PADDING = 2**20
"""Largest number of rows that a vocabulary is padded to a multiple of; each row takes memory while planning."""
_SOURCES = "a model, `{kind: zero}`, or `{kind: model_token, model: MODEL, token: TOKEN}`"


def read_tokenizer(reader: NodeReader, keys: Mapping[str, Node], path: Keys) -> TokenizerSource | None:
    """Read the source of the output's tokenizer; None if the recipe does not set it.

    Args:
        reader: reads entries.
        keys: the entries of the stage.
        path: key path of the stage.

    Raises:
        RecipeError: both keys are there.
    """
    sources = [
        reader.optional(keys, path, "tokenizer_source", lambda n, p: _source(reader, n, p)),
        reader.optional(keys, path, "tokenizer", lambda n, p: _block(reader, n, p)),
    ]
    if None not in sources:
        message = "`tokenizer` and `tokenizer_source` are mutually exclusive: keep one of them"
        raise reader.error(message, (*path, "tokenizer_source"))
    return sources[0] or sources[1]


def _source(reader: NodeReader, node: Node, path: Keys) -> TokenizerSource:
    if node.value == "base":
        return TokenizerSource(None, place=path)
    if node.value == "union":
        return TokenizerSource(None, union=True, place=path)
    if isinstance(node.value, str):
        node = replace(node, value=node.value.removeprefix("model:"))  # older mergekit versions' model cards
    return TokenizerSource(reader.reference(node, path), place=path)


def _block(reader: NodeReader, node: Node, path: Keys) -> TokenizerSource:
    keys = reader.mapping(node, path, "a mapping with `source` (or use `tokenizer_source`)")
    reader.check_keys(keys, path, ("source", "tokens", "pad_to_multiple_of"))
    if "source" not in keys or keys["source"].value is None:
        source = TokenizerSource(None, union=True, place=path)
    else:
        source = _source(reader, keys["source"], (*path, "source"))
    tokens = reader.optional(keys, path, "tokens", lambda n, p: _tokens(reader, n, p))
    multiple = reader.optional(keys, path, "pad_to_multiple_of", lambda n, p: _multiple(reader, n, p))
    return replace(source, tokens=tokens or (), multiple=multiple)


def _tokens(reader: NodeReader, node: Node, path: Keys) -> tuple[TokenEmbedding, ...]:
    tokens = reader.mapping(node, path, "a mapping of tokens")
    found = [reader.attempt(partial(_token, reader, t, n, (*path, t)), (*path, t)) for t, n in tokens.items()]
    return tuple(each for each in found if each is not None)


def _token(reader: NodeReader, token: str, node: Node, path: Keys) -> TokenEmbedding:
    if node.value is None:
        return TokenEmbedding(token, place=path)
    keys = reader.mapping(node, path, "a mapping with `source`, `force` or both")
    reader.check_keys(keys, path, ("source", "force"))
    force = reader.optional(keys, path, "force", reader.switch) or False
    source = reader.optional(keys, path, "source", lambda n, p: _embedding(reader, n, p))
    return replace(source or TokenEmbedding(token), token=token, force=force, place=path)


def _embedding(reader: NodeReader, node: Node, path: Keys) -> TokenEmbedding:
    """The source of a token's embedding, without the token."""
    if not isinstance(node.value, Mapping) or "kind" not in node.value:
        return TokenEmbedding("", reader.reference(node, path))
    keys = node.value
    kind = keys["kind"].value
    if kind == "zero":
        reader.check_keys(keys, path, ("kind",))
        return TokenEmbedding("", zero=True)
    if kind != "model_token":
        raise reader.error(f"expected {_SOURCES}, got kind {describe_node(keys['kind'])}", (*path, "kind"))
    known = ("kind", "model", "token", "token_id")
    reader.check_keys(keys, path, known)
    model = reader.reference(reader.required(keys, path, "model", known), (*path, "model"))
    other = reader.optional(keys, path, "token", lambda n, p: reader.text(n, p, "the text of a token"))
    row = reader.optional(keys, path, "token_id", lambda n, p: _count(reader, n, p, 0))
    if sum(keys[key].value is not None for key in known[2:] if key in keys) != 1:
        raise reader.error("a model_token needs one of `token` and `token_id`", path)
    return TokenEmbedding("", model, other, row)


def _multiple(reader: NodeReader, node: Node, path: Keys) -> int:
    value = _count(reader, node, path, 1)
    if value > _MOST_PADDING:
        raise reader.error(f"expected a whole number of at most {_MOST_PADDING:,}, got {value:,}", path)
    return value


def _count(reader: NodeReader, node: Node, path: Keys, least: int) -> int:
    value = node.value
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise reader.error(f"expected a whole number of at least {least}, got {describe_node(node)}", path)
    return value
