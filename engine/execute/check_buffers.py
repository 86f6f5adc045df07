"""Compares the buffers of the input models before a merge, and checks that position ids are 0, 1, 2 and so on."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence

from ...io.counters import IoCounters
from ...io.reading import Reader
from ...io.tensors.dtypes import DType, Kind
from ..graph.checks.buffers import BufferCheck, StoredBuffer, buffer_warning
from ..model.warnings import ModelWarning, ModelWarningKind

_ELEMENTS = 1 << 15
"""Number of elements that are read at a time."""
_CODES = {"BOOL": "?", "F64": "d", "F32": "f", "F16": "e"} | {
    f"{sign}{bits}": code if sign == "I" else code.upper()
    for bits, code in ((8, "b"), (16, "h"), (32, "i"), (64, "q"))
    for sign in "IU"
}
_PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
"""Bits of the significand."""
_ROUNDINGS = 4
"""The difference that is accepted between floating-point buffers, in units of the last place: devices and versions of
libraries round the frequencies of rotary embeddings differently."""


def check_buffers(checks: Iterable[BufferCheck], models: Sequence[str], counters: IoCounters) -> list[ModelWarning]:
    """Compare the buffers that a merge copies from one model with those of the other models.

    Args:
        checks: the buffers.
        models: names of the models, by number.
        counters: counters of the bytes that are read to check them.

    Returns:
        What is suspicious.

    Raises:
        CheckpointError: a file is missing or damaged.
        EnvironmentFailure: reading failed.
    """
    warnings: list[ModelWarning] = []
    differing: dict[tuple[int, int], list[tuple[str, str]]] = {}
    reader = Reader()
    try:
        for check in checks:
            chosen = check.chosen
            if check.is_sequence and (text := _not_a_sequence(reader, chosen, counters)):
                name = models[chosen.model]
                warnings.append(
                    ModelWarning(
                        ModelWarningKind.BUFFER,
                        f"buffer {chosen.name} of {name} should be 0 to {chosen.ref.elements - 1}: {text}",
                        "it was probably averaged or edited by another tool: use a model with the original buffer",
                        (chosen.name,),
                    )
                )
            for other in check.others:
                found = _difference(reader, chosen, other, counters)
                if found is not None:
                    index, first, second = found
                    text = f"at {index} is {first:g} in {models[chosen.model]} and {second:g} in {models[other.model]}"
                    differing.setdefault((chosen.model, other.model), []).append((check.name, text))
    finally:
        reader.close()
    for (model, _), found_texts in differing.items():
        names = [name for name, _ in found_texts]
        warnings.append(buffer_warning(names, found_texts[0][1], models[model]))
    return warnings


def _not_a_sequence(reader: Reader, buffer: StoredBuffer, counters: IoCounters) -> str:
    """Describe the first element that is not its own index; empty if there is none."""
    for start, data in _chunks(reader, buffer, counters):
        for index, value in enumerate(_values(data, buffer.ref.dtype), start):
            if value != index:
                return f"position {index} is {value:g}"
    return ""


def _difference(
    reader: Reader, first: StoredBuffer, second: StoredBuffer, counters: IoCounters
) -> tuple[int, float, float] | None:
    """The first element that differs by more than rounding: its index and both values; None if there is none."""
    dtypes = (first.ref.dtype, second.ref.dtype)
    exact = all(dtype.kind is not Kind.FLOAT for dtype in dtypes) and dtypes[0].bits == dtypes[1].bits
    tolerance = 0.0
    if all(dtype.name in _PRECISION for dtype in dtypes):
        tolerance = _ROUNDINGS * 2.0 ** -min(_PRECISION[dtype.name] for dtype in dtypes)
    pairs = zip(_chunks(reader, first, counters), _chunks(reader, second, counters), strict=True)
    for (start, ours), (_, theirs) in pairs:
        if ours == theirs and (exact or dtypes[0] == dtypes[1]):
            continue
        values = zip(_values(ours, dtypes[0]), _values(theirs, dtypes[1]), strict=True)
        for index, (a, b) in enumerate(values, start):
            largest = max(abs(a), abs(b))
            if a != b and not (math.isfinite(largest) and abs(a - b) <= tolerance * largest):
                return index, a, b
    return None


def _chunks(reader: Reader, buffer: StoredBuffer, counters: IoCounters) -> Iterator[tuple[int, bytearray]]:
    """Read a buffer chunk by chunk: the index of each chunk's first element, and its bytes."""
    ref = buffer.ref
    for start in range(0, ref.elements, _ELEMENTS):
        count = min(_ELEMENTS, ref.elements - start)
        data = bytearray(ref.dtype.nbytes(count))
        reader.read(ref.file, ref.offset + ref.dtype.nbytes(start), memoryview(data))
        counters.add(checked=len(data))
        yield start, data


def _values(data: bytearray, dtype: DType) -> Sequence[float]:
    """The elements of a chunk as numbers; those of a dtype without numbers in Python as their codes."""
    count = len(data) * 8 // dtype.bits
    if dtype.name == "BF16":
        wide = b"".join(b"\0\0" + bytes(data[at : at + 2]) for at in range(0, len(data), 2))
        return struct.unpack(f"<{count}f", wide)
    if dtype.name in _CODES:
        return struct.unpack(f"<{count}{_CODES[dtype.name]}", data)
    return list(data)
