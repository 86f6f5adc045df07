"""Builds header files for tests, and compares our parser with the safetensors library."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import safetensors
from hypothesis import strategies as st

from mergeloom.errors import CheckpointError
from mergeloom.io.safetensors.header import Header, parse_header
from mergeloom.io.tensors.dtypes import DTYPES, DType

FILE = Path("x.safetensors")
BYTE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
"""The entry of a tensor of one byte at the start of the data."""


def file_bytes(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file with this header and data; `length` overrides the length of the header."""
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "U8", shape: str = "[1]", offsets: str = "[0,1]", more: str = "") -> str:
    """The JSON of a header with one tensor, from the JSON of its fields."""
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}}}'


def parse_or_error(raw: bytes) -> Header | str:
    """The parsed header, or the error. Any other exception is a bug."""
    try:
        return parse_header(raw, len(raw), file=FILE)
    except CheckpointError as error:
        return str(error)


def library_tensors(raw: bytes) -> list[tuple[str, dict[str, Any]]] | None:
    """The tensors according to the safetensors library; None if it rejects the file."""
    try:
        return safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return None


def assert_same_tensors(raw: bytes) -> Header:
    """Both accept a file, and find the same bytes under the same names."""
    header, judged = parse_or_error(raw), library_tensors(raw)
    assert isinstance(header, Header), header
    assert judged is not None, "the library refuses it"
    found = {
        name: (tensor.dtype.name, list(tensor.shape), raw[tensor.offset : tensor.offset + tensor.nbytes])
        for name, tensor in header.tensors.items()
    }
    assert found == {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in judged}
    return header


def is_stricter(raw: bytes, reason: str) -> bool:
    """Whether `reason` is one of the rules by which we reject files that the library accepts."""
    return (
        "duplicate key" in reason
        or ("its header starts with b" in reason and raw[8:9] in b" \t\r\n")
        or "its entry is [" in reason
        or ("unknown dtype {" in reason and b"null" in raw)
        or ("not an integer from 0 to 2^63 - 1" in reason and b"9223372036854775808" in raw)
    )


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3)
DATA = st.randoms(use_true_random=False)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[tuple[str, DType, list[int]]]:
    """Names, dtypes and shapes of a few small tensors that fill a whole number of bytes."""
    tensors = []
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(SHAPES)
        if dtype.bits * prod(shape) % 8:
            shape = [*shape, 4]
        tensors.append((name, dtype, shape))
    return tensors
