"""Native functions that fill a buffer with values that are computed from staged elements; see `state`.

``fill(state, out, first, count)`` computes the values of elements [first, first + count) of the output. Elements are
taken row by row. Of a chunk whose elements are gathered, `first` counts from the chunk's first element, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..assembly import Function
from ..formats import NIBBLES, STORED, decoded
from ..operations import converted
from .pieces import copy_function, fill_function, pieces, read_number, stored_type
from .products import products
from .state import PADDING, BlockField, Field, NibbleField, TransposedField


def fill_functions(names: set[str]) -> str:
    """The assembly of fills with these names, see `Fill.function`, and of what they call."""
    called: dict[str, str] = {}
    text = ""
    for name in sorted(names):
        _, kind, *dtypes, work = name.split(".")
        text += _KINDS[kind](name, dtypes, work, called)
    return "".join(called.values()) + text


# --- the kinds -------------------------------------------------------------------------------------------------------


def _blocks(name: str, dtypes: Sequence[str], work: str, called: dict[str, str]) -> str:
    """The element of each block, repeated."""
    (dtype,) = dtypes
    f = fill_function(name)
    stored = STORED[dtype].stored
    rows, data, origin = (f.load("%state", each, "i64") for each in (Field.ROWS, Field.DATA, Field.ORIGIN))
    data = f.value(f"inttoptr i64 {data} to ptr")
    height, width, matrix_rows, blocks = (f.load("%state", field, "i64") for field in BlockField)
    with pieces(f) as (row, column, done, size):
        matrix, within = f.value(f"udiv i64 {row}, {rows}"), f.value(f"urem i64 {row}, {rows}")
        before = f.value(f"sub i64 {f.value(f'mul i64 {matrix}, {matrix_rows}')}, {origin}")
        line = f.value(f"add i64 {before}, {f.value(f'udiv i64 {within}, {height}')}")
        source = f.at(data, f.value(f"mul i64 {line}, {blocks}"), stored)
        repeat, convert = (f"{each}.{dtype}.{work}" for each in ("repeat", "convert"))
        called[repeat], called[convert] = _repeat(repeat, dtype, work), _convert(convert, dtype, work)
        singles = f.value(f"select i1 {f.value(f'icmp eq i64 {width}, 1')}, i64 {size}, i64 0")
        others = f.value(f"sub i64 {size}, {singles}")
        out, first = f.at("%out", done, work), f.at(source, column, stored)
        f.do(f"call void @{convert}(ptr {out}, ptr {first}, i64 1, i64 {singles})")
        f.do(f"call void @{repeat}(ptr {out}, ptr {source}, i64 {column}, i64 {others}, i64 {width})")
    return f.text()


def _repeat(name: str, dtype: str, work: str) -> str:
    """``repeat(out, source, column, count, width)``: each element of the source for `width` columns."""
    pointers = [("ptr noalias", "out"), ("ptr noalias", "source")]
    f = Function(name, "void", [*pointers, ("i64", "column"), ("i64", "count"), ("i64", "width")])
    block = f.value("udiv i64 %column, %width")
    before = f.value("urem i64 %column, %width")
    length: list[str] = []
    with f.loop("%count", length, [("i64", block), ("i64", before)]) as (done, (block, before), following):
        room = f.value(f"sub i64 %width, {before}")
        size = f.smaller(room, f.value(f"sub i64 %count, {done}"))
        value = read_number(f, "%source", block, dtype, work)
        out = f.at("%out", done, work)
        with f.loop(size) as (i, _, _):
            f.store(value, out, i, work)
        length.append(size)
        following += [f.value(f"add i64 {block}, 1"), "0"]
    return f.text()


def _convert(name: str, dtype: str, work: str) -> str:
    """``convert(out, source, stride, count)``: elements that are `stride` elements apart."""
    arguments = [("ptr noalias", "out"), ("ptr noalias", "source"), ("i64", "stride"), ("i64", "count")]
    f = Function(name, "void", arguments)
    with f.loop("%count") as (i, _, _):
        f.store(read_number(f, "%source", f.value(f"mul i64 {i}, %stride"), dtype, work), "%out", i, work)
    return f.text()


def _nibbles(name: str, dtypes: Sequence[str], work: str, called: dict[str, str]) -> str:
    """The elements of a row, two of which are in a byte."""
    numbers = dtypes[0]
    f = fill_function(name)
    data, origin = f.load("%state", Field.DATA, "ptr"), f.load("%state", Field.ORIGIN, "i64")
    width = f.load("%state", NibbleField.WIDTH, "i64")
    half, pairs = (f"{each}.{numbers}.{work}" for each in ("nibble", "nibbles"))
    called[half], called[pairs] = _half(half, numbers, work), _pairs(pairs, numbers, work)
    with pieces(f) as (row, column, done, size):
        place = f.value(f"add i64 {f.value(f'mul i64 {row}, {width}')}, {f.value(f'lshr i64 {column}, 1')}")
        place = f.value(f"sub i64 {place}, {origin}")
        odd = f.smaller(f.value(f"and i64 {column}, 1"), size)
        complete = f.value(f"lshr i64 {f.value(f'sub i64 {size}, {odd}')}, 1")
        inner = f.value(f"shl i64 {complete}, 1")
        last = f.value(f"sub i64 {size}, {f.value(f'add i64 {odd}, {inner}')}")
        out = f.at("%out", done, work)
        f.do(f"call void @{half}(ptr {out}, ptr {f.at(data, place, 'i8')}, i8 4, i64 {odd})")
        place, out = f.value(f"add i64 {place}, {odd}"), f.at(out, odd, work)
        f.do(f"call void @{pairs}(ptr {out}, ptr {f.at(data, place, 'i8')}, i64 {complete})")
        place, out = f.value(f"add i64 {place}, {complete}"), f.at(out, inner, work)
        f.do(f"call void @{half}(ptr {out}, ptr {f.at(data, place, 'i8')}, i8 0, i64 {last})")
    return f.text()


def _pairs(name: str, numbers: str, work: str) -> str:
    """``nibbles(out, source, count)``: both elements of each byte."""
    f = Function(name, "void", [("ptr noalias", "out"), ("ptr noalias", "source"), ("i64", "count")])
    with f.loop("%count") as (i, _, _):
        byte = f.load("%source", i, "i8")
        first = f.value(f"shl i64 {i}, 1")
        for place, bits in ((first, byte), (f.value(f"add i64 {first}, 1"), f.value(f"lshr i8 {byte}, 4"))):
            raw = f.value(f"trunc i8 {bits} to i4")
            f.store(converted(f, *decoded(f, raw, numbers), work), "%out", place, work)
    return f.text()


def _half(name: str, numbers: str, work: str) -> str:
    """``nibble(out, source, shift, count)``: at most one element, that of a byte's bits from `shift` on."""
    pointers = [("ptr noalias", "out"), ("ptr noalias", "source")]
    f = Function(name, "void", [*pointers, ("i8", "shift"), ("i64", "count")])
    with f.loop("%count") as (i, _, _):
        bits = f.value(f"lshr i8 {f.load('%source', i, 'i8')}, %shift")
        raw = f.value(f"trunc i8 {bits} to i4")
        f.store(converted(f, *decoded(f, raw, numbers), work), "%out", i, work)
    return f.text()


def _transposed(name: str, dtypes: Sequence[str], work: str, called: dict[str, str]) -> str:
    """The elements of a row, each in another staged column.

    Several rows are transposed at a time, into a panel; single elements that are gathered are a panel of one row.
    """
    numbers, group = dtypes[0], int(dtypes[1]) if len(dtypes) > 1 else 1
    stored = stored_type(numbers)
    transpose = ".".join(("transpose", *dtypes, work))
    called[transpose] = _transpose(transpose, numbers, group, work)
    f = fill_function(name)
    fields = (Field.COLUMNS, Field.ROWS, Field.GATHERED, TransposedField.STEP, TransposedField.HEIGHT)
    columns, rows, gathered, step, height = (f.load("%state", field, "i64") for field in fields)
    panel = f.load("%state", TransposedField.PANEL, "ptr")
    width = f.value(f"add i64 {columns}, {PADDING}")
    with pieces(f) as (row, column, done, size):
        source, length, left = _staged_row(f, row, columns, step, stored, group)
        phase = f.value(f"urem i64 {f.value(f'urem i64 {row}, {rows}')}, {group}")
        out = f.at("%out", done, work)
        begin, end = (f.load("%state", field, "i64") for field in (TransposedField.BEGIN, TransposedField.END))
        outside = f.value(f"or i1 {f.value(f'icmp ult i64 {row}, {begin}')}, {f.value(f'icmp uge i64 {row}, {end}')}")
        usual = f.value(f"icmp eq i64 {gathered}, 0")
        with f.when(f.value(f"and i1 {outside}, {usual}")):
            count = f.smaller(left, height)
            given = ", ".join(f"i64 {each}" for each in (width, length, step, count, columns, phase))
            f.do(f"call void @{transpose}(ptr {panel}, ptr {source}, {given})")
            f.store(row, "%state", TransposedField.BEGIN, "i64")
            f.store(f.value(f"add i64 {row}, {count}"), "%state", TransposedField.END, "i64")
        copied = f.value(f"select i1 {usual}, i64 {size}, i64 0")
        line = f.value(f"sub i64 {row}, {f.load('%state', TransposedField.BEGIN, 'i64')}")
        place = f.value(f"add i64 {f.value(f'mul i64 {line}, {width}')}, {column}")
        f.do(f"call void @copy.{work}(ptr {out}, ptr {f.at(panel, place, work)}, i64 {copied})")
        first = f.at(source, f.value(f"mul i64 {column}, {length}"), stored)
        others = f.value(f"sub i64 {size}, {copied}")
        given = ", ".join(f"i64 {each}" for each in (0, length, step, 1, others, phase))
        f.do(f"call void @{transpose}(ptr {out}, ptr {first}, {given})")
    called[f"copy.{work}"] = copy_function(work)
    return f.text()


def _staged_row(f: Function, row: str, columns: str, step: str, stored: str, group: int) -> tuple[str, str, str]:
    """The address of the first element of a row, the distance of two columns, and the rows that are staged from it on.

    Both are those of the row's matrix: of the first and the last one, only some rows may be staged.
    """
    data = f.load("%state", Field.DATA, "ptr")
    rows, origin = (f.load("%state", field, "i64") for field in (Field.ROWS, Field.ORIGIN))
    fields = ("LOW", "FIRST", "MIDDLE", "LAST", "LAST_MATRIX", "HIGH")
    low, first, middle, last, last_matrix, high = (f.load("%state", TransposedField[name], "i64") for name in fields)
    matrix = f.value(f"sub i64 {f.value(f'udiv i64 {row}, {rows}')}, {origin}")
    is_first, is_last = f.value(f"icmp eq i64 {matrix}, 0"), f.value(f"icmp eq i64 {matrix}, {last_matrix}")
    length = f.value(f"select i1 {is_last}, i64 {last}, i64 {middle}")
    length = f.value(f"select i1 {is_first}, i64 {first}, i64 {length}")
    before = f.value(f"mul i64 {f.value(f'sub i64 {matrix}, 1')}, {middle}")
    before = f.value(f"mul i64 {f.value(f'add i64 {before}, {first}')}, {columns}")
    before = f.value(f"select i1 {is_first}, i64 0, i64 {before}")
    skipped = f.value(f"select i1 {is_first}, i64 {low}, i64 0")
    within = f.value(f"urem i64 {row}, {rows}")
    place = f.value(f"sub i64 {f.value(f'udiv i64 {within}, {group}')}, {skipped}")
    source = f.at(data, f.value(f"add i64 {before}, {f.value(f'mul i64 {place}, {step}')}"), stored)
    end = f.value(f"select i1 {is_last}, i64 {high}, i64 {rows}")
    return source, length, f.value(f"sub i64 {end}, {within}")


def _transpose(name: str, numbers: str, group: int, work: str) -> str:
    """``transpose(panel, source, width, length, step, rows, columns, phase)``: some rows, of `width` elements each.

    `phase` is the place of the first row in its group of rows.
    """
    pointers = [("ptr noalias", "panel"), ("ptr noalias", "source")]
    given = [("i64", each) for each in ("width", "length", "step", "rows", "columns", "phase")]
    f = Function(name, "void", [*pointers, *given])
    with f.loop("%columns") as (column, _, _):
        source = f.at("%source", f.value(f"mul i64 {column}, %length"), stored_type(numbers))
        panel = f.at("%panel", column, work)
        with f.loop("%rows") as (row, _, _):
            place = f.value(f"add i64 %phase, {row}") if group > 1 else row
            index = f.value(f"mul i64 {f.value(f'udiv i64 {place}, {group}')}, %step")
            if numbers in NIBBLES:
                shift = f.value(f"shl i64 {f.value(f'and i64 {place}, 1')}, 2")
                bits = f.value(f"lshr i8 {f.load(source, index, 'i8')}, {f.value(f'trunc i64 {shift} to i8')}")
                value = converted(f, *decoded(f, f.value(f"trunc i8 {bits} to i4"), numbers), work)
            else:
                value = read_number(f, source, index, numbers, work)
            f.store(value, panel, f.value(f"mul i64 {row}, %width"), work)
    return f.text()


_KINDS: Mapping[str, Callable[[str, Sequence[str], str, dict[str, str]], str]] = {
    "blocks": _blocks,
    "nibbles": _nibbles,
    "transposed": _transposed,
    "low_rank": products,
}
