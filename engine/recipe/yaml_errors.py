"""Explains errors of the YAML parser: the lines concerned and the likely cause.

The parser reports where it can't continue, which is often after the mistake. The causes are found in the text, since
the C parser and the pure Python parser word their errors differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

_LONGEST = 100
"""The number of characters of a line that an error shows."""
_KEY = re.compile(r"(?P<dash>(?:- +)*)(?P<key>[\w.$-]+|'[^']*'|\"[^\"]*\") *:(?P<value> .*)?$")
_INNER_KEY = re.compile(r"(?:^| )(?P<key>[\w-]+): ")
_NO_SPACE = re.compile(r"(?:- +)*(?P<text>[\w-]+:[^\s/\\:]\S*)$")
_FENCE_NAMES = ("yaml", "yml")


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the text without its comment, indentation and trailing blanks.

    Args:
        number: the 1-based number of the line.
        indent: the number of spaces before the text.
        text: the text; empty for a blank line or a comment.
    """

    number: int
    indent: int
    text: str

    @property
    def key(self) -> str | None:
        """The key that the line sets, or None."""
        match = _KEY.match(self.text)
        return match["key"] if match else None

    @property
    def value(self) -> str:
        """The text after the key's colon; empty if there is none."""
        match = _KEY.match(self.text)
        return (match["value"] or "").strip() if match else ""

    @property
    def key_column(self) -> int:
        """The number of characters before the key, dashes included."""
        match = _KEY.match(self.text)
        return self.indent + (len(match["dash"]) if match else 0)


def describe_yaml_error(error: yaml.MarkedYAMLError, text: str) -> tuple[str, int | None]:
    """Describe a parser's error: the problem, the likely cause, and the lines concerned.

    Args:
        error: the parser's error.
        text: the YAML text.

    Returns:
        The message, and the 1-based line of the error or None if it is unknown.
    """
    problem = error.problem or error.context or "cannot be parsed"
    mark: Any = error.problem_mark or error.context_mark
    if mark is None:
        return f"this is not valid YAML: {problem}", None
    rows = text.splitlines()
    # the mark of an error at the end of the text is past the last line
    number = min(mark.line + 1, max(1, len(rows)))
    context: Any = error.context_mark
    if "could not find expected ':'" in problem and context is not None:
        number = min(context.line + 1, number)
    lines = [_line(n, row) for n, row in enumerate(rows[:number], 1)]
    cause = _character(problem, rows, mark) or (next(_causes(lines, error, mark), None) if lines else None)
    advice, other = cause if cause is not None else ("", None)
    if other is None:
        other = next((line.number for line in reversed(lines[:-1]) if line.text), None)
    shown = sorted({number, other or number})
    excerpt = "".join(f"\n  {n:>5} | {rows[n - 1][:_LONGEST]}" for n in shown if n <= len(rows))
    what = f"{advice} ({problem})" if advice else problem
    return f"this is not valid YAML: {what}{excerpt}", number


_Cause = tuple[str, int | None]
"""What to do, and the line to show with that of the error; None for the one before it."""


def _line(number: int, row: str) -> _Line:
    text = row.lstrip(" ")
    return _Line(number, len(row) - len(text), "" if text.startswith("#") else text.rstrip())


def _character(problem: str, rows: list[str], mark: Any) -> _Cause | None:
    """A character that YAML doesn't allow at its position."""
    row = rows[mark.line] if mark.line < len(rows) else ""
    character = row[mark.column : mark.column + 1]
    if row.strip().startswith("```"):
        return "remove this line, which is left over from a code block", None
    if character == "\t" or (character and row[: mark.column].strip(" ") == "\t"):
        return "indent with spaces, not with tabs", None
    if character and "cannot start any token" in problem:
        return f"put text that starts with {character} in quotes", None
    if "unknown escape character" in problem:
        return "in double quotes, \\ starts an escape sequence: use single quotes, or / in a path", None
    return None


def _causes(lines: list[_Line], error: yaml.MarkedYAMLError, mark: Any) -> Iterator[_Cause]:
    """The likely causes of an error on the last of `lines`, the most certain first."""
    problem, context = error.problem or "", error.context_mark
    line = lines[-1]
    before = [other for other in lines[:-1] if other.text]
    if (first := next((each for each in lines if each.text), line)).text.lower() in _FENCE_NAMES:
        yield f"remove line {first.number}, `{first.text}`, which is left over from a code block", first.number
    for other in lines:
        if other.text == "---" and other.indent:
            separator = "`---`, which separates stages, must start in the first column"
            yield f"{separator}: remove the indentation of line {other.number}", other.number
    if context is not None and "quoted scalar" in str(error.context):
        yield f"is the quote on line {context.line + 1} closed?", context.line + 1
    if "',' or" in problem or "node content" in problem:
        opening, closing = "{}" if "}" in problem else "[]"
        opened = (each.number for each in reversed(lines) if each.text.count(opening) > each.text.count(closing))
        if (number := next(opened, None)) is not None:
            yield f"is the {opening} on line {number} closed?", number
    if mark.line + 1 == line.number and mark.column > line.indent and line.text and (quote := _open_quote(lines)):
        yield quote
    if "could not find expected ':'" in problem and line.text:
        yield f"is a colon missing after `{line.text[:_LONGEST]}`?", None
    if (previous := before[-1] if before else None) is None:
        previous = _Line(0, 0, "")
    if (match := _NO_SPACE.match(previous.text)) is not None:
        yield f"write a space after the colon in `{match['text']}` on line {previous.number}", previous.number
    if line.text.startswith("- ") or line.text == "-":
        yield from _list_item(line, before)
    elif line.key is not None:
        yield from _key(line, before)


def _open_quote(lines: list[_Line]) -> _Cause | None:
    """The first line with an odd number of quotes, if all lines together have an odd number."""
    for quote in "'\"":
        odd = [line.number for line in lines if line.text.count(quote) % 2]
        if len(odd) % 2:
            return f"is the {quote} on line {odd[0]} closed?", odd[0]
    return None


def _list_item(line: _Line, before: list[_Line]) -> Iterator[_Cause]:
    """The causes of an error at a list item."""
    previous = before[-1] if before else None
    if previous is None:
        return
    if previous.text.startswith("- ") or previous.indent > line.indent:
        items = (each for each in reversed(before) if each.text.startswith("-") and each.indent != line.indent)
        if (other := next(items, None)) is not None:
            where = f"{_spaces(line.indent)}, that on line {other.number} by {other.indent}"
            yield f"this list item is indented by {where}", other.number
    elif previous.value:
        yield (
            f"a list item follows the value of `{previous.key}`: is a line such as `models:` missing before it?",
            previous.number,
        )


def _key(line: _Line, before: list[_Line]) -> Iterator[_Cause]:
    """The causes of an error at a key."""
    if (inner := _INNER_KEY.search(line.value)) is not None:
        yield f"put a value that contains a colon in quotes, or write `{inner['key']}` on a line of its own", None
    if before and before[0].text.startswith("-") and before[0].indent == line.key_column:
        number = before[0].number
        yield f"is a line such as `models:` missing before the list item on line {number}?", number
    others = [each for each in reversed(before) if each.key is not None and each.key_column != line.key_column]
    if others:  # the closest column is most likely the intended one
        other = min(others, key=lambda each: abs(each.key_column - line.key_column))
        where = f"{_spaces(line.key_column)}, `{other.key}` on line {other.number} by {other.key_column}"
        yield f"`{line.key}` is indented by {where}", other.number


def _spaces(count: int) -> str:
    return f"{count} space{'' if count == 1 else 's'}"
