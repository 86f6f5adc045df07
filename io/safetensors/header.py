"""The safetensors header: parse it with every rule of the format checked, read it from a file, build it.

A file is 8 bytes (the JSON's length, little-endian), the JSON, and the tensors' bytes end to end
(https://github.com/huggingface/safetensors#format). The safetensors library is the judge of what a valid header is:
tests hold what is accepted and refused here against its verdict (0.8.0). Where we refuse what it accepts, a comment
that begins with "Stricter" says why; we accept nothing that it refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from ...errors import CheckpointError
from ..open_source import open_source, quoted, read_range
from .dtypes import DTYPES, DType
from .tensors import TensorRef

MAX_JSON_BYTES = 100_000_000
"""The format's limit for the header's JSON, in bytes."""

PAGE = 4096
"""The modulus of `build_header`'s `data_offset_modulo`, in bytes: the block of the file systems that share blocks."""

_PREFIX = 8  # bytes that hold the JSON's length
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_MAX_DEPTH = 127  # serde_json's limit on objects and lists inside each other
_MAX_COUNT = 1 << 64  # the library counts elements and bits of a tensor in 64 bits, unsigned
_MAX_DIMENSION = 1 << 63

_DAMAGED = (
    "the header is damaged, or was written by a faulty tool: download the file again, or save it again with the "
    "safetensors library"
)
_CUT_SHORT = "the file is cut short, as a broken download or copy leaves it: download it again"

_FOREIGN = (
    (b"version ", "a Git LFS pointer, which stands for the weights: run `git lfs pull`, or download the file itself"),
    (
        b"PK\3\4",
        "a pickle archive of PyTorch, which mergeloom never opens: get the safetensors file",
    ),
    (b"GGUF", "a GGUF file, which mergeloom doesn't read: get the model's safetensors files"),
    (b"\x89HDF", "an HDF5 file, which mergeloom doesn't read: get the model's safetensors files"),
    (b"<", "a web page, as a failed download leaves it: download the file again"),
    (b"{", "a JSON text: name the model's directory, or its .safetensors file"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself.

    Args:
        tensors: the tensors by name, in the order in which their bytes lie in the file.
        metadata: the free text of ``__metadata__``; empty where there is none.
        data_start: where the tensors' bytes begin, in bytes from the start of the file.
    """

    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    data_start: int


# ------------------------------------------------------------------------------------------------ reading


def read_data_start(descriptor: int, size: int, *, file: Path) -> int:
    """Where the data of an open safetensors file of `size` bytes begins; see `data_start`."""
    return data_start(read_range(descriptor, 0, min(_PREFIX, size), file=file), size, file=file)


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file; none of its tensors is read.

    Raises:
        CheckpointError: the file is missing, may not be read, or breaks a rule of the format.
        EnvironmentFailure: the disk got in the way.
    """
    with open_source(file) as (descriptor, size):
        start = read_data_start(descriptor, size, file=file)
        return parse_header(read_range(descriptor, 0, start, file=file), size, file=file)


# ------------------------------------------------------------------------------------------------ parsing


def data_start(prefix: bytes, file_size: int, *, file: Path) -> int:
    """Where the data begins, in bytes, from the first 8 bytes of a file: 8 + the JSON's length, within all bounds.

    Raises:
        CheckpointError: the file is too short, is something else, or the length is past the format's limit or the
            file's end.
    """
    if len(prefix) < _PREFIX:
        if file_size == 0:
            _refuse(file, "is empty, as an unfinished download leaves it: download it again")
        _refuse(file, f"has {file_size} bytes, too few for a safetensors header: {_CUT_SHORT}")
    nbytes = int.from_bytes(prefix[:_PREFIX], "little")
    if nbytes > MAX_JSON_BYTES:
        for magic, meaning in _FOREIGN:
            if prefix.startswith(magic):
                _refuse(file, f"is no safetensors file: it is {meaning}")
        _refuse(
            file,
            f"its first 8 bytes give a header of {nbytes:,} bytes, past the format's limit of {MAX_JSON_BYTES:,}: it "
            "is no safetensors file, or damaged: download it again",
        )
    if nbytes == 0:
        _refuse(file, f"gives its header 0 bytes, as an unfinished download that reserved its space does: {_DAMAGED}")
    if nbytes > file_size - _PREFIX:
        _refuse(file, f"has {file_size:,} bytes, but its header alone takes {_PREFIX + nbytes:,}: {_CUT_SHORT}")
    return _PREFIX + nbytes


def parse_header(raw: bytes, file_size: int, *, file: Path) -> Header:
    """Parse a header and check every rule of the format.

    Args:
        raw: the file's bytes from its first one on: at least the 8 bytes of the length and the whole JSON.
        file_size: the size of the whole file in bytes.
        file: the file, for the references and for errors.

    Raises:
        CheckpointError: a rule is broken; says in which tensor, what was found, and what to do.
        ValueError: `raw` ends before the JSON does although the file goes on (a mistake of the caller).
    """
    start = data_start(raw[:_PREFIX], file_size, file=file)
    if len(raw) < start:
        raise ValueError(f"{len(raw)} bytes were given of a header of {start}")
    document = _parse_json(raw, start, file)
    metadata = _check_metadata(document.pop(_METADATA, None), file)
    in_order, last = True, start
    for name, entry in document.items():
        # The reference takes the entry's place at once, so that the two never stand in memory side by side.
        document[name] = tensor = _tensor(name, entry, start, file)
        in_order = in_order and tensor.offset >= last
        last = tensor.offset + tensor.nbytes
    if not in_order:
        document = dict(sorted(document.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_coverage(document, start, file_size, file)
    return Header(MappingProxyType(document), MappingProxyType(metadata), start)


class _MalformedError(ValueError):
    """JSON that the stdlib's parser takes and the format doesn't."""


def _refuse(file: Path, found: str) -> NoReturn:
    raise CheckpointError(f"{file}: {found}")


def _refuse_tensor(file: Path, name: str, found: str) -> NoReturn:
    raise CheckpointError(f"{file}: tensor {quoted(name)}: {found}: {_DAMAGED}")


def _parse_json(raw: bytes, end: int, file: Path) -> dict[str, Any]:
    """The header's object, by the JSON that serde_json reads, which is narrower than the stdlib's."""
    # Stricter than the library, which skips white space before the brace: the format says that the header begins
    # with it, and other readers hold to that.
    if raw[_PREFIX : _PREFIX + 1] != b"{":
        first = bytes(raw[_PREFIX : _PREFIX + 1])
        _refuse(file, f"its header begins with {quoted(first)}, not with '{{': {_DAMAGED}")
    try:
        text = str(memoryview(raw)[_PREFIX:end], "utf-8")
        document: dict[str, Any] = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
        if "\\ud" in text or "\\uD" in text:  # else no surrogate can be in it
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        _refuse(file, f"its header is not UTF-8 (byte {_PREFIX + error.start} of the file): {_DAMAGED}")
    except UnicodeEncodeError:
        _refuse(file, f"its header escapes half a character (a lone surrogate): {_DAMAGED}")
    except RecursionError:
        _refuse(file, f"its header nests lists or objects too deeply: {_DAMAGED}")
    except ValueError as error:
        _refuse(file, f"its header is not valid JSON ({error}): {_DAMAGED}")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        # Stricter than the library, which takes the last of two tensors or metadata entries of one name: the format
        # disallows duplicate keys, and with one the file means different things to different readers.
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _MalformedError(f"the key {quoted(twice)} stands there twice")
    return found


def _integer(text: str) -> int | float:
    # As serde_json has it: what doesn't fit 64 bits, and -0, is a float. That also keeps int() from long digit strings.
    return int(text) if len(text) <= 20 and text != "-0" else _real(text)


def _real(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise _MalformedError(f"the number {quoted(text)} is out of range")
    return value


def _constant(text: str) -> NoReturn:
    raise _MalformedError(f"{text} is no JSON")


def _check_metadata(found: Any, file: Path) -> dict[str, str]:
    if found is None:
        return {}
    if type(found) is not dict:
        _refuse(file, f"its {_METADATA} is {quoted(found)}, not an object of texts: {_DAMAGED}")
    for key, value in found.items():
        if type(value) is not str:
            _refuse(file, f"its {_METADATA} has {quoted(value)}, not a text, under {quoted(key)}: {_DAMAGED}")
    return found


def _tensor(name: str, entry: Any, start: int, file: Path) -> TensorRef:
    """One tensor's entry as a reference. Its place among the others is not looked at."""
    # Stricter than the library, whose parser also takes a list [dtype, shape, data_offsets] for the object, and
    # {"F32": null} for a dtype: both are accidents of serde, not of the format.
    if type(entry) is not dict:
        _refuse_tensor(file, name, f"its entry is {quoted(entry)}, not an object")
    try:
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as error:
        _refuse_tensor(file, name, f"its entry has no {error.args[0]}")
    if len(entry) > len(_FIELDS):  # the library skips fields that it doesn't know
        _check_depth(name, [entry[field] for field in entry if field not in _FIELDS], file)
    dtype = DTYPES.get(dtype_name) if type(dtype_name) is str else None
    if dtype is None:
        raise CheckpointError(
            f"{file}: tensor {quoted(name)}: its dtype is {quoted(dtype_name)}, which the format doesn't have (it has "
            f"{', '.join(DTYPES)}): if it is newer than this mergeloom, update mergeloom; else {_DAMAGED}"
        )
    if type(shape) is not list:
        _refuse_tensor(file, name, f"its shape is {quoted(shape)}, not a list")
    elements = 1
    for dimension in shape:
        # Stricter than the library, which takes a dimension of 2^63 or more beside a zero: no torch or numpy can hold
        # such a shape.
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
            file, name, f"its {elements:,} elements of {dtype.name}, {dtype.bits} bits each, don't fill whole bytes"
        )
    begin, end = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or begin < 0 or end < 0:
        _refuse_tensor(file, name, f"its data_offsets are {quoted(offsets)}, not two non-negative integers")
    if begin > end:
        _refuse_tensor(file, name, f"its data_offsets {offsets} end before they begin")
    nbytes = bits // 8
    if end - begin != nbytes:
        _refuse_tensor(
            file,
            name,
            f"its shape {quoted(shape)} of {dtype.name} takes {nbytes:,} bytes, but its data_offsets {offsets} hold "
            f"{end - begin:,}",
        )
    return TensorRef(file, start + begin, nbytes, dtype, tuple(shape))


def _check_depth(name: str, level: list[Any], file: Path) -> None:
    depth = 2  # the header's object and the tensor's
    while level := [value for value in level if isinstance(value, (dict, list))]:
        depth += 1
        if depth > _MAX_DEPTH:
            _refuse_tensor(file, name, f"its entry nests lists or objects more than {_MAX_DEPTH} deep")
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]


def _check_coverage(tensors: Mapping[str, TensorRef], start: int, file_size: int, file: Path) -> None:
    """The tensors, in the order of their bytes, must cover all that follows the header, once."""
    end, before = start, ""
    for name, tensor in tensors.items():
        if tensor.offset != end:
            place = f"begins at byte {tensor.offset - start:,} of the data"
            if tensor.offset < end:
                _refuse_tensor(file, name, f"{place}, inside {quoted(before)}, which ends at {end - start:,}")
            after = f"{quoted(before)} before it ends" if before else "the data begins"
            _refuse_tensor(file, name, f"{place}, but {after} at {end - start:,}: bytes that no tensor names")
        end += tensor.nbytes
        before = name
    if end > file_size:
        _refuse(
            file,
            f"has {file_size:,} bytes, but its header promises {end:,} (its last tensor is {quoted(before)}): "
            f"{end - file_size:,} too few; {_CUT_SHORT}",
        )
    if end < file_size:
        _refuse(
            file,
            f"has {file_size:,} bytes, but its header promises {end:,}: what follows is no tensor's, and the file is "
            "damaged (two downloads into one file, or another file's header): download it again",
        )


# ------------------------------------------------------------------------------------------------ building


def build_header(
    tensors: Iterable[tuple[str, DType, Sequence[int]]],
    metadata: Mapping[str, str],
    *,
    data_offset_modulo: int | None = None,
) -> bytes:
    """The first bytes of a safetensors file, up to where the data begins; a function of the arguments alone.

    Args:
        tensors: names, element types and shapes, in the order in which their bytes will lie, end to end.
        metadata: the free text for ``__metadata__``, in this order; left out where it is empty.
        data_offset_modulo: where the data shall begin, in bytes modulo `PAGE`: any of 0 to 4095. Without it, the data
            begins at a multiple of 8, as the library has it. Spaces after the JSON, which the format allows, fill up.

    Returns:
        The 8 bytes of the JSON's length, the JSON and the spaces; its length is the data's offset in the file.

    Raises:
        ValueError: a name that stands twice, is ``__metadata__`` or is no Unicode text; a negative dimension; elements
            that don't fill whole bytes; a JSON past the format's limit.
    """
    if data_offset_modulo is not None and not 0 <= data_offset_modulo < PAGE:
        raise ValueError(f"data_offset_modulo is {data_offset_modulo}, not in 0 to {PAGE - 1}")
    quote = json.encoder.encode_basestring  # as json.dumps(..., ensure_ascii=False) has a string
    members = []
    if metadata:
        texts = ",".join(f"{quote(key)}:{quote(value)}" for key, value in metadata.items())
        members.append(f'"{_METADATA}":{{{texts}}}')
    names = {_METADATA}
    begin = 0
    for name, dtype, shape in tensors:
        if name in names:
            raise ValueError(f"two tensors have the name {quoted(name)}, or it is the metadata's")
        names.add(name)
        elements = 1
        for dimension in shape:
            if dimension < 0:
                raise ValueError(f"tensor {quoted(name)} has the shape {quoted(tuple(shape))}")
            elements *= dimension
        end = begin + dtype.nbytes(elements)
        dimensions = ",".join(map(str, shape))
        members.append(
            f'{quote(name)}:{{"dtype":"{dtype.name}","shape":[{dimensions}],"data_offsets":[{begin},{end}]}}'
        )
        begin = end
    text = ("{" + ",".join(members) + "}").encode()
    size = _PREFIX + len(text)
    padding = -size % 8 if data_offset_modulo is None else (data_offset_modulo - size) % PAGE
    nbytes = len(text) + padding
    if nbytes > MAX_JSON_BYTES:
        raise ValueError(f"the header takes {nbytes:,} bytes, past the format's limit of {MAX_JSON_BYTES:,}")
    return b"".join((nbytes.to_bytes(_PREFIX, "little"), text, b" " * padding))
