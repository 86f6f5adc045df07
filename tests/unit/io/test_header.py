"""The header is read and built as the safetensors library has it; each rule, and where we are stricter, has a test."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import tracemalloc
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergeloom.errors import CheckpointError, EnvironmentFailure
from mergeloom.io.safetensors.dtypes import BF16, DTYPES, F32, DType
from mergeloom.io.safetensors.header import MAX_JSON_BYTES, PAGE, Header, build_header, parse_header, read_header

FILE = Path("x.safetensors")
BYTE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
"""The entry of a tensor of one byte at the start of the data."""


def whole(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header's JSON and data."""
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "U8", shape: str = "[1]", offsets: str = "[0,1]", more: str = "") -> str:
    """A header's JSON with one tensor, from pieces of JSON."""
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}}}'


def ours(raw: bytes) -> Header | str:
    """Our header, or why we refuse it. Any other exception is a bug."""
    try:
        return parse_header(raw, len(raw), file=FILE)
    except CheckpointError as error:
        return str(error)


def accepted_by_the_library(raw: bytes) -> list[tuple[str, dict[str, Any]]] | None:
    """The tensors as the safetensors library gives them, or None where it refuses."""
    try:
        return safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None


# ------------------------------------------------------------------------------------------- what both accept

ACCEPTED = {
    "no tensors": whole("{}"),
    "no tensors but metadata": whole('{"__metadata__":{"format":"pt"}}'),
    "metadata that is null": whole(f'{{"__metadata__":null,"a":{BYTE}}}', b"x"),
    "white space after the JSON": whole(f'{{"a":{BYTE}}}\n\t  ', b"x"),
    "an empty name": whole(f'{{"":{BYTE}}}', b"x"),
    "a NUL in a name": whole(f'{{"a\\u0000":{BYTE}}}', b"x"),
    "an escaped pair of surrogates": whole(f'{{"\\ud83d\\ude00":{BYTE}}}', b"x"),
    "a 0-d tensor": whole(entry(shape="[]"), b"x"),
    "an empty tensor": whole(entry(shape="[3,0]", offsets="[0,0]")),
    "a size that only a zero at the front keeps small": whole(
        entry(shape=f"[0,{2**40},{2**40}]", offsets="[0,0]"),
    ),
    "2^61 elements times zero": whole(entry(shape=f"[{2**61},0]", offsets="[0,0]")),
    "empty tensors between others": whole(
        f'{{"b":{{"dtype":"F32","shape":[0],"data_offsets":[1,1]}},"a":{BYTE},'
        '"c":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"x",
    ),
    "tensors in another order than their bytes": whole(
        f'{{"b":{{"dtype":"U8","shape":[1],"data_offsets":[1,2]}},"a":{BYTE}}}', b"xy"
    ),
    "a tensor that isn't aligned to its elements": whole(
        f'{{"a":{BYTE},"b":{{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}}}', b"xyyyy"
    ),
    "F4 that fills whole bytes": whole(entry("F4", "[3,2]", "[0,3]"), b"xxx"),
    "F6 that fills whole bytes": whole(entry("F6_E3M2", "[4]", "[0,3]"), b"xxx"),
    "a field that the format doesn't have": whole(entry(more=',"x":[1,{"y":1e-400}]'), b"x"),
    "an integer of 300 digits in an unknown field": whole(entry(more=f',"x":{"9" * 300}'), b"x"),
    "nesting at serde_json's limit": whole(entry(more=f',"x":{"[" * 125}{"]" * 125}'), b"x"),
}


@pytest.mark.parametrize("raw", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_as_the_library_does(raw: bytes) -> None:
    assert_same_tensors(raw)


def assert_same_tensors(raw: bytes) -> Header:
    """Both accept a file, and find the same bytes under the same names."""
    header, judged = ours(raw), accepted_by_the_library(raw)
    assert isinstance(header, Header), header
    assert judged is not None, "the library refuses it"
    found = {
        name: (tensor.dtype.name, list(tensor.shape), raw[tensor.offset : tensor.offset + tensor.nbytes])
        for name, tensor in header.tensors.items()
    }
    assert found == {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in judged}
    return header


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_has_the_width_that_the_library_gives_it(dtype: DType) -> None:
    nbytes = dtype.bits * 4 // 8
    assert_same_tensors(whole(entry(dtype.name, "[4]", f"[0,{nbytes}]"), b"x" * nbytes))


def test_tensors_come_in_the_order_of_their_bytes_with_offsets_from_the_start_of_the_file() -> None:
    raw = ACCEPTED["tensors in another order than their bytes"]
    header = assert_same_tensors(raw)
    assert list(header.tensors) == ["a", "b"]
    assert header.data_start == len(raw) - 2
    assert [tensor.offset for tensor in header.tensors.values()] == [len(raw) - 2, len(raw) - 1]
    assert header.tensors["a"].file is FILE


def test_metadata_is_given() -> None:
    header = ours(whole(f'{{"__metadata__":{{"format":"pt","é":""}},"a":{BYTE}}}', b"x"))
    assert isinstance(header, Header)
    assert header.metadata == {"format": "pt", "é": ""}


# ------------------------------------------------------------------------------------------- what both refuse

REFUSED = {
    "an empty file": (b"", "is empty"),
    "a file of 7 bytes": (bytes(7), "has 7 bytes"),
    "a header of 0 bytes": (bytes(64), "0 bytes"),
    "a header past the limit": (whole("{}", length=MAX_JSON_BYTES + 1), "100,000,001 bytes"),
    "a header length of 2^64 - 1": (whole("{}", length=2**64 - 1), "limit of 100,000,000"),
    "a header past the end of the file": (whole("{}", length=100), "its header alone has 108: the file is truncated"),
    "a byte order mark": (whole(f'\ufeff{{"a":{BYTE}}}', b"x"), "begins with b'\\xef'"),
    "a list": (whole("[]"), "begins with b'['"),
    "no UTF-8": (whole(f'{{"a\xff":{BYTE}}}'.encode("latin-1"), b"x"), "not UTF-8 (byte 11"),
    "UTF-8 of a surrogate": (whole(f'{{"\ud800":{BYTE}}}'.encode("utf-8", "surrogatepass"), b"x"), "not UTF-8"),
    "half a surrogate pair in a name": (whole(f'{{"\\uD83D":{BYTE}}}', b"x"), "lone surrogate"),
    "half a surrogate pair in the metadata": (whole('{"__metadata__":{"k":"\\udc00"}}'), "lone surrogate"),
    "half a surrogate pair in an unknown field": (whole(entry(more=',"x":"\\udc00"'), b"x"), "lone surrogate"),
    "a control character in a name": (whole(f'{{"a\x01":{BYTE}}}', b"x"), "not valid JSON"),
    "a comma too many": (whole(f'{{"a":{BYTE},}}', b"x"), "not valid JSON"),
    "something after the JSON": (whole(f'{{"a":{BYTE}}}\0', b"x"), "not valid JSON"),
    "NaN": (whole(entry(more=',"x":NaN'), b"x"), "NaN is no JSON"),
    "a number out of range": (whole(entry(more=',"x":1e400'), b"x"), "out of range"),
    "an integer of 5000 digits": (whole(entry(shape=f"[{'9' * 5000}]"), b"x"), "out of range"),
    "a dtype given twice": (whole(entry(more=',"dtype":"U8"'), b"x"), "the key 'dtype' stands there twice"),
    "metadata given twice": (whole('{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' stands there twice"),
    "metadata that is a list": (whole('{"__metadata__":[]}'), "not an object of texts"),
    "metadata that isn't text": (whole('{"__metadata__":{"step":1}}'), "has 1, not a text, under 'step'"),
    "a tensor that is null": (whole('{"a":null}'), "tensor 'a': its entry is None"),
    "no shape": (whole('{"a":{"dtype":"U8","data_offsets":[0,1]}}', b"x"), "has no shape"),
    "no dtype": (whole('{"a":{"shape":[1],"data_offsets":[0,1]}}', b"x"), "has no dtype"),
    "no offsets": (whole('{"a":{"dtype":"U8","shape":[1]}}', b"x"), "has no data_offsets"),
    "an unknown dtype": (whole(entry("F8_E3M4"), b"x"), "its dtype is 'F8_E3M4', which the format doesn't have"),
    "a dtype in lower case": (whole(entry("u8"), b"x"), "its dtype is 'u8'"),
    "a dtype that is a number": (whole('{"a":{"dtype":3,"shape":[1],"data_offsets":[0,1]}}', b"x"), "its dtype is 3"),
    "a shape that is null": (whole(entry(shape="null"), b"x"), "its shape is None, not a list"),
    "a dimension that is true": (whole(entry(shape="[true]"), b"x"), "has True, not an integer"),
    "a dimension that is a float": (whole(entry(shape="[1.0]"), b"x"), "has 1.0, not an integer"),
    "a dimension in exponents": (whole(entry(shape="[1e0]"), b"x"), "not an integer"),
    "a dimension that is text": (whole(entry(shape='["1"]'), b"x"), "has '1', not an integer"),
    "a dimension below zero": (whole(entry(shape="[-1]"), b"x"), "has -1, not an integer"),
    "a dimension of minus zero": (whole(entry(shape="[-0]", offsets="[0,0]")), "not an integer"),
    "a dimension of 2^64": (whole(entry(shape=f"[0,{2**64}]", offsets="[0,0]")), "not an integer"),
    "elements past 64 bits": (whole(entry(shape=f"[{2**40},{2**40},0]", offsets="[0,0]")), "more elements than"),
    "bits past 64 bits": (whole(entry(shape=f"[{2**61}]", offsets=f"[0,{2**61}]")), "more bits than"),
    "F4 that ends inside a byte": (whole(entry("F4"), b"x"), "1 elements of F4, 4 bits each, don't fill whole bytes"),
    "F6 that ends inside a byte": (whole(entry("F6_E2M3", "[5]", "[0,4]"), b"xxxx"), "don't fill whole bytes"),
    "three offsets": (whole(entry(offsets="[0,1,2]"), b"x"), "not two non-negative integers"),
    "one offset": (whole(entry(offsets="[0]"), b"x"), "not two non-negative integers"),
    "offsets that are booleans": (whole(entry(offsets="[false,true]"), b"x"), "not two non-negative integers"),
    "an offset below zero": (whole(entry(offsets="[-1,0]"), b"x"), "[-1, 0], not two non-negative integers"),
    "offsets that end before they begin": (whole(entry(offsets="[1,0]"), b"x"), "end before they begin"),
    "a shape that doesn't match the offsets": (
        whole(entry("F32", "[2,3]", "[0,16]"), bytes(16)),
        "its shape [2, 3] of F32 takes 24 bytes, but its data_offsets [0, 16] hold 16",
    ),
    "two tensors that overlap": (
        whole(f'{{"a":{BYTE},"b":{BYTE}}}', b"x"),
        "tensor 'b': begins at byte 0 of the data, inside 'a'",
    ),
    "a hole between tensors": (
        whole(f'{{"a":{BYTE},"b":{{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}}}', b"xxx"),
        "tensor 'b': begins at byte 2 of the data, but 'a' before it ends at 1",
    ),
    "a hole before the first tensor": (whole(entry(offsets="[2,3]"), b"xxx"), "but the data begins at 0"),
    "an empty tensor inside another": (
        whole(
            '{"b":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            b"xx",
        ),
        "tensor 'b': begins at byte 1 of the data, inside 'a'",
    ),
    "a file that is cut short": (whole(entry(shape="[9]", offsets="[0,9]"), b"x" * 7), "2 too few; the file is truncated"),
    "bytes after the last tensor": (whole(entry(), b"xx"), "what follows is no tensor's"),
    "data without tensors": (whole("{}", b"x"), "what follows is no tensor's"),
    "nesting past serde_json's limit": (whole(entry(more=f',"x":{"[" * 126}{"]" * 126}'), b"x"), "more than 127 deep"),
    "nesting past the interpreter's limit": (whole(entry(more=f',"x":{"[" * 200_000}'), b"x"), "too deeply"),
}


@pytest.mark.parametrize(("raw", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_as_the_library_does(raw: bytes, reason: str) -> None:
    assert accepted_by_the_library(raw) is None
    found = ours(raw)
    assert isinstance(found, str)
    assert found.startswith("x.safetensors: ")
    assert reason in found
    assert "download" in found  # what to do


# ------------------------------------------------------------------------------------------- where we are stricter

STRICTER = {
    "white space before the JSON": (whole(f' {{"a":{BYTE}}}', b"x"), "begins with b' '"),
    "two tensors of one name": (whole(f'{{"a":{BYTE},"a":{BYTE}}}', b"x"), "the key 'a' stands there twice"),
    "two metadata entries of one name": (whole('{"__metadata__":{"a":"b","a":"c"}}'), "the key 'a' stands there twice"),
    "an unknown field given twice": (whole(entry(more=',"x":1,"x":2'), b"x"), "the key 'x' stands there twice"),
    "a tensor that is a list": (whole('{"a":["U8",[1],[0,1]]}', b"x"), "its entry is ['U8', [1], [0, 1]]"),
    "a dtype that is an object": (
        whole('{"a":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}', b"x"),
        "its dtype is {'U8': None}",
    ),
    "a dimension that torch can't hold": (
        whole(entry(shape=f"[0,{2**63}]", offsets="[0,0]")),
        "not an integer from 0 to 2^63 - 1",
    ),
}


@pytest.mark.parametrize(("raw", "reason"), STRICTER.values(), ids=STRICTER)
def test_refused_although_the_library_accepts(raw: bytes, reason: str) -> None:
    assert accepted_by_the_library(raw) is not None
    found = ours(raw)
    assert isinstance(found, str)
    assert reason in found


def is_stricter(raw: bytes, reason: str) -> bool:
    """Whether we refuse, for `reason`, what the library accepts, by one of the rules above."""
    return (
        "stands there twice" in reason
        or ("its header begins with b" in reason and raw[8:9] in b" \t\r\n")
        or "its entry is [" in reason
        or ("its dtype is {" in reason and b"null" in raw)
        or ("not an integer from 0 to 2^63 - 1" in reason and b"9223372036854775808" in raw)
    )


# ------------------------------------------------------------------------------------------- the verdict over mutations

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3)
DATA = st.randoms(use_true_random=False)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[tuple[str, DType, list[int]]]:
    """Names, dtypes and shapes of a few small tensors that fill whole bytes."""
    tensors = []
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(SHAPES)
        if dtype.bits * prod(shape) % 8:
            shape = [*shape, 4]
        tensors.append((name, dtype, shape))
    return tensors


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
    text = json.dumps({name: document[name] for name in order}, ensure_ascii=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 1))):
        begin = draw(st.integers(0, len(text)))
        end = begin + draw(st.integers(0, 3))
        text = text[:begin] + draw(TEXTS) + text[end:]
    length, data = draw(st.sampled_from([0, 0, 0, 0, 1, -1, 2**40])), draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    encoded = text.encode()
    return whole(encoded, draw(DATA).randbytes(max(size + data, 0)), max(len(encoded) + length, 0))


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


@settings(max_examples=400, deadline=None)
@given(mutated_files())
@example(whole(f'{{"a":{BYTE},"a":{BYTE}}}', b"x"))
def test_verdict_is_the_librarys_over_mutated_files(raw: bytes) -> None:
    found, judged = ours(raw), accepted_by_the_library(raw)
    if isinstance(found, Header):
        assert_same_tensors(raw)
    elif judged is not None:
        assert is_stricter(raw, found), found


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 70))
def test_verdict_is_the_librarys_over_noise(noise: bytes, length: int) -> None:
    for raw in (noise, whole(noise, length=length), whole(b"{" + noise, length=length)):
        found, judged = ours(raw), accepted_by_the_library(raw)
        assert isinstance(found, Header) <= (judged is not None)
        assert judged is None or isinstance(found, Header) or is_stricter(raw, found)


# ------------------------------------------------------------------------------------------- what else errors say


@pytest.mark.parametrize(
    ("begin", "meaning"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\3\4\0\0\10\10" + bytes(8), "pickle"),
        (b"GGUF\3\0\0\0" + bytes(8), "GGUF"),
        (b"<!DOCTYPE html>", "a web page"),
        (b'{"weight_map": {}}', "a JSON text"),
    ],
)
def test_a_file_of_another_kind_is_named(begin: bytes, meaning: str) -> None:
    found = ours(begin)
    assert isinstance(found, str)
    assert meaning in found


def test_a_hostile_name_is_escaped_and_shortened_in_an_error() -> None:
    name = "\\u001b[2J" + "n" * 100_000
    found = ours(whole(f'{{"{name}":null}}'))
    assert isinstance(found, str)
    assert "\x1b" not in found
    assert len(found) < 1000


def test_a_raw_that_ends_inside_the_header_is_a_mistake_of_the_caller() -> None:
    raw = ACCEPTED["a 0-d tensor"]
    with pytest.raises(ValueError, match="were given"):
        parse_header(raw[:20], len(raw), file=FILE)


# ------------------------------------------------------------------------------------------- reading files


def test_read_header_reads_a_file_without_its_tensors(tmp_path: Path) -> None:
    file = tmp_path / "sparse.safetensors"
    head = build_header([("a", BF16, (1 << 20, 1 << 20))], {})
    file.write_bytes(head)
    os.truncate(file, len(head) + (2 << 40))
    header = read_header(file)
    assert header.tensors["a"].nbytes == 2 << 40
    assert header.tensors["a"].file == file


def test_read_header_of_a_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "short.safetensors"
    file.write_bytes(build_header([("a", F32, (4,))], {}) + bytes(15))
    with pytest.raises(CheckpointError, match="1 too few; the file is truncated"):
        read_header(file)


def test_read_header_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.safetensors: there is no such file"):
        read_header(tmp_path / "missing.safetensors")


def test_read_header_of_a_broken_link(tmp_path: Path) -> None:
    link = tmp_path / "x.safetensors"
    link.symlink_to("../../blobs/abc")
    with pytest.raises(CheckpointError, match="is a broken link"):
        read_header(link)


def test_read_header_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory"):
        read_header(tmp_path)


def test_read_header_does_not_wait_for_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [
        (errno.EACCES, CheckpointError, "check its owner and mode"),
        (errno.EIO, EnvironmentFailure, "check the disk"),
        (errno.EMFILE, EnvironmentFailure, "can.t be read"),
    ],
)
def test_read_header_tells_a_forbidden_file_from_a_failing_system(
    number: int, error: type[Exception], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(error, match=reason):
        read_header(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------- building


@settings(max_examples=200, deadline=None)
@given(tensor_lists(), st.dictionaries(NAMES, NAMES, max_size=3), st.none() | st.integers(0, PAGE - 1), DATA)
def test_the_library_opens_what_is_built_and_finds_the_same_tensors(
    tensors: list[tuple[str, DType, list[int]]], metadata: dict[str, str], modulo: int | None, data: Any
) -> None:
    head = build_header(tensors, metadata, data_offset_modulo=modulo)
    assert len(head) % (8 if modulo is None else PAGE) == (modulo or 0)
    raw = head + data.randbytes(sum(dtype.nbytes(prod(shape)) for _, dtype, shape in tensors))
    header = assert_same_tensors(raw)
    assert [(name, t.dtype, list(t.shape)) for name, t in header.tensors.items()] == tensors
    assert header.metadata == metadata
    assert header.data_start == len(head)


def test_a_built_file_opens_with_safe_open(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(
        build_header([("b", F32, (2,)), ("a", BF16, ())], {"format": "pt"}, data_offset_modulo=4095) + bytes(10)
    )
    with safetensors.safe_open(file, framework="np") as opened:
        assert sorted(opened.keys()) == ["a", "b"]
        assert opened.metadata() == {"format": "pt"}
        assert opened.get_slice("b").get_shape() == [2]


@pytest.mark.parametrize("modulo", [0, 1, 7, 4088, 4095])
def test_any_residue_of_the_data_is_reached_by_spaces(modulo: int) -> None:
    head = build_header([("a", F32, (1,))], {}, data_offset_modulo=modulo)
    assert len(head) % PAGE == modulo
    assert head[8:].rstrip(b" ") == b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", F32, (1,)), ("a", F32, (1,))],
        [("__metadata__", F32, (1,))],
        [("\ud800", F32, (1,))],
        [("a", F32, (-1,))],
        [("a", DTYPES["F4"], (3,))],
        [("a" * MAX_JSON_BYTES, F32, (1,))],
    ],
    ids=["twice", "the metadata's name", "no text", "negative", "part of a byte", "too long"],
)
def test_what_no_file_can_hold_is_not_built(tensors: list[tuple[str, DType, tuple[int, ...]]]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (any of several)
        build_header(tensors, {})


def test_a_residue_outside_the_page_is_refused() -> None:
    with pytest.raises(ValueError, match="data_offset_modulo is 4096"):
        build_header([], {}, data_offset_modulo=PAGE)


# ------------------------------------------------------------------------------------------- cost


def test_100_000_tensors_parse() -> None:
    tensors = [
        (f"model.layers.{i // 768}.mlp.experts.{i % 768}.up_proj.weight", BF16, (2048, 7168)) for i in range(100_000)
    ]
    head = build_header(tensors, {})
    header = parse_header(head, len(head) + 100_000 * 2048 * 7168 * 2, file=FILE)
    assert len(header.tensors) == 100_000


def test_parsing_takes_little_memory() -> None:
    tensors = [(f"model.layers.{i}.mlp.up_proj.weight", BF16, (2048, 7168)) for i in range(5_000)]
    head = build_header(tensors, {})
    tracemalloc.start()
    try:
        header = parse_header(head, len(head) + 5_000 * 2048 * 7168 * 2, file=FILE)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(header.tensors) == 5_000
    assert held / 5_000 < 600
    assert peak / 5_000 < 1200


def test_io_imports_no_torch() -> None:
    code = (
        "import sys; from mergeloom.io.safetensors import checkpoint, header, identity; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'safetensors', 'networkx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
