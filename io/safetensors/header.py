"""Reads, validates and builds safetensors headers.

A file consists of 8 bytes (the JSON's length, little-endian), the JSON, and the concatenated bytes of the tensors
(https://github.com/huggingface/safetensors#format). The safetensors library (0.8.0) is the reference for validity:
tests compare its result with ours. We accept nothing that it rejects. Where we reject what it accepts, a comment that
starts with "Stricter" says why.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from sys import intern
from types import MappingProxyType
from typing import Any, NoReturn

from ...errors import CheckpointError
from ..open_source import open_source, quoted, read_range
from ..tensors.dtypes import DTYPES, DType
from ..tensors.refs import TensorClass, TensorRef
from ..tensors.table import TensorTable
from .columns import parse_columns
from .strict_json import parse_strictly

MAX_JSON_BYTES = 100_000_000
"""The format's limit on the size of the header's JSON in bytes."""

PAGE = 4096
"""The modulus of `build_header`'s `data_offset_modulo` in bytes: the block size of file systems with reflinks."""

_PREFIX = 8  # bytes that hold the JSON's length
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_DEPTH = 127  # serde_json's limit on nesting
_MAX_COUNT = 1 << 64  # the library counts a tensor's elements and bits as unsigned 64-bit integers
_MAX_DIMENSION = 1 << 63

_DAMAGED = (
    "the header is damaged or was written by a faulty tool: download the file again, or save it again with the "
    "safetensors library"
)
_TRUNCATED = "the file is truncated, probably by an interrupted download or copy: download it again"

_FOREIGN = (
    (b"version ", "a Git LFS pointer, not the weights: run `git lfs pull`, or download the file itself"),
    (
        b"PK\3\4",
        "a PyTorch pickle archive: rename it to pytorch_model.bin, or download the safetensors file",
    ),
    (b"GGUF", "a GGUF file, which mergeloom can't read: download the model's safetensors files"),
    (b"\x89HDF", "an HDF5 file, which mergeloom can't read: download the model's safetensors files"),
    (b"<", "a web page, probably from a failed download: download the file again"),
    (b"{", "a JSON file: use the path of the model's directory or of its .safetensors file"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed safetensors header: the tensors in columns, ordered by offset.

    Args:
        file: the file.
        names: the names, interned.
        classes: the class of each tensor.
        offsets: the position of each tensor's first byte in the file, in bytes.
        metadata: the strings in ``__metadata__``; empty if there are none.
        data_start: the offset of the tensor data in the file, in bytes.
    """

    file: Path
    names: Sequence[str]
    classes: Sequence[TensorClass]
    offsets: Sequence[int]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def tensors(self) -> TensorTable:
        """The tensors by name, in a table of their own."""
        table = TensorTable()
        table.add(self.file, self.names, self.classes, self.offsets)
        return table


# ------------------------------------------------------------------------------------------------ reading


def read_data_start(descriptor: int, size: int, *, file: Path) -> int:
    """Read the data offset of an open safetensors file of `size` bytes; see `data_start`."""
    return data_start(read_range(descriptor, 0, min(_PREFIX, size), file=file), size, file=file)


def read_header(file: Path) -> Header:
    """Read and validate the header of a safetensors file, without its tensor data.

    Raises:
        CheckpointError: the file is missing, not readable, or breaks a rule of the format.
        EnvironmentFailure: reading failed.
    """
    raw, size = read_raw_header(file)
    return parse_header(raw, size, file=file)


def read_raw_header(file: Path) -> tuple[bytes, int]:
    """Read the header of a safetensors file without parsing it; returns it and the size of the file in bytes.

    Raises:
        CheckpointError: the file is missing, not readable, or too short for its header.
        EnvironmentFailure: reading failed.
    """
    with open_source(file) as (descriptor, size):
        start = read_data_start(descriptor, size, file=file)
        return read_range(descriptor, 0, start, file=file), size


# ------------------------------------------------------------------------------------------------ parsing


def data_start(prefix: bytes, file_size: int, *, file: Path) -> int:
    """Compute the data offset (8 + the JSON's length) in bytes from the first 8 bytes of a file.

    Raises:
        CheckpointError: the file is too short, is not a safetensors file, or the length exceeds a limit.
    """
    if len(prefix) < _PREFIX:
        if file_size == 0:
            _refuse(file, "is empty, probably from an interrupted download: download it again")
        _refuse(file, f"has {file_size} bytes, too few for a safetensors header: {_TRUNCATED}")
    nbytes = int.from_bytes(prefix[:_PREFIX], "little")
    if nbytes > MAX_JSON_BYTES:
        for magic, meaning in _FOREIGN:
            if prefix.startswith(magic):
                _refuse(file, f"is not a safetensors file but {meaning}")
        if file.suffix != ".safetensors":
            _refuse(file, "is not a model: a model is a directory, a .safetensors file, or an index of shards")
        _refuse(
            file,
            f"its first 8 bytes give a header of {nbytes:,} bytes, past the format's limit of {MAX_JSON_BYTES:,}: it "
            "is damaged or not a safetensors file: download it again",
        )
    if nbytes == 0:
        _refuse(file, f"its header has 0 bytes, probably because its download was interrupted: {_DAMAGED}")
    if nbytes > file_size - _PREFIX:
        _refuse(file, f"has {file_size:,} bytes, but its header alone has {_PREFIX + nbytes:,}: {_TRUNCATED}")
    return _PREFIX + nbytes


def parse_header(raw: bytes, file_size: int, *, file: Path) -> Header:
    """Parse a header and check all rules of the format.

    Args:
        raw: the first bytes of the file, with at least the 8 bytes of the length and the complete JSON.
        file_size: the size of the file in bytes.
        file: the file, for references and errors.

    Raises:
        CheckpointError: the header breaks a rule of the format.
        ValueError: `raw` does not contain the complete JSON (a mistake of the caller).
    """
    start = data_start(raw[:_PREFIX], file_size, file=file)
    if len(raw) < start:
        raise ValueError(f"got {len(raw)} bytes of a header of {start}")
    columns = parse_columns(memoryview(raw)[_PREFIX:start])
    if columns is not None and start + columns.ends[-1] == file_size:
        offsets = array("Q", map(start.__add__, (0, *columns.ends[:-1])))
        return Header(file, columns.names, columns.classes, offsets, MappingProxyType(dict(columns.metadata)), start)
    return _parse_any(raw, start, file_size, file)


def _parse_any(raw: bytes, start: int, file_size: int, file: Path) -> Header:
    """Parse a header of any form, with the data at `start`; see `parse_header`."""
    document = {intern(name): entry for name, entry in _parse_json(raw, start, file).items()}
    metadata = _check_metadata(document.pop(_METADATA, None), file)
    in_order, last = True, start
    for name, entry in document.items():
        # Replace each entry at once, to save memory: a header can describe millions of tensors.
        document[name] = tensor = _tensor(name, entry, start, file)
        in_order = in_order and tensor.offset >= last
        last = tensor.offset + tensor.nbytes
    if not in_order:
        document = dict(sorted(document.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_coverage(document, start, file_size, file)
    refs = document.values()
    classes = [TensorClass(ref.dtype, ref.shape, ref.nbytes) for ref in refs]
    offsets = array("Q", (ref.offset for ref in refs))
    return Header(file, tuple(document), classes, offsets, MappingProxyType(metadata), start)


def _refuse(file: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{file}: {problem}")


def _refuse_tensor(file: Path, name: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{file}: tensor {quoted(name)}: {problem}: {_DAMAGED}")


def _parse_json(raw: bytes, end: int, file: Path) -> dict[str, Any]:
    """Parse the header's JSON with the rules of serde_json, which are stricter than the standard library's."""
    # Stricter than the library, which skips white space before the brace: the format says that the header starts with
    # the brace, and other readers rely on that.
    if raw[_PREFIX : _PREFIX + 1] != b"{":
        first = bytes(raw[_PREFIX : _PREFIX + 1])
        _refuse(file, f"its header starts with {quoted(first)}, not with '{{': {_DAMAGED}")
    try:
        text = str(memoryview(raw)[_PREFIX:end], "utf-8")
        document: dict[str, Any] = parse_strictly(text)
        if "\\ud" in text or "\\uD" in text:  # otherwise it can't contain a surrogate
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        _refuse(file, f"its header is not UTF-8 (byte {_PREFIX + error.start} of the file): {_DAMAGED}")
    except UnicodeEncodeError:
        _refuse(file, f"its header contains a lone surrogate: {_DAMAGED}")
    except RecursionError:
        _refuse(file, f"its header is nested too deeply: {_DAMAGED}")
    except ValueError as error:
        _refuse(file, f"its header is not valid JSON ({error}): {_DAMAGED}")
    return document


def _check_metadata(metadata: Any, file: Path) -> dict[str, str]:
    if metadata is None:
        return {}
    if type(metadata) is not dict:
        _refuse(file, f"its {_METADATA} is {quoted(metadata)}, not an object of strings: {_DAMAGED}")
    for key, value in metadata.items():
        if type(value) is not str:
            _refuse(file, f"its {_METADATA} has {quoted(value)}, not a string, under {quoted(key)}: {_DAMAGED}")
    return metadata


def _tensor(name: str, entry: Any, start: int, file: Path) -> TensorRef:
    """Validate the entry of one tensor, except its position relative to other tensors."""
    # Stricter than the library, which also accepts a list [dtype, shape, data_offsets] as the object and {"F32": null}
    # as a dtype: both are accidents of serde, not part of the format.
    if type(entry) is not dict:
        _refuse_tensor(file, name, f"its entry is {quoted(entry)}, not an object")
    try:
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as error:
        _refuse_tensor(file, name, f"its entry has no {error.args[0]}")
    if len(entry) > len(_FIELDS):  # the library ignores unknown fields
        _check_depth(name, [entry[field] for field in entry if field not in _FIELDS], file)
    dtype = DTYPES.get(dtype_name) if type(dtype_name) is str else None
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor {quoted(name)}: unknown dtype {quoted(dtype_name)} (known are "
            f"{', '.join(DTYPES)}): if it is newer than this mergeloom, update mergeloom; otherwise {_DAMAGED}"
        )
    if type(shape) is not list:
        _refuse_tensor(file, name, f"its shape is {quoted(shape)}, not a list")
    elements = 1
    for dimension in shape:
        # Stricter than the library, which accepts a dimension of 2^63 or more if another one is 0: neither torch nor
        # numpy supports such a shape.
        if type(dimension) is not int or not 0 <= dimension < _MAX_DIMENSION:
            _refuse_tensor(
                file, name, f"its shape {quoted(shape)} has {quoted(dimension)}, not an integer from 0 to 2^63 - 1"
            )
        elements *= dimension
        if elements >= _MAX_COUNT:
            _refuse_tensor(file, name, f"its shape {quoted(shape)} has more elements than 64 bits can count")
    bits = elements * dtype.bits
    if bits >= _MAX_COUNT:
        _refuse_tensor(file, name, f"its shape {quoted(shape)} of {dtype.name} has more bits than 64 bits can count")
    if bits % 8:
        _refuse_tensor(
            file,
            name,
            f"its {elements:,} elements of {dtype.name}, {dtype.bits} bits each, are not a whole number of bytes",
        )
    begin, end = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or begin < 0 or end < 0:
        _refuse_tensor(file, name, f"its data_offsets are {quoted(offsets)}, not two non-negative integers")
    if begin > end:
        _refuse_tensor(file, name, f"its data_offsets {offsets} end before they start")
    nbytes = bits // 8
    if end - begin != nbytes:
        _refuse_tensor(
            file,
            name,
            f"its shape {quoted(shape)} of {dtype.name} takes {nbytes:,} bytes, but its data_offsets {offsets} span "
            f"{end - begin:,}",
        )
    return TensorRef(file, start + begin, nbytes, dtype, tuple(shape))


def _check_depth(name: str, level: list[Any], file: Path) -> None:
    depth = 2  # the objects of the header and the tensor
    while level := [value for value in level if isinstance(value, (dict, list))]:
        depth += 1
        if depth > _MAX_DEPTH:
            _refuse_tensor(file, name, f"its entry is nested more than {_MAX_DEPTH} deep")
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]


def _check_coverage(tensors: Mapping[str, TensorRef], start: int, file_size: int, file: Path) -> None:
    """Check that the tensors, ordered by offset, cover all bytes after the header exactly once."""
    end, before = start, ""
    for name, tensor in tensors.items():
        if tensor.offset != end:
            position = f"starts at byte {tensor.offset - start:,} of the data"
            if tensor.offset < end:
                _refuse_tensor(file, name, f"{position}, inside {quoted(before)}, which ends at {end - start:,}")
            after = f"{quoted(before)} before it ends" if before else "the data starts"
            _refuse_tensor(file, name, f"{position}, but {after} at {end - start:,}: the gap belongs to no tensor")
        end += tensor.nbytes
        before = name
    if end > file_size:
        _refuse(
            file,
            f"has {file_size:,} bytes, but its header describes {end:,} (the last tensor is {quoted(before)}): "
            f"{end - file_size:,} too few; {_TRUNCATED}",
        )
    if end < file_size:
        _refuse(
            file,
            f"has {file_size:,} bytes, but its header describes {end:,}: the rest belongs to no tensor, so the file "
            "is damaged (two downloads into one file, or another file's header): download it again",
        )


# ------------------------------------------------------------------------------------------------ building


def build_header(
    tensors: Iterable[tuple[str, DType, Sequence[int]]],
    metadata: Mapping[str, str],
    *,
    data_offset_modulo: int | None = None,
) -> bytes:
    """Build the first bytes of a safetensors file, up to the tensor data. The result depends only on the arguments.

    Args:
        tensors: names, dtypes and shapes, in the order of their bytes, which are contiguous.
        metadata: the strings for ``__metadata__``, in this order; empty metadata is left out.
        data_offset_modulo: the data offset in bytes modulo `PAGE`, from 0 to 4095. Without it, the data offset is a
            multiple of 8, like the library's. The JSON is padded with spaces, which the format allows.

    Returns:
        The 8 bytes of the JSON's length, the JSON and its padding; the length of the result is the data offset.

    Raises:
        ValueError: a name is a duplicate, is ``__metadata__`` or is not valid Unicode; a dimension is negative; the
            elements of a tensor don't fill an integral number of bytes; the JSON exceeds the format's limit.
    """
    if data_offset_modulo is not None and not 0 <= data_offset_modulo < PAGE:
        raise ValueError(f"data_offset_modulo is {data_offset_modulo}, not in 0 to {PAGE - 1}")
    quote = json.encoder.encode_basestring  # the encoder of json.dumps(..., ensure_ascii=False)
    members = []
    if metadata:
        texts = ",".join(f"{quote(key)}:{quote(value)}" for key, value in metadata.items())
        members.append(f'"{_METADATA}":{{{texts}}}')
    names = {_METADATA}
    known: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}  # a file has few classes of tensors
    begin = 0
    for name, dtype, shape in tensors:
        if name in names:
            raise ValueError(f"{quoted(name)} is a duplicate name, or that of the metadata")
        names.add(name)
        key = (dtype.name, tuple(shape))
        found = known.get(key)
        if found is None:
            if any(dimension < 0 for dimension in shape):
                raise ValueError(f"tensor {quoted(name)} has the invalid shape {quoted(tuple(shape))}")
            fields = f':{{"dtype":"{dtype.name}","shape":[{",".join(map(str, shape))}],"data_offsets":['
            found = known[key] = fields, dtype.nbytes(prod(shape))
        end = begin + found[1]
        members.append(f"{quote(name)}{found[0]}{begin},{end}]}}")
        begin = end
    text = ("{" + ",".join(members) + "}").encode()
    size = _PREFIX + len(text)
    padding = -size % 8 if data_offset_modulo is None else (data_offset_modulo - size) % PAGE
    nbytes = len(text) + padding
    if nbytes > MAX_JSON_BYTES:
        raise ValueError(f"the header has {nbytes:,} bytes, more than the format's limit of {MAX_JSON_BYTES:,}")
    return b"".join((nbytes.to_bytes(_PREFIX, "little"), text, b" " * padding))
