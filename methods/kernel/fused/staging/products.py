"""Native functions for low-rank products: some rows at a time, in a panel that the buffer is copied from.

Both factors are converted to the work dtype and packed first: then the elements that a step needs follow each other,
however the factors are stored. A step computes a few rows by a vector of columns in registers, rank by rank in order.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..assembly import ELEMENT_BYTES, Function
from ..formats import STORED
from .pieces import copy_function, fill_function, pieces, read_number
from .state import PRODUCT_COLUMNS, PRODUCT_ROWS, Field, LowRankField

_VECTOR_BYTES = 64
_IN_VECTORS = ("BF16", "F32")
"""Dtypes of right factors that are converted vector by vector, if columns follow each other; others one by one."""


def products(name: str, dtypes: Sequence[str], work: str, called: dict[str, str]) -> str:
    """The fill: computes a panel if a row is not in the present one. Gathered elements have panels of their own."""
    left, right = dtypes
    multiply = f"multiply.{left}.{right}.{work}"
    called |= _multiply(multiply, left, right, work)
    called[f"copy.{work}"] = copy_function(work)
    f = fill_function(name)
    rows, gathered = (f.load("%state", field, "i64") for field in (Field.ROWS, Field.GATHERED))
    usual = f.value(f"icmp eq i64 {gathered}, 0")
    height, after, pitch = (_number(f, name) for name in ("HEIGHT", "AFTER", "PITCH"))
    panel = f.load("%state", LowRankField.PANEL, "ptr")
    with pieces(f) as (row, column, done, size):
        begin, end = _number(f, "BEGIN"), _number(f, "END")
        outside = f.value(f"or i1 {f.value(f'icmp ult i64 {row}, {begin}')}, {f.value(f'icmp uge i64 {row}, {end}')}")
        with f.when(f.value(f"select i1 {usual}, i1 {outside}, i1 true")):
            left_rows = f.value(f"sub i64 {rows}, {f.value(f'urem i64 {row}, {rows}')}")
            count = f.smaller(height, f.smaller(left_rows, f.value(f"sub i64 {after}, {row}")))
            count = f.value(f"select i1 {usual}, i64 {count}, i64 1")
            f.store(row, "%state", LowRankField.BEGIN, "i64")
            f.store(f.value(f"add i64 {row}, {count}"), "%state", LowRankField.END, "i64")
            for field, own in ((LowRankField.COLUMN, column), (LowRankField.WIDTH, size)):
                kept = f.load("%state", field, "i64")
                f.store(f.value(f"select i1 {usual}, i64 {kept}, i64 {own}"), "%state", field, "i64")
            f.do(f"call void @{multiply}(ptr %state, ptr {panel})")
        line = f.value(f"sub i64 {row}, {_number(f, 'BEGIN')}")
        place = f.value(f"add i64 {f.value(f'mul i64 {line}, {pitch}')}, {column}")
        source = f.at(panel, f.value(f"sub i64 {place}, {_number(f, 'COLUMN')}"), work)
        f.do(f"call void @copy.{work}(ptr {f.at('%out', done, work)}, ptr {source}, i64 {size})")
    return f.text()


def _number(f: Function, field: str) -> str:
    return f.load("%state", LowRankField[field], "i64")


def _lanes(work: str) -> int:
    """The numbers in a vector."""
    return _VECTOR_BYTES // ELEMENT_BYTES[work]


def _multiply(name: str, left: str, right: str, work: str) -> dict[str, str]:
    """``multiply(state, panel)``: computes the panel; with the functions that it calls, by their names."""
    pack_rows, pack_lines, pack_columns, step = (
        f"{each}.{work}" for each in (f"pack_rows.{left}", f"pack_lines.{right}", f"pack_columns.{right}", "add_ranks")
    )
    f = Function(name, "void", [("ptr noalias", "state"), ("ptr noalias", "panel")])
    rank, height, pitch, column, width = (_number(f, each) for each in ("RANK", "HEIGHT", "PITCH", "COLUMN", "WIDTH"))
    begin, line, apart = (_number(f, each) for each in ("BEGIN", "RIGHT_LINE", "RIGHT_RANK"))
    rows = f.value(f"sub i64 {_number(f, 'END')}, {begin}")
    packed_right = f.at("%panel", f.value(f"mul i64 {height}, {pitch}"), work)
    packed_left = f.at(packed_right, f.value(f"mul i64 {rank}, {PRODUCT_COLUMNS}"), work)
    matrix_rows = f.load("%state", Field.ROWS, "i64")
    matrix = f.value(f"udiv i64 {begin}, {matrix_rows}")
    within = f.value(f"urem i64 {begin}, {matrix_rows}")
    first = _address(f, f.load("%state", Field.DATA, "ptr"), "LEFT", matrix, within, left)
    given = ", ".join(f"i64 {each}" for each in (rows, rank, _number(f, "LEFT_LINE"), _number(f, "LEFT_RANK")))
    f.do(f"call void @{pack_rows}(ptr {packed_left}, ptr {first}, {given})")
    source = _address(f, f.load("%state", LowRankField.RIGHT, "ptr"), "RIGHT", matrix, column, right)
    adjacent = f.value(f"icmp eq i64 {line}, 1")
    with f.loop(width, PRODUCT_COLUMNS) as (done, _, _):
        count = f.smaller(f.value(f"sub i64 {width}, {done}"), str(PRODUCT_COLUMNS))
        full = f.value(f"icmp eq i64 {count}, {PRODUCT_COLUMNS}")
        ranks = f.value(f"select i1 {f.value(f'and i1 {full}, {adjacent}')}, i64 {rank}, i64 0")
        at = f.at(source, f.value(f"mul i64 {done}, {line}"), STORED[right].stored)
        if right in _IN_VECTORS:
            f.do(f"call void @{pack_lines}(ptr {packed_right}, ptr {at}, i64 {ranks}, i64 {apart})")
        else:
            ranks = "0"
        others = f.value(f"select i1 {f.value(f'icmp eq i64 {ranks}, 0')}, i64 {count}, i64 0")
        given = ", ".join(f"i64 {each}" for each in (others, rank, line, apart))
        f.do(f"call void @{pack_columns}(ptr {packed_right}, ptr {at}, {given})")
        with f.loop(rows, PRODUCT_ROWS) as (row, _, _):
            factors = f.at(packed_left, f.value(f"mul i64 {row}, {rank}"), work)
            out = f.at("%panel", f.value(f"add i64 {f.value(f'mul i64 {row}, {pitch}')}, {done}"), work)
            for vector in range(0, PRODUCT_COLUMNS, _lanes(work)):
                lines = f.at(packed_right, f.value(f"mul i64 {rank}, {vector}"), work)
                place = f.at(out, vector, work)
                f.do(f"call void @{step}(ptr {place}, ptr {factors}, ptr {lines}, i64 {rank}, i64 {pitch})")
    return {
        pack_rows: _pack(pack_rows, left, work, PRODUCT_ROWS),
        **({pack_lines: _pack_lines(pack_lines, right, work)} if right in _IN_VECTORS else {}),
        pack_columns: _pack(pack_columns, right, work, _lanes(work)),
        step: _add_ranks(step, work),
        name: f.text(),
    }


def _address(f: Function, data: str, side: str, matrix: str, line: str, dtype: str) -> str:
    """The address of the first element of a line of a factor."""
    origin, by_matrix, by_line = (_number(f, f"{side}_{field}") for field in ("ORIGIN", "MATRIX", "LINE"))
    moved = f.value(f"add i64 {f.value(f'mul i64 {matrix}, {by_matrix}')}, {f.value(f'mul i64 {line}, {by_line}')}")
    return f.at(data, f.value(f"add i64 {origin}, {moved}"), STORED[dtype].stored)


def _pack(name: str, dtype: str, work: str, group: int) -> str:
    """``pack(out, source, lines, rank, line, apart)``: for each group of lines, the elements of each rank.

    `line` and `apart` are the distances of two lines and of two ranks of the source.
    """
    numbers = [("i64", each) for each in ("lines", "rank", "line", "apart")]
    f = Function(name, "void", [("ptr noalias", "out"), ("ptr noalias", "source"), *numbers])
    with f.loop("%lines") as (each, _, _):
        before = f.value(f"mul i64 {f.value(f'udiv i64 {each}, {group}')}, {f.value(f'mul i64 %rank, {group}')}")
        out = f.at(f.at("%out", before, work), f.value(f"urem i64 {each}, {group}"), work)
        source = f.at("%source", f.value(f"mul i64 {each}, %line"), STORED[dtype].stored)
        with f.loop("%rank") as (k, _, _):
            value = read_number(f, source, f.value(f"mul i64 {k}, %apart"), dtype, work)
            f.store(value, out, f.value(f"mul i64 {k}, {group}"), work)
    return f.text()


def _pack_lines(name: str, dtype: str, work: str) -> str:
    """``pack_lines(out, source, rank, apart)``: `_pack` for all columns of a step, which follow each other.

    It is written with vectors: LLVM unrolls loops over so few elements before it could vectorize them.
    """
    numbers = [("i64", "rank"), ("i64", "apart")]
    f = Function(name, "void", [("ptr noalias", "out"), ("ptr noalias", "source"), *numbers])
    lanes = _lanes(work)
    with f.loop("%rank") as (k, _, _):
        source = f.at("%source", f.value(f"mul i64 {k}, %apart"), STORED[dtype].stored)
        for vector in range(0, PRODUCT_COLUMNS, lanes):
            place = f.value(f"add i64 {f.value(f'mul i64 %rank, {vector}')}, {f.value(f'mul i64 {k}, {lanes}')}")
            value = _vector(f, f.at(source, vector, STORED[dtype].stored), dtype, lanes)
            if work == "double":
                value = f.value(f"fpext <{lanes} x float> {value} to <{lanes} x double>")
            f.store(value, f.at("%out", place, work), 0, f"<{lanes} x {work}>")
    return f.text()


def _vector(f: Function, source: str, dtype: str, lanes: int) -> str:
    """Consecutive stored numbers as float32."""
    if dtype == "F32":
        return f.load(source, 0, f"<{lanes} x float>")
    wide = f.value(f"zext <{lanes} x i16> {f.load(source, 0, f'<{lanes} x i16>')} to <{lanes} x i32>")
    shifts = ", ".join(["i32 16"] * lanes)
    bits = f.value(f"shl <{lanes} x i32> {wide}, <{shifts}>")
    return f.value(f"bitcast <{lanes} x i32> {bits} to <{lanes} x float>")


def _add_ranks(name: str, work: str) -> str:
    """``add_ranks(out, factors, lines, rank, pitch)``: a vector of each of some rows, rank by rank."""
    pointers = [("ptr noalias", each) for each in ("out", "factors", "lines")]
    f = Function(name, "void", [*pointers, ("i64", "rank"), ("i64", "pitch")])
    lanes = _lanes(work)
    vector = f"<{lanes} x {work}>"
    with f.loop("%rank", carried=[(vector, "zeroinitializer")] * PRODUCT_ROWS) as (k, totals, following):
        line = f.load("%lines", k, vector)
        factors = f.at("%factors", f.value(f"mul i64 {k}, {PRODUCT_ROWS}"), work)
        for row, total in enumerate(totals):
            factor = f.value(f"insertelement {vector} poison, {work} {f.load(factors, row, work)}, i64 0")
            factor = f.value(f"shufflevector {vector} {factor}, {vector} poison, <{lanes} x i32> zeroinitializer")
            following.append(f.value(f"fadd {vector} {total}, {f.value(f'fmul {vector} {factor}, {line}')}"))
    for row, total in enumerate(following):
        f.store(total, f.at("%out", f.value(f"mul i64 %pitch, {row}"), work), 0, vector)
    return f.text()
