"""Messages, docstrings, comments and documents use the field's words: none of those that the glossary bans."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT, python_files

BANNED = {
    r"foretold|foretells?|foretelling": "planned, estimated",
    r"vouch\w*|unvouched": "verify, verified",
    r"judged?|judges|judging": "validate",
    r"beside": "next to, compared with, besides",
    r"held against": "compared with",
    r"told apart": "distinguished",
    r"begun anew|begins? anew|beginning anew": "restarted",
    r"go(?:es|ing|ne)? on with|went on with": "resume, continue",
    r"ma[dk]e(?:s|ing)? do with": "limited to",
    r"what is there": "name what it is",
    r"whence": "from which",
    r"so that": "so, or to",
    r"whole(?! numbers?\b)": "complete, entire, all",
    r"of it(?!s\b|self\b)": "name it, or leave it out",
    r"the most(?=[.,;:)]| (?:of|that|one|so far|bytes|steps|threads|it|which|there)\b)": "at most, the maximum",
    r"(?<!there )(?:is|are|was|were) no (?!longer\b|more\b|less\b|such\b|other\b|better\b)\w+": "is not a valid ...",
    r"there (?:is|are) an? \w+ that": "name the thing",
}
"""Patterns, with what to write instead; the glossary of the second edition."""

HEADLESS = re.compile(r"^\s+\w[\w ,]*: (?:of|by which|in which|with which|at which|from which)\b", re.MULTILINE)
"""An entry of an Args section that begins without its noun: ``nbytes: of the range``."""

PATTERN = re.compile(rf"\b(?:{'|'.join(BANNED)})(?!\w)", re.IGNORECASE)

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md"), ROOT / "Makefile"])


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, message and comment in a Python file."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    if any(PATTERN.search(joined(text)) for text in possible_comments(source)):  # tokenizing takes long
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def possible_comments(source: str) -> Iterator[str]:
    """Whatever follows a number sign on its line: the comments, and parts of strings."""
    for line in source.splitlines():
        yield from (line[place:] for place, character in enumerate(line) if character == "#")


def joined(text: str) -> str:
    """A text without line breaks and without code, which keeps its own names."""
    return re.sub(r"\s+", " ", re.sub(r"```.*?```|``[^`]*``|`[^`]*`", "`code`", text, flags=re.DOTALL))


def around(text: str, match: re.Match[str]) -> str:
    """A match with its surroundings, for the failure's message."""
    return f"{match[0]!r} in {text[max(0, match.start() - 40) : match.end() + 30]!r}"


@pytest.mark.parametrize(
    "path", [path for path in python_files() if path.name != "test_language.py"], ids=lambda path: path.name
)
def test_code_uses_the_words_of_the_field(path: Path) -> None:
    found = []
    for line, text in texts(path):
        where, plain = f"{path.relative_to(ROOT)}:{line}", joined(text)
        found += [f"{where}: {around(plain, match)}" for match in PATTERN.finditer(plain)]
        found += [f"{where}: an entry without its noun: {match[0].strip()!r}" for match in HEADLESS.finditer(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_the_words_of_the_field(path: Path) -> None:
    text = joined(path.read_text())
    found = [around(text, match) for match in PATTERN.finditer(text)]
    assert not found, f"{path.relative_to(ROOT)}\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "'x' is no size",
        "held against the journal",
        "go on with it",
        "the whole model",
        "what was foretold",
        "so that it",
    ],
)
def test_the_patterns_find_what_they_ban(text: str) -> None:
    assert PATTERN.search(text)


@pytest.mark.parametrize(
    "text", ["a whole number", "there is no config.json", "its own", "the most recent", "is no longer"]
)
def test_the_patterns_leave_plain_english_alone(text: str) -> None:
    assert not PATTERN.search(text)
