"""What native functions that fill a buffer share: their arguments, the rows of a range, and reading numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..assembly import Function
from ..formats import NIBBLES, STORED, decoded
from ..operations import converted
from .state import Field


@contextmanager
def pieces(f: Function) -> Iterator[tuple[str, str, str, str]]:
    """A loop over the parts of the elements that lie in one row, and follow each other.

    Yields:
        The row, the first column, the number of elements before the part, and its own.
    """
    columns, start, gathered = (
        f.load("%state", field, "i64") for field in (Field.COLUMNS, Field.START, Field.GATHERED)
    )
    gathered = f.value(f"icmp ne i64 {gathered}, 0")
    length: list[str] = []
    with f.loop("%count", length) as (done, _, _):
        place = f.value(f"add i64 %first, {done}")
        in_chunk = f.value(f"sub i64 {place}, {start}")
        listed, run = (_listed(f, field, in_chunk, gathered) for field in (Field.INDICES, Field.RUNS))
        element = f.value(f"select i1 {gathered}, i64 {listed}, i64 {place}")
        row, column = f.value(f"udiv i64 {element}, {columns}"), f.value(f"urem i64 {element}, {columns}")
        room = f.smaller(f.value(f"sub i64 {columns}, {column}"), f.value(f"sub i64 %count, {done}"))
        size = f.smaller(room, run)
        yield row, column, done, size
        length.append(size)


def _listed(f: Function, field: Field, index: str, gathered: str) -> str:
    """An item of a list; a large number if the elements are not gathered."""
    item = f.at(f.load("%state", field, "ptr"), index, "i64")
    pointer = f.value(f"select i1 {gathered}, ptr {item}, ptr {f.at('%state', Field.FAR, 'i64')}")
    return f.load(pointer, 0, "i64")


def fill_function(name: str) -> Function:
    arguments = [("ptr noalias", "state"), ("ptr noalias", "out"), ("i64", "first"), ("i64", "count")]
    return Function(name, "void", arguments)


def read_number(f: Function, pointer: str, index: str | int, dtype: str, work: str) -> str:
    """A stored number as a number of the work dtype."""
    raw = f.load(pointer, index, STORED[dtype].stored)
    return converted(f, *decoded(f, raw, dtype), work)


def stored_type(numbers: str) -> str:
    """The integer type of a stored element: a byte for two numbers of four bits."""
    return "i8" if numbers in NIBBLES else STORED[numbers].stored


def copy_function(work: str) -> str:
    """``copy(out, source, count)``"""
    f = Function(f"copy.{work}", "void", [("ptr noalias", "out"), ("ptr noalias", "source"), ("i64", "count")])
    with f.loop("%count") as (i, _, _):
        f.store(f.load("%source", i, work), "%out", i, work)
    return f.text()
