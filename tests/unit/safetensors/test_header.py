"""The parser accepts and rejects the same headers as the safetensors library, except where we are stricter."""

from __future__ import annotations

import pytest

from mergeloom.io.safetensors.header import MAX_JSON_BYTES, Header
from mergeloom.io.tensors.dtypes import DTYPES, DType
from tests.unit.safetensors.headers import (
    BYTE,
    FILE,
    assert_same_tensors,
    entry,
    file_bytes,
    library_tensors,
    parse_or_error,
)

# ------------------------------------------------------------------------------------------- accepted by both

ACCEPTED = {
    "no tensors": file_bytes("{}"),
    "no tensors but metadata": file_bytes('{"__metadata__":{"format":"pt"}}'),
    "metadata that is null": file_bytes(f'{{"__metadata__":null,"a":{BYTE}}}', b"x"),
    "white space after the JSON": file_bytes(f'{{"a":{BYTE}}}\n\t  ', b"x"),
    "an empty name": file_bytes(f'{{"":{BYTE}}}', b"x"),
    "a NUL in a name": file_bytes(f'{{"a\\u0000":{BYTE}}}', b"x"),
    "an escaped pair of surrogates": file_bytes(f'{{"\\ud83d\\ude00":{BYTE}}}', b"x"),
    "a 0-d tensor": file_bytes(entry(shape="[]"), b"x"),
    "an empty tensor": file_bytes(entry(shape="[3,0]", offsets="[0,0]")),
    "a size that only a zero at the front keeps small": file_bytes(
        entry(shape=f"[0,{2**40},{2**40}]", offsets="[0,0]"),
    ),
    "2^61 elements times zero": file_bytes(entry(shape=f"[{2**61},0]", offsets="[0,0]")),
    "empty tensors between others": file_bytes(
        f'{{"b":{{"dtype":"F32","shape":[0],"data_offsets":[1,1]}},"a":{BYTE},'
        '"c":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"x",
    ),
    "tensors in another order than their bytes": file_bytes(
        f'{{"b":{{"dtype":"U8","shape":[1],"data_offsets":[1,2]}},"a":{BYTE}}}', b"xy"
    ),
    "a tensor that isn't aligned to its elements": file_bytes(
        f'{{"a":{BYTE},"b":{{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}}}', b"xyyyy"
    ),
    "F4 that fills a whole number of bytes": file_bytes(entry("F4", "[3,2]", "[0,3]"), b"xxx"),
    "F6 that fills a whole number of bytes": file_bytes(entry("F6_E3M2", "[4]", "[0,3]"), b"xxx"),
    "a field that the format doesn't have": file_bytes(entry(more=',"x":[1,{"y":1e-400}]'), b"x"),
    "an integer of 300 digits in an unknown field": file_bytes(entry(more=f',"x":{"9" * 300}'), b"x"),
    "nesting at serde_json's limit": file_bytes(entry(more=f',"x":{"[" * 125}{"]" * 125}'), b"x"),
}


@pytest.mark.parametrize("raw", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_as_the_library_does(raw: bytes) -> None:
    assert_same_tensors(raw)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_has_the_width_that_the_library_gives_it(dtype: DType) -> None:
    nbytes = dtype.bits * 4 // 8
    assert_same_tensors(file_bytes(entry(dtype.name, "[4]", f"[0,{nbytes}]"), b"x" * nbytes))


def test_tensors_come_in_the_order_of_their_bytes_with_offsets_from_the_start_of_the_file() -> None:
    raw = ACCEPTED["tensors in another order than their bytes"]
    header = assert_same_tensors(raw)
    assert list(header.tensors) == ["a", "b"]
    assert header.data_start == len(raw) - 2
    assert [tensor.offset for tensor in header.tensors.values()] == [len(raw) - 2, len(raw) - 1]
    assert header.tensors["a"].file is FILE


def test_metadata_is_given() -> None:
    header = parse_or_error(file_bytes(f'{{"__metadata__":{{"format":"pt","é":""}},"a":{BYTE}}}', b"x"))
    assert isinstance(header, Header)
    assert header.metadata == {"format": "pt", "é": ""}


# ------------------------------------------------------------------------------------------- rejected by both

REFUSED = {
    "an empty file": (b"", "is empty"),
    "a file of 7 bytes": (bytes(7), "has 7 bytes"),
    "a header of 0 bytes": (bytes(64), "0 bytes"),
    "a header past the limit": (file_bytes("{}", length=MAX_JSON_BYTES + 1), "100,000,001 bytes"),
    "a header length of 2^64 - 1": (file_bytes("{}", length=2**64 - 1), "limit of 100,000,000"),
    "a header past the end of the file": (
        file_bytes("{}", length=100),
        "its header alone has 108: the file is truncated",
    ),
    "a byte order mark": (file_bytes(f'\ufeff{{"a":{BYTE}}}', b"x"), "starts with b'\\xef'"),
    "a list": (file_bytes("[]"), "starts with b'['"),
    "no UTF-8": (file_bytes(f'{{"a\xff":{BYTE}}}'.encode("latin-1"), b"x"), "not UTF-8 (byte 11"),
    "UTF-8 of a surrogate": (file_bytes(f'{{"\ud800":{BYTE}}}'.encode("utf-8", "surrogatepass"), b"x"), "not UTF-8"),
    "half a surrogate pair in a name": (file_bytes(f'{{"\\uD83D":{BYTE}}}', b"x"), "lone surrogate"),
    "half a surrogate pair in the metadata": (file_bytes('{"__metadata__":{"k":"\\udc00"}}'), "lone surrogate"),
    "half a surrogate pair in an unknown field": (file_bytes(entry(more=',"x":"\\udc00"'), b"x"), "lone surrogate"),
    "a control character in a name": (file_bytes(f'{{"a\x01":{BYTE}}}', b"x"), "not valid JSON"),
    "a comma too many": (file_bytes(f'{{"a":{BYTE},}}', b"x"), "not valid JSON"),
    "something after the JSON": (file_bytes(f'{{"a":{BYTE}}}\0', b"x"), "not valid JSON"),
    "NaN": (file_bytes(entry(more=',"x":NaN'), b"x"), "NaN is not valid JSON"),
    "a number out of range": (file_bytes(entry(more=',"x":1e400'), b"x"), "out of range"),
    "an integer of 5000 digits": (file_bytes(entry(shape=f"[{'9' * 5000}]"), b"x"), "out of range"),
    "a dtype given twice": (file_bytes(entry(more=',"dtype":"U8"'), b"x"), "duplicate key 'dtype'"),
    "metadata given twice": (file_bytes('{"__metadata__":{},"__metadata__":{}}'), "duplicate key '__metadata__'"),
    "metadata that is a list": (file_bytes('{"__metadata__":[]}'), "not an object of strings"),
    "metadata that isn't text": (file_bytes('{"__metadata__":{"step":1}}'), "has 1, not a string, under 'step'"),
    "a tensor that is null": (file_bytes('{"a":null}'), "tensor 'a': its entry is None"),
    "no shape": (file_bytes('{"a":{"dtype":"U8","data_offsets":[0,1]}}', b"x"), "has no shape"),
    "no dtype": (file_bytes('{"a":{"shape":[1],"data_offsets":[0,1]}}', b"x"), "has no dtype"),
    "no offsets": (file_bytes('{"a":{"dtype":"U8","shape":[1]}}', b"x"), "has no data_offsets"),
    "an unknown dtype": (file_bytes(entry("F8_E3M4"), b"x"), "unknown dtype 'F8_E3M4'"),
    "a dtype in lower case": (file_bytes(entry("u8"), b"x"), "unknown dtype 'u8'"),
    "a dtype that is a number": (
        file_bytes('{"a":{"dtype":3,"shape":[1],"data_offsets":[0,1]}}', b"x"),
        "unknown dtype 3",
    ),
    "a shape that is null": (file_bytes(entry(shape="null"), b"x"), "its shape is None, not a list"),
    "a dimension that is true": (file_bytes(entry(shape="[true]"), b"x"), "has True, not an integer"),
    "a dimension that is a float": (file_bytes(entry(shape="[1.0]"), b"x"), "has 1.0, not an integer"),
    "a dimension in exponents": (file_bytes(entry(shape="[1e0]"), b"x"), "not an integer"),
    "a dimension that is text": (file_bytes(entry(shape='["1"]'), b"x"), "has '1', not an integer"),
    "a dimension below zero": (file_bytes(entry(shape="[-1]"), b"x"), "has -1, not an integer"),
    "a dimension of minus zero": (file_bytes(entry(shape="[-0]", offsets="[0,0]")), "not an integer"),
    "a dimension of 2^64": (file_bytes(entry(shape=f"[0,{2**64}]", offsets="[0,0]")), "not an integer"),
    "elements past 64 bits": (file_bytes(entry(shape=f"[{2**40},{2**40},0]", offsets="[0,0]")), "more elements than"),
    "bits past 64 bits": (file_bytes(entry(shape=f"[{2**61}]", offsets=f"[0,{2**61}]")), "more bits than"),
    "F4 that ends inside a byte": (
        file_bytes(entry("F4"), b"x"),
        "1 elements of F4, 4 bits each, are not a whole number of bytes",
    ),
    "F6 that ends inside a byte": (
        file_bytes(entry("F6_E2M3", "[5]", "[0,4]"), b"xxxx"),
        "are not a whole number of bytes",
    ),
    "three offsets": (file_bytes(entry(offsets="[0,1,2]"), b"x"), "not two non-negative integers"),
    "one offset": (file_bytes(entry(offsets="[0]"), b"x"), "not two non-negative integers"),
    "offsets that are booleans": (file_bytes(entry(offsets="[false,true]"), b"x"), "not two non-negative integers"),
    "an offset below zero": (file_bytes(entry(offsets="[-1,0]"), b"x"), "[-1, 0], not two non-negative integers"),
    "offsets that end before they start": (file_bytes(entry(offsets="[1,0]"), b"x"), "end before they start"),
    "a shape that doesn't match the offsets": (
        file_bytes(entry("F32", "[2,3]", "[0,16]"), bytes(16)),
        "its shape [2, 3] of F32 takes 24 bytes, but its data_offsets [0, 16] span 16",
    ),
    "two tensors that overlap": (
        file_bytes(f'{{"a":{BYTE},"b":{BYTE}}}', b"x"),
        "tensor 'b': starts at byte 0 of the data, inside 'a'",
    ),
    "a hole between tensors": (
        file_bytes(f'{{"a":{BYTE},"b":{{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}}}', b"xxx"),
        "tensor 'b': starts at byte 2 of the data, but 'a' before it ends at 1",
    ),
    "a hole before the first tensor": (file_bytes(entry(offsets="[2,3]"), b"xxx"), "but the data starts at 0"),
    "an empty tensor inside another": (
        file_bytes(
            '{"b":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            b"xx",
        ),
        "tensor 'b': starts at byte 1 of the data, inside 'a'",
    ),
    "a truncated file": (file_bytes(entry(shape="[9]", offsets="[0,9]"), b"x" * 7), "2 too few; the file is truncated"),
    "bytes after the last tensor": (file_bytes(entry(), b"xx"), "the rest belongs to no tensor"),
    "data without tensors": (file_bytes("{}", b"x"), "the rest belongs to no tensor"),
    "nesting past serde_json's limit": (
        file_bytes(entry(more=f',"x":{"[" * 126}{"]" * 126}'), b"x"),
        "more than 127 deep",
    ),
    "nesting past the interpreter's limit": (file_bytes(entry(more=f',"x":{"[" * 200_000}'), b"x"), "too deeply"),
}


@pytest.mark.parametrize(("raw", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_as_the_library_does(raw: bytes, reason: str) -> None:
    assert library_tensors(raw) is None
    error = parse_or_error(raw)
    assert isinstance(error, str)
    assert error.startswith("x.safetensors: ")
    assert reason in error
    assert "download" in error  # what to do


# ------------------------------------------------------------------------------------------- stricter than the library


STRICTER = {
    "white space before the JSON": (file_bytes(f' {{"a":{BYTE}}}', b"x"), "starts with b' '"),
    "two tensors of one name": (file_bytes(f'{{"a":{BYTE},"a":{BYTE}}}', b"x"), "duplicate key 'a'"),
    "two metadata entries of one name": (file_bytes('{"__metadata__":{"a":"b","a":"c"}}'), "duplicate key 'a'"),
    "an unknown field given twice": (file_bytes(entry(more=',"x":1,"x":2'), b"x"), "duplicate key 'x'"),
    "a tensor that is a list": (file_bytes('{"a":["U8",[1],[0,1]]}', b"x"), "its entry is ['U8', [1], [0, 1]]"),
    "a dtype that is an object": (
        file_bytes('{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}', b"x"),
        "unknown dtype {'U8': None}",
    ),
    "a dimension that torch can't hold": (
        file_bytes(entry(shape=f"[0,{2**63}]", offsets="[0,0]")),
        "not an integer from 0 to 2^63 - 1",
    ),
}


@pytest.mark.parametrize(("raw", "reason"), STRICTER.values(), ids=STRICTER)
def test_refused_although_the_library_accepts(raw: bytes, reason: str) -> None:
    assert library_tensors(raw) is not None
    error = parse_or_error(raw)
    assert isinstance(error, str)
    assert reason in error
