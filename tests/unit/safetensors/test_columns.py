"""Headers in the usual form are read into columns; whatever differs from it goes to the parser of any JSON."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.io.safetensors.columns import parse_columns
from mergeloom.io.safetensors.header import build_header, parse_header
from mergeloom.io.tensors.dtypes import BF16, DType
from tests.examples import examples
from tests.support.counting import count_lines
from tests.unit.safetensors.headers import BYTE, FILE, NAMES, tensor_lists

LINES_OF_A_TENSOR = 4
"""The most lines of Python that reading one more tensor may execute."""


def described(raw: bytes) -> list[tuple[str, str, list[int], list[int]]]:
    """The tensors of a header by the standard library: name, dtype, shape and offsets in the data."""
    document: dict[str, Any] = json.loads(raw[8:])
    document.pop("__metadata__", None)
    return [(name, each["dtype"], each["shape"], each["data_offsets"]) for name, each in document.items()]


@settings(max_examples=examples(300), deadline=None)
@given(tensor_lists(), st.dictionaries(NAMES, NAMES, max_size=3))
def test_columns_are_what_the_json_says(tensors: list[tuple[str, DType, list[int]]], metadata: dict[str, str]) -> None:
    raw = build_header(tensors, metadata)
    columns = parse_columns(raw[8:])
    plain = not any(
        character in '"\\' or character < " " for text in (*metadata, *metadata.values()) for character in text
    )
    plain &= not any(character in '"\\' or character < " " for name, *_ in tensors for character in name)
    assert (columns is not None) is (plain and bool(tensors))
    if columns is not None:
        begins = [0, *columns.ends]
        rows = zip(columns.names, columns.classes, begins, columns.ends, strict=False)
        found = [(name, each.dtype.name, list(each.shape), [begin, end]) for name, each, begin, end in rows]
        assert found == described(raw)
        assert [each.nbytes for each in columns.classes] == [dtype.nbytes(prod(shape)) for _, dtype, shape in tensors]
        assert columns.metadata == metadata


SECOND = '"b":{"dtype":"F32","shape":[2,3],"data_offsets":[1,25]}'
USUAL = f'{{"__metadata__":{{"format":"pt"}},"a":{BYTE},{SECOND}}}'
UNUSUAL = {
    "white space": ('"a":', '"a": '),
    "another separator": (f"{BYTE},", f"{BYTE};"),
    "no separator": (f"{BYTE},", BYTE),
    "two separators": (f"{BYTE},", f"{BYTE},,"),
    "a separator at the end": (f"{SECOND}}}", f"{SECOND},}}"),
    "text after the brace": (f"{SECOND}}}", f"{SECOND}}}x"),
    "no brace at the end": (f"{SECOND}}}", SECOND),
    "an escape in a name": ('"a"', '"\\u0061"'),
    "a control character in a name": ('"a"', '"\t"'),
    "a name twice": ('"b"', '"a"'),
    "the metadata's name": ('"b"', '"__metadata__"'),
    "metadata twice": ('"format":"pt"', '"format":"pt","format":"pt"'),
    "metadata with a number": ('"pt"', "1"),
    "an escape in the metadata": ('"pt"', '"\\n"'),
    "metadata after the tensors": (USUAL, f'{{"a":{BYTE},"__metadata__":{{"format":"pt"}}}}'),
    "an unknown dtype": ('"F32"', '"F33"'),
    "a leading zero in a shape": ("[2,3]", "[02,3]"),
    "an empty dimension": ("[2,3]", "[2,,3]"),
    "a comma at the end of a shape": ("[2,3]", "[2,3,]"),
    "a dimension of 19 digits": ("[2,3]", f"[{10**18},0,2,3]"),
    "a leading zero in an offset": ("[1,25]", "[1,025]"),
    "a digit of another script": ("[1,25]", "[1,2٥]"),
    "too few bytes": ("[1,25]", "[1,24]"),
    "a gap": ("[1,25]", "[2,26]"),
    "an overlap": ("[1,25]", "[0,24]"),
    "a first tensor that begins late": ("[0,1]", "[1,1]"),
    "another field": ("[1,25]}", '[1,25],"x":1}'),
    "fields in another order": ('"dtype":"F32","shape":[2,3]', '"shape":[2,3],"dtype":"F32"'),
    "a list as the document": (USUAL, f"[{USUAL}]"),
    "no tensors": (USUAL, "{}"),
    "no document": (USUAL, ""),
}


def test_the_usual_form_is_read() -> None:
    for text in (USUAL, f"{USUAL}   ", USUAL.replace('"__metadata__":{"format":"pt"},', "").replace('"b"', '"é"')):
        assert parse_columns(text.encode()) is not None


@pytest.mark.parametrize(("old", "new"), UNUSUAL.values(), ids=UNUSUAL)
def test_everything_else_is_left_to_the_other_parser(old: str, new: str) -> None:
    text = USUAL.replace(old, new, 1)
    assert text != USUAL
    assert parse_columns(text.encode()) is None


def test_bytes_that_are_not_utf8_are_left_to_the_other_parser() -> None:
    assert parse_columns(USUAL.encode().replace(b'"a"', b'"\xff"')) is None


def test_no_python_runs_for_single_tensors() -> None:
    def header(layers: int) -> bytes:
        names = [f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for layer in range(layers) for e in range(64)]
        return build_header([(name, BF16, (16, 16)) for name in names], {"format": "pt"})

    counts = []
    for layers in (8, 16):
        raw = header(layers)
        size = len(raw) + 64 * layers * 512
        counts.append(count_lines(lambda raw=raw, size=size: parse_header(raw, size, file=FILE)))
    assert counts[1] - counts[0] <= 8 * 64 * LINES_OF_A_TENSOR
