"""The parser agrees with the safetensors library on mutated files and on noise."""

from __future__ import annotations

import copy
import json
from math import prod
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergeloom.io.safetensors.header import Header, build_header
from tests.examples import examples
from tests.unit.safetensors.headers import (
    BYTE,
    DATA,
    assert_same_tensors,
    file_bytes,
    is_stricter,
    library_tensors,
    parse_or_error,
    tensor_lists,
)

JUNK = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2, 3, 8, 2**61, 2**63 - 1, 2**63, 2**64, 1.0, -0.0, 1e30, "", "U8", "F32"),
        *([], {}, [0], [1], [0, 1], [0, 0, 0], {"U8": None}, {"format": "pt"}, ["U8", [1], [0, 1]], [[]]),
    ]
)
TEXTS = st.sampled_from(
    [
        *("0", "1", "-0", "-1", "00", "1e0", "1.0", "1e400", "NaN", "Infinity", "null", "true", "9" * 21, str(2**63)),
        *(
            '"',
            "\\",
            '"\\ud800"',
            '"\\ud83d\\ude00"',
            "\\u0000",
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            " ",
            "\n",
            "\x00",
            "\x7f",
        ),
        *('"dtype":"U8",', '"x":[1,{"x":2}],', '"__metadata__":{"a":"b"},', '"__metadata__":null,', "\ufeff", "é"),
    ]
)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """Small files, most of them nearly right: a valid one, with a value, some text or the sizes changed."""
    tensors = draw(tensor_lists())
    head = build_header(tensors, draw(st.sampled_from([{}, {"format": "pt"}])))
    size = sum(dtype.nbytes(prod(shape)) for _, dtype, shape in tensors)
    document = json.loads(head[8:])
    for _ in range(draw(st.integers(0, 2))):
        document = draw(changed_values(document))
    order = draw(st.permutations(list(document)))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))  # the first is the library's
    text = json.dumps({name: document[name] for name in order}, ensure_ascii=draw(st.booleans()), separators=separators)
    for _ in range(draw(st.integers(0, 1))):
        begin = draw(st.integers(0, len(text)))
        end = begin + draw(st.integers(0, 3))
        text = text[:begin] + draw(TEXTS) + text[end:]
    length, data = draw(st.sampled_from([0, 0, 0, 0, 1, -1, 2**40])), draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    encoded = text.encode()
    return file_bytes(encoded, draw(DATA).randbytes(max(size + data, 0)), max(len(encoded) + length, 0))


@st.composite
def changed_values(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """`document` with one value in it, at any depth, replaced, moved by one, or dropped."""
    document = copy.deepcopy(document)
    inner: Any = document
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys:
            return document
        key = draw(st.sampled_from(keys))
        if not isinstance(inner[key], (dict, list)) or draw(st.integers(0, 3)) == 0:
            break
        inner = inner[key]
    match draw(st.sampled_from(["replace", "move", "drop"])):
        case "replace":
            inner[key] = draw(JUNK)
        case "move" if type(inner[key]) is int:
            inner[key] += draw(st.sampled_from([-1, 1]))
        case "drop":
            del inner[key]
    return document


@settings(max_examples=examples(400), deadline=None)
@given(mutated_files())
@example(file_bytes(f'{{"a":{BYTE},"a":{BYTE}}}', b"x"))
def test_mutated_files_are_parsed_like_the_library_does(raw: bytes) -> None:
    found, judged = parse_or_error(raw), library_tensors(raw)
    if isinstance(found, Header):
        assert_same_tensors(raw)
    elif judged is not None:
        assert is_stricter(raw, found), found


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=64), st.integers(0, 70))
def test_noise_is_parsed_like_the_library_does(noise: bytes, length: int) -> None:
    for raw in (noise, file_bytes(noise, length=length), file_bytes(b"{" + noise, length=length)):
        found, judged = parse_or_error(raw), library_tensors(raw)
        assert isinstance(found, Header) <= (judged is not None)
        assert judged is None or isinstance(found, Header) or is_stricter(raw, found)
