"""Reads `chat_template` of a recipe: ``auto``, the name of a built-in template, or a Jinja template."""

from __future__ import annotations

from ..misplaced import nearest
from ..node_reader import NodeReader
from ..nodes import Keys, Node
from ..parameters import describe
from ..types import ChatTemplate

CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""The names of the built-in templates."""


def read_chat_template(reader: NodeReader, node: Node, path: Keys) -> ChatTemplate:
    """Read the value of `chat_template`. Raises RecipeError."""
    text = reader.text(node, path, f"auto, one of {', '.join(CHAT_TEMPLATES)}, or a Jinja template")
    if text == "auto":
        return ChatTemplate("auto", text)
    if text in CHAT_TEMPLATES:
        return ChatTemplate("name", text)
    if "{{" in text or "{%" in text:
        return ChatTemplate("text", text)
    close = nearest(text, ("auto", *CHAT_TEMPLATES))
    advice = f"did you mean `{close}`?" if close else f"use auto, {', '.join(CHAT_TEMPLATES)}, or a Jinja template"
    raise reader.error(f"unknown chat template {describe(text)}; {advice}", path)
