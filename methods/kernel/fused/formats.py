"""Converts between stored numbers and numbers to compute with, exactly and in the same way on every processor.

float16 and the 8-bit formats have no arithmetic on CPUs, and bfloat16 has no type: they are loaded as integers and
converted with integer arithmetic and one multiplication or addition, which is exact. Rounding is to the nearest, and of
two equally near numbers to the even one. Every NaN is stored as one canonical NaN.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from .assembly import Function, literal


@dataclass(frozen=True, slots=True)
class Format:
    """A floating-point format.

    Args:
        stored: integer type of its bits.
        mantissa: number of explicit bits of the significand.
        bias: bias of the exponent.
        largest: bits of the largest finite number.
        nan: bits of the canonical NaN.
        infinity: bits of infinity; None if the format has none, and larger numbers become NaN.
        negative_zero: whether there is a -0; otherwise its bits are the NaN.
    """

    stored: str
    mantissa: int
    bias: int
    largest: int
    nan: int
    infinity: int | None
    negative_zero: bool = True

    @property
    def bits(self) -> int:
        """Width in bits."""
        return int(self.stored[1:])

    @property
    def maximum(self) -> float:
        """The largest finite number."""
        exponent = (self.largest >> self.mantissa) - self.bias
        fraction = self.largest & ((1 << self.mantissa) - 1)
        return float((1 + fraction / (1 << self.mantissa)) * 2.0**exponent)


@dataclass(frozen=True, slots=True)
class Integers:
    """A format of integers, which are only read.

    Args:
        stored: integer type of their bits.
        signed: whether they have a sign.
    """

    stored: str
    signed: bool

    @property
    def bits(self) -> int:
        """Width in bits."""
        return int(self.stored[1:])


FORMATS: Mapping[str, Format] = {
    "F64": Format("i64", 52, 1023, 0x7FEF_FFFF_FFFF_FFFF, 0x7FF8_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": Format("i32", 23, 127, 0x7F7F_FFFF, 0x7FC0_0000, 0x7F80_0000),
    "BF16": Format("i16", 7, 127, 0x7F7F, 0x7FC0, 0x7F80),
    "F16": Format("i16", 10, 15, 0x7BFF, 0x7E00, 0x7C00),
    "F8_E5M2": Format("i8", 2, 15, 0x7B, 0x7F, 0x7C),
    "F8_E4M3": Format("i8", 3, 7, 0x7E, 0x7F, None),
    "F8_E5M2FNUZ": Format("i8", 2, 16, 0x7F, 0x80, None, negative_zero=False),
    "F8_E4M3FNUZ": Format("i8", 3, 8, 0x7F, 0x80, None, negative_zero=False),
    "F8_E8M0": Format("i8", 0, 127, 0xFE, 0xFF, None, negative_zero=False),
}
"""The formats that numbers are rounded to, by their name in a safetensors header."""

POWERS = FORMATS["F8_E8M0"]
"""Powers of 2 without a sign: scales of blocks. There is no 0, which becomes the smallest power."""

STORED: Mapping[str, Format | Integers] = {
    **FORMATS,
    "U8": Integers("i8", signed=False),
    "I8": Integers("i8", signed=True),
}
"""The formats that inputs can have, by their name in a safetensors header."""

NIBBLES: Mapping[str, Format | Integers] = {
    "F4": Format("i4", 1, 1, 0x7, 0x8, None, negative_zero=True),
    "U4": Integers("i4", signed=False),
}
"""The formats of four bits, of which two are in a byte. F4 is E2M1 of the OCP Microscaling Formats, without a NaN."""


def decoded(f: Function, raw: str, name: str) -> tuple[str, str]:
    """A stored number as a value to compute with, exactly.

    Args:
        f: function to write to.
        raw: bits, of the format's integer type.
        name: name of the format.

    Returns:
        The value and its type: double for F64, else float.
    """
    form = STORED[name] if name in STORED else NIBBLES[name]
    if isinstance(form, Integers):
        return f.value(f"{'sitofp' if form.signed else 'uitofp'} {form.stored} {raw} to float"), "float"
    if form is POWERS:
        return _power(f, raw), "float"
    if name in ("F64", "F32"):
        type = "double" if name == "F64" else "float"
        return f.value(f"bitcast {form.stored} {raw} to {type}"), type
    wide = f.value(f"zext {form.stored} {raw} to i32")
    if name == "BF16":
        return f.value(f"bitcast i32 {f.value(f'shl i32 {wide}, 16')} to float"), "float"
    sign_bit = 1 << (form.bits - 1)
    magnitude = f.value(f"and i32 {wide}, {sign_bit - 1}")
    shifted = f.value(f"shl i32 {magnitude}, {23 - form.mantissa}")
    scaled = f.value(
        f"fmul float {f.value(f'bitcast i32 {shifted} to float')}, {literal(2.0 ** (127 - form.bias), 'float')}"
    )
    if form.infinity is not None:
        special = f.value(f"icmp uge i32 {magnitude}, {form.infinity}")
        bits = f.value(f"or i32 {shifted}, {0x7F80_0000}")
    else:
        compared = magnitude if form.negative_zero else wide
        special = f.value(f"icmp eq i32 {compared}, {form.nan}")
        bits = str(0x7FC0_0000)
    bits = f.value(f"select i1 {special}, i32 {bits}, i32 {f.value(f'bitcast float {scaled} to i32')}")
    sign = f.value(f"shl i32 {f.value(f'and i32 {wide}, {sign_bit}')}, {32 - form.bits}")
    return f.value(f"bitcast i32 {f.value(f'or i32 {bits}, {sign}')} to float"), "float"


def _power(f: Function, raw: str) -> str:
    """2 to the power of the bits minus the bias; the smallest one is subnormal."""
    exponent = f.value(f"zext i8 {raw} to i32")
    smallest = f.value(f"icmp eq i32 {exponent}, 0")
    nan = f.value(f"icmp eq i32 {exponent}, {POWERS.nan}")
    bits = f.value(f"select i1 {smallest}, i32 {1 << 22}, i32 {f.value(f'shl i32 {exponent}, 23')}")
    return f.value(f"bitcast i32 {f.value(f'select i1 {nan}, i32 {0x7FC0_0000}, i32 {bits}')} to float")


def encoded(f: Function, value: str, type: str, name: str) -> str:
    """A number rounded once to a format, as bits of the format's integer type.

    Args:
        f: function to write to.
        value: number of type float or double.
        type: its type.
        name: name of the format.
    """
    form = FORMATS[name]
    nan = f.value(f"fcmp uno {type} {value}, {value}")
    if name == "F64":
        wide = value if type == "double" else f.value(f"fpext float {value} to double")
        bits = f.value(f"bitcast double {wide} to i64")
        return f.value(f"select i1 {nan}, i64 {form.nan}, i64 {bits}")
    bits = _single_bits(f, value, type, to_odd=name != "F32")
    if form is POWERS:
        bits = _nearest_power(f, bits)
    elif name != "F32":
        bits = _narrowed(f, bits, form)
    bits = f.value(f"select i1 {nan}, i32 {form.nan}, i32 {bits}")
    return bits if form.bits == 32 else f.value(f"trunc i32 {bits} to {form.stored}")


def nearest(f: Function, value: str, type: str, name: str) -> tuple[str, str]:
    """A number rounded once to a format, as a value to compute with: what `decoded` makes of its `encoded` bits.

    The significand is rounded in place, which shares its instructions with `encoded`, and needs no others to decode.

    Returns:
        The value and its type, as `decoded`.
    """
    form = FORMATS[name]
    if form.bits > 16 or form is POWERS or not form.negative_zero:
        return decoded(f, encoded(f, value, type, name), name)
    nan = f.value(f"fcmp uno {type} {value}, {value}")
    bits = _single_bits(f, value, type, to_odd=True)
    magnitude, rounded = _rounded_magnitude(f, bits, form)
    rounded = f.value(f"and i32 {rounded}, {-(1 << (23 - form.mantissa))}")
    if form.bias != 127:
        added, unit = _tiny_sum(f, magnitude, form)
        tiny = f.value(f"bitcast float {f.value(f'fsub float {added}, {unit}')} to i32")
        rounded = f.value(f"select i1 {_is_tiny(f, magnitude, form)}, i32 {tiny}, i32 {rounded}")
    largest = struct.unpack("<i", struct.pack("<f", form.maximum))[0]
    beyond = 0x7FC0_0000 if form.infinity is None else 0x7F80_0000
    rounded = f.value(f"select i1 {f.value(f'icmp sgt i32 {rounded}, {largest}')}, i32 {beyond}, i32 {rounded}")
    rounded = f.value(f"or i32 {rounded}, {f.value(f'and i32 {bits}, {-(1 << 31)}')}")
    rounded = f.value(f"select i1 {nan}, i32 {0x7FC0_0000}, i32 {rounded}")
    return f.value(f"bitcast i32 {rounded} to float"), "float"


def _single_bits(f: Function, value: str, type: str, *, to_odd: bool) -> str:
    """The bits of a number as float; a double is rounded to the nearest one, or "to odd"."""
    if type != "double":
        return f.value(f"bitcast float {value} to i32")
    single = f.value(f"fptrunc double {value} to float")
    bits = f.value(f"bitcast float {single} to i32")
    return _to_odd(f, value, single, bits) if to_odd else bits


def _nearest_power(f: Function, bits: str) -> str:
    """The exponent of a float rounded to the nearest power of 2, of two equally near ones to that with an even code.

    That of a number with a sign is the NaN.
    """
    odd = f.value(f"and i32 {f.value(f'lshr i32 {bits}, 23')}, 1")
    nearest = f.value(f"add i32 {f.value(f'add i32 {bits}, {(1 << 22) - 1}')}, {odd}")
    code = f.value(f"lshr i32 {nearest}, 23")
    second = f.value(f"zext i1 {f.value(f'icmp ugt i32 {bits}, {3 << 21}')} to i32")  # the first is subnormal
    code = f.value(f"select i1 {f.value(f'icmp ult i32 {bits}, {1 << 23}')}, i32 {second}, i32 {code}")
    return f.value(f"select i1 {f.value(f'icmp slt i32 {bits}, 0')}, i32 {POWERS.nan}, i32 {code}")


def _to_odd(f: Function, value: str, single: str, bits: str) -> str:
    """The bits of a double rounded to float "to odd", which a second rounding does not distort (Boldo and Melquiond,
    2008)."""
    back = f.value(f"fpext float {single} to double")
    differs = f.value(f"fcmp one double {back}, {value}")
    finite = f.value(f"fcmp one double {_magnitude(f, value, 'double')}, {literal(float('inf'), 'double')}")
    inexact = f.value(f"zext i1 {f.value(f'and i1 {differs}, {finite}')} to i32")
    larger = f.value(f"fcmp ogt double {_magnitude(f, back, 'double')}, {_magnitude(f, value, 'double')}")
    away = f.value(f"and i32 {f.value(f'zext i1 {larger} to i32')}, {inexact}")
    return f.value(f"or i32 {f.value(f'sub i32 {bits}, {away}')}, {inexact}")


def _magnitude(f: Function, value: str, type: str) -> str:
    suffix = "f64" if type == "double" else "f32"
    return f.value(f"call {type} @llvm.fabs.{suffix}({type} {value})")


def _narrowed(f: Function, bits: str, form: Format) -> str:
    """The bits of a float rounded to a format of at most 16 bits, in an i32; NaNs are left to the caller."""
    sign = f.value(f"lshr i32 {f.value(f'and i32 {bits}, {-(1 << 31)}')}, {32 - form.bits}")
    magnitude, rounded = _rounded_magnitude(f, bits, form)
    code = f.value(f"lshr i32 {rounded}, {23 - form.mantissa}")
    if form.bias != 127:
        code = f.value(f"sub i32 {code}, {(127 - form.bias) << form.mantissa}")
        added, unit = _tiny_sum(f, magnitude, form)
        tiny = f.value(f"bitcast float {added} to i32")
        tiny = f.value(f"sub i32 {tiny}, {f.value(f'bitcast float {unit} to i32')}")
        code = f.value(f"select i1 {_is_tiny(f, magnitude, form)}, i32 {tiny}, i32 {code}")
        beyond = form.nan if form.infinity is None else form.infinity
        over = f.value(f"icmp sgt i32 {code}, {form.largest}")
        if not form.negative_zero:
            sign = f.value(f"select i1 {f.value(f'icmp eq i32 {code}, 0')}, i32 0, i32 {sign}")
            sign = f.value(f"select i1 {over}, i32 0, i32 {sign}")
        code = f.value(f"select i1 {over}, i32 {beyond}, i32 {code}")
        if form.infinity is None and form.negative_zero:
            sign = f.value(f"select i1 {over}, i32 0, i32 {sign}")
    return f.value(f"or i32 {code}, {sign}")


def _rounded_magnitude(f: Function, bits: str, form: Format) -> tuple[str, str]:
    """The bits of a float without its sign, and with the significand rounded to the format's, in its upper bits."""
    drop = 23 - form.mantissa
    magnitude = f.value(f"and i32 {bits}, {(1 << 31) - 1}")
    odd = f.value(f"and i32 {f.value(f'lshr i32 {magnitude}, {drop}')}, 1")
    return magnitude, f.value(f"add i32 {f.value(f'add i32 {magnitude}, {(1 << (drop - 1)) - 1}')}, {odd}")


def _tiny_sum(f: Function, magnitude: str, form: Format) -> tuple[str, str]:
    """The sum of a magnitude and a power of 2, and that power, whose last bit weighs as much as the format's smallest
    number: the sum is rounded to multiples of the latter."""
    unit = f.value(f"bitcast i32 {(1 - form.bias - form.mantissa + 23 + 127) << 23} to float")
    return f.value(f"fadd float {f.value(f'bitcast i32 {magnitude} to float')}, {unit}"), unit


def _is_tiny(f: Function, magnitude: str, form: Format) -> str:
    """Whether a magnitude is below the format's normal numbers."""
    return f.value(f"icmp ult i32 {magnitude}, {(128 - form.bias) << 23}")
