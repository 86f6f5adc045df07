"""Defines the dtypes of the safetensors format: name, width in bits, torch name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """The category of a dtype."""

    FLOAT = "float"
    INTEGER = "integer"
    BOOLEAN = "boolean"
    COMPLEX = "complex"


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype of the safetensors format.

    Args:
        name: the name in a header, such as ``BF16``.
        bits: the width of an element in bits; 4 or 6 for packed dtypes.
        kind: the category, such as float.
        torch_name: the attribute of ``torch`` for this dtype; None if torch does not have it.
    """

    name: str
    bits: int
    kind: Kind
    torch_name: str | None

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def is_wide_float(self) -> bool:
        """Whether it is a float of 16 bits or more, which is a value and not a code."""
        return self.kind is Kind.FLOAT and self.bits >= 16

    def nbytes(self, elements: int) -> int:
        """The size of `elements` elements in bytes. Raises ValueError if that is not an integral number."""
        bits = self.bits * elements
        if bits % 8:
            raise ValueError(f"{elements} elements of {self.name} are not a whole number of bytes")
        return bits // 8


_ALL = (
    DType("BOOL", 8, Kind.BOOLEAN, "bool"),
    DType("F4", 4, Kind.FLOAT, None),
    DType("F6_E2M3", 6, Kind.FLOAT, None),
    DType("F6_E3M2", 6, Kind.FLOAT, None),
    DType("U8", 8, Kind.INTEGER, "uint8"),
    DType("I8", 8, Kind.INTEGER, "int8"),
    DType("F8_E5M2", 8, Kind.FLOAT, "float8_e5m2"),
    DType("F8_E4M3", 8, Kind.FLOAT, "float8_e4m3fn"),
    DType("F8_E8M0", 8, Kind.FLOAT, "float8_e8m0fnu"),
    DType("F8_E4M3FNUZ", 8, Kind.FLOAT, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 8, Kind.FLOAT, "float8_e5m2fnuz"),
    DType("I16", 16, Kind.INTEGER, "int16"),
    DType("U16", 16, Kind.INTEGER, "uint16"),
    DType("F16", 16, Kind.FLOAT, "float16"),
    DType("BF16", 16, Kind.FLOAT, "bfloat16"),
    DType("I32", 32, Kind.INTEGER, "int32"),
    DType("U32", 32, Kind.INTEGER, "uint32"),
    DType("F32", 32, Kind.FLOAT, "float32"),
    DType("C64", 64, Kind.COMPLEX, "complex64"),
    DType("F64", 64, Kind.FLOAT, "float64"),
    DType("I64", 64, Kind.INTEGER, "int64"),
    DType("U64", 64, Kind.INTEGER, "uint64"),
)

DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _ALL}
"""All dtypes of the format by their name in a header."""

BF16, F16, F32, F64 = (DTYPES[name] for name in ("BF16", "F16", "F32", "F64"))
