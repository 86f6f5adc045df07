"""Loops that are the same for every expression: sums of blocks, sums and maxima of rows, and counts of a selection.

A caller passes their state as an array of i64 numbers, some of which are addresses.
"""

from __future__ import annotations

from enum import IntEnum

from .assembly import Function, literal

COLUMNS = 1 << 11
"""Columns of a block of a sum."""
GROUP = 64
"""Elements of which a selection counts those in the bracket before it looks at each."""


class SumField(IntEnum):
    """The state of a sum, or of the sums of columns."""

    TOTALS = 0  # address of the totals of the columns so far, in the type of the summands
    WIDTH = 1  # number of columns
    BLOCK = 2  # elements in a block
    POSITION = 3  # elements of the current block so far
    COUNT = 4  # blocks so far
    RESULTS = 5  # address of the blocks' results, of float64
    WIDE = 6  # address of as many float64 numbers as columns; unused by sums of columns


class SearchField(IntEnum):
    """The state of the counts of one search."""

    LOW = 0
    HIGH = 1
    SHIFT = 2
    GUESS = 3
    POSITIVE = 4
    ABOVE = 5
    ABOVE_GUESS = 6
    BLOCK = 7  # elements in a block
    POSITION = 8  # elements so far
    HISTOGRAM = 9  # address of the histogram, of i64; 0 for none
    EQUAL = 10  # address of the number of elements equal to the guess by block, i64


def add_into_function(type: str) -> str:
    """``add_into_TYPE(into, values, count)``: adds values to others."""
    f = Function(f"add_into_{type}", "void", [("ptr noalias", "into"), ("ptr noalias", "values"), ("i64", "count")])
    with f.loop("%count") as (i, _, _):
        f.store(f.value(f"fadd {type} {f.load('%into', i, type)}, {f.load('%values', i, type)}"), "%into", i, type)
    return f.text()


def feed_function(name: str, type: str) -> str:
    """``NAME_feed_TYPE(state, values, count)``: adds the next values of a block to its columns, row by row.

    At the end of a block, ``NAME_end_TYPE`` stores its result.
    """
    f = Function(f"{name}_feed_{type}", "void", [("ptr noalias", "state"), ("ptr noalias", "values"), ("i64", "count")])
    totals = f.load("%state", SumField.TOTALS, "ptr")
    width, block = (f.load("%state", field, "i64") for field in (SumField.WIDTH, SumField.BLOCK))
    # at most one part for each row and block; a part without elements does nothing
    rows, blocks = f.value(f"udiv i64 %count, {width}"), f.value(f"udiv i64 %count, {block}")
    parts = f.value(f"add i64 {f.value(f'add i64 {rows}, {blocks}')}, 3")
    with f.loop(parts, carried=[("i64", "0")]) as (_, (done,), following):
        position = f.load("%state", SumField.POSITION, "i64")
        column = f.value(f"urem i64 {position}, {width}")
        room = f.smaller(f.value(f"sub i64 {block}, {position}"), f.value(f"sub i64 {width}, {column}"))
        taken = f.smaller(room, f.value(f"sub i64 %count, {done}"))
        source, target = f.at("%values", done, type), f.at(totals, column, type)
        f.do(f"call void @add_into_{type}(ptr {target}, ptr {source}, i64 {taken})")
        position = f.value(f"add i64 {position}, {taken}")
        f.store(position, "%state", SumField.POSITION, "i64")
        with f.when(f.value(f"icmp eq i64 {position}, {block}")):
            f.do(f"call void @{name}_end_{type}(ptr %state)")
        following.append(f.value(f"add i64 {done}, {taken}"))
    return f.text()


def advance_function(type: str) -> str:
    """``sum_advance_TYPE(state, count)``: counts values that a loop has added to the columns itself."""
    f = Function(f"sum_advance_{type}", "void", [("ptr noalias", "state"), ("i64", "count")])
    position = f.value(f"add i64 {f.load('%state', SumField.POSITION, 'i64')}, %count")
    f.store(position, "%state", SumField.POSITION, "i64")
    with f.when(f.value(f"icmp eq i64 {position}, {f.load('%state', SumField.BLOCK, 'i64')}")):
        f.do(f"call void @sum_end_{type}(ptr %state)")
    return f.text()


def sum_end_function(type: str) -> str:
    """``sum_end_TYPE(state)``: stores the sum of a block, if it has elements, and begins the next one.

    The columns are added in float64.
    """
    f = Function(f"sum_end_{type}", "void", [("ptr noalias", "state")])
    position = f.load("%state", SumField.POSITION, "i64")
    with f.when(f.value(f"icmp ne i64 {position}, 0")):
        totals, wide = (f.load("%state", field, "ptr") for field in (SumField.TOTALS, SumField.WIDE))
        columns = f.smaller(position, f.load("%state", SumField.WIDTH, "i64"))
        with f.loop(columns) as (i, _, _):
            value = f.load(totals, i, type)
            f.store(value if type == "double" else f.value(f"fpext float {value} to double"), wide, i, "double")
            f.store(literal(-0.0, type), totals, i, type)
        count = f.load("%state", SumField.COUNT, "i64")
        total = f.value(f"call double @fold(ptr {wide}, i64 {columns})")
        f.store(total, f.load("%state", SumField.RESULTS, "ptr"), count, "double")
        _next_block(f, count)
    return f.text()


def columns_end_function() -> str:
    """``columns_end_double(state)``: stores the sums of a block's columns, and begins the next one."""
    f = Function("columns_end_double", "void", [("ptr noalias", "state")])
    position = f.load("%state", SumField.POSITION, "i64")
    with f.when(f.value(f"icmp ne i64 {position}, 0")):
        totals, width = f.load("%state", SumField.TOTALS, "ptr"), f.load("%state", SumField.WIDTH, "i64")
        count = f.load("%state", SumField.COUNT, "i64")
        results = f.at(f.load("%state", SumField.RESULTS, "ptr"), f.value(f"mul i64 {count}, {width}"), "double")
        with f.loop(width) as (i, _, _):
            f.store(f.load(totals, i, "double"), results, i, "double")
            f.store(literal(-0.0, "double"), totals, i, "double")
        _next_block(f, count)
    return f.text()


def _next_block(f: Function, count: str) -> None:
    f.store(f.value(f"add i64 {count}, 1"), "%state", SumField.COUNT, "i64")
    f.store("0", "%state", SumField.POSITION, "i64")


def fold_function() -> str:
    """``fold(values, count) -> double``: adds the second half of the float64 values to the first until one remains.

    The middle one of an odd number is left unchanged. The values are overwritten.
    """
    f = Function("fold", "double", [("ptr", "values"), ("i64", "count")])
    with f.loop("64", carried=[("i64", "%count")]) as (_, (width,), following):
        half = f.value(f"lshr i64 {width}, 1")
        rest = f.value(f"sub i64 {width}, {half}")
        f.do(f"call void @add_into_double(ptr %values, ptr {f.at('%values', rest, 'double')}, i64 {half})")
        following.append(rest)
    return f.text(f"double {f.load('%values', 0, 'double')}")


def row_max_function(type: str) -> str:
    """``row_max_TYPE(values, count) -> double``: the largest value, NaN if there is one, and +0 for either 0."""
    f = Function(f"row_max_{type}", "double", [("ptr noalias", "values"), ("i64", "count")])
    start = literal(float("-inf"), type)
    with f.loop("%count", carried=[(type, start)]) as (i, (largest,), following):
        value = f.load("%values", i, type)
        replaced = f.value(f"fcmp ugt {type} {value}, {largest}")  # also if one is a NaN
        kept = f.value(f"fcmp uno {type} {largest}, {largest}")
        chosen = f.value(f"select i1 {replaced}, {type} {value}, {type} {largest}")
        following.append(f.value(f"select i1 {kept}, {type} {largest}, {type} {chosen}"))
    result = f.value(f"fadd {type} {following[0]}, {literal(0.0, type)}")
    return f.text(f"double {result if type == 'double' else f.value(f'fpext float {result} to double')}")


def selection_function() -> str:
    """``select_feed(state, bits, count)``: the counts of one search among magnitudes as i32."""
    f = Function("select_feed", "void", [("ptr noalias", "state"), ("ptr noalias", "bits"), ("i64", "count")])
    fields = {name: f.load("%state", field, "i64") for name, field in SearchField.__members__.items()}
    low, high, guess = (f.value(f"trunc i64 {fields[name]} to i32") for name in ("LOW", "HIGH", "GUESS"))
    histogram, equal = (f.load("%state", SearchField[name], "ptr") for name in ("HISTOGRAM", "EQUAL"))
    wanted = f.value(f"icmp ne i64 {fields['HISTOGRAM']}, 0")
    counted = ("POSITIVE", "ABOVE", "ABOVE_GUESS")
    carried = [("i64", fields[name]) for name in counted]
    with f.loop("%count", GROUP, carried) as (start, totals, following):
        size = f.smaller(f.value(f"sub i64 %count, {start}"), str(GROUP))
        with f.loop(size, carried=[("i32", "0")] * 4) as (i, sums, after):
            bits = f.load("%bits", f.value(f"add i64 {start}, {i}"), "i32")
            tests = [f.value(f"icmp sgt i32 {bits}, {bound}") for bound in ("0", high, guess)]
            inside = f.value(
                f"and i1 {f.value(f'icmp sge i32 {bits}, {low}')}, {f.value(f'icmp sle i32 {bits}, {high}')}"
            )
            for total, test in zip(sums, (*tests, inside), strict=True):
                after.append(f.value(f"add i32 {total}, {f.value(f'zext i1 {test} to i32')}"))
        for total, added in zip(totals, after, strict=False):
            following.append(f.value(f"add i64 {total}, {f.value(f'zext i32 {added} to i64')}"))
        some = f.value(f"and i1 {wanted}, {f.value(f'icmp ne i32 {after[3]}, 0')}")
        counts = f.value(f"select i1 {some}, i64 {size}, i64 0")
        with f.loop(counts) as (i, _, _):
            bits = f.load("%bits", f.value(f"add i64 {start}, {i}"), "i32")
            inside = f.value(
                f"and i1 {f.value(f'icmp sge i32 {bits}, {low}')}, {f.value(f'icmp sle i32 {bits}, {high}')}"
            )
            with f.when(inside):
                number = f.value(f"zext i32 {f.value(f'sub i32 {bits}, {low}')} to i64")
                number = f.value(f"lshr i64 {number}, {fields['SHIFT']}")
                f.store(f.value(f"add i64 {f.load(histogram, number, 'i64')}, 1"), histogram, number, "i64")
    for name, value in zip(counted, following, strict=True):
        f.store(value, "%state", SearchField[name], "i64")
    _count_equal(f, fields, equal, guess)
    return f.text()


def _count_equal(f: Function, fields: dict[str, str], equal: str, guess: str) -> None:
    """Count the elements equal to the guess in each block."""
    block, first = fields["BLOCK"], fields["POSITION"]
    parts = f.value(f"add i64 {f.value(f'udiv i64 %count, {block}')}, 2")
    with f.loop(parts, carried=[("i64", "0")]) as (_, (done,), following):
        position = f.value(f"add i64 {first}, {done}")
        number = f.value(f"udiv i64 {position}, {block}")
        room = f.value(f"sub i64 {block}, {f.value(f'urem i64 {position}, {block}')}")
        taken = f.smaller(room, f.value(f"sub i64 %count, {done}"))
        with f.loop(taken, carried=[("i32", "0")]) as (i, (total,), after):
            bits = f.load("%bits", f.value(f"add i64 {done}, {i}"), "i32")
            test = f.value(f"zext i1 {f.value(f'icmp eq i32 {bits}, {guess}')} to i32")
            after.append(f.value(f"add i32 {total}, {test}"))
        with f.when(f.value(f"icmp ne i64 {taken}, 0")):
            counted = f.value(f"add i64 {f.load(equal, number, 'i64')}, {f.value(f'zext i32 {after[0]} to i64')}")
            f.store(counted, equal, number, "i64")
        following.append(f.value(f"add i64 {done}, {taken}"))
    f.store(f.value(f"add i64 {first}, %count"), "%state", SearchField.POSITION, "i64")
