"""Writes LLVM assembly: functions with loops, in the text form that LLVM parses."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ELEMENT_BYTES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "float": 4, "double": 8}
"""Bytes of the types that are stored."""


def literal(value: float, type: str) -> str:
    """A constant as LLVM writes it: hexadecimal for floating-point types, exact for a number of that type."""
    if type in ("float", "double"):
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
    return str(int(value))


class Function:
    """One function while it is written. Values are names such as ``%12``; every instruction defines a new one.

    Args:
        name: name without ``@``.
        result: type of the result, or ``void``.
        arguments: type (with attributes) and name of each argument.
        exported: whether other modules and Python can call it. Other functions are not inlined, because LLVM's time
            grows with the square of a function's size.
    """

    def __init__(self, name: str, result: str, arguments: Sequence[tuple[str, str]], *, exported: bool = False) -> None:
        self._lines = ["entry:"]
        self._number = 0
        self._block = "entry"
        listed = ", ".join(f"{type} %{argument}" for type, argument in arguments)
        linkage, attributes = ("", "nounwind") if exported else ("internal ", "noinline nounwind")
        self._head = f"define {linkage}{result} @{name}({listed}) {attributes}"

    def value(self, instruction: str) -> str:
        """Append an instruction that has a result, and return the name of the result."""
        name = self._new()
        self._lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        """Append an instruction without a result."""
        self._lines.append(f"  {instruction}")

    def at(self, pointer: str, index: str | int, type: str) -> str:
        """The address of an element of an array."""
        return self.value(f"getelementptr inbounds {type}, ptr {pointer}, i64 {index}")

    def load(self, pointer: str, index: str | int, type: str) -> str:
        """An element of an array, which need not be aligned to more than a byte."""
        return self.value(f"load {type}, ptr {self.at(pointer, index, type)}, align 1")

    def store(self, value: str, pointer: str, index: str | int, type: str) -> None:
        """Set an element of an array."""
        self.do(f"store {type} {value}, ptr {self.at(pointer, index, type)}, align 1")

    def smaller(self, a: str, b: str) -> str:
        """The smaller of two nonnegative i64 numbers."""
        return self.value(f"select i1 {self.value(f'icmp ult i64 {a}, {b}')}, i64 {a}, i64 {b}")

    @contextmanager
    def loop(
        self, count: str, step: str | int | list[str] = 1, carried: Sequence[tuple[str, str]] = ()
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """A loop over ``range(0, count, step)`` of i64.

        Args:
            count: end of the range.
            step: step, more than 0; or a list that the body puts the step into, for parts of different lengths.
            carried: type and first value of each value that is carried from one iteration to the next.

        Yields:
            The index, the carried values, and a list to put the next values into. After the loop, this list holds the
            final values.
        """
        label = f"loop{self._label()}"
        before = self._block
        some = self.value(f"icmp ugt i64 {count}, 0")
        self.do(f"br i1 {some}, label %{label}, label %{label}.end")
        self._open(label)
        position = len(self._lines)
        index = self._new()
        values = [self._new() for _ in carried]
        following: list[str] = []
        yield index, values, following
        advanced = self.value(f"add nuw nsw i64 {index}, {step.pop() if isinstance(step, list) else step}")
        more = self.value(f"icmp ult i64 {advanced}, {count}")
        inside = self._block
        self.do(f"br i1 {more}, label %{label}, label %{label}.end")
        phis = [f"  {index} = phi i64 [0, %{before}], [{advanced}, %{inside}]"]
        phis += [
            f"  {value} = phi {type} [{first}, %{before}], [{after}, %{inside}]"
            for value, (type, first), after in zip(values, carried, following, strict=True)
        ]
        self._lines[position:position] = phis
        self._open(f"{label}.end")
        following[:] = [
            self.value(f"phi {type} [{first}, %{before}], [{after}, %{inside}]")
            for (type, first), after in zip(carried, list(following), strict=True)
        ]

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Instructions that are executed if a condition holds."""
        label = f"when{self._label()}"
        self.do(f"br i1 {condition}, label %{label}, label %{label}.end")
        self._open(label)
        yield
        self.do(f"br label %{label}.end")
        self._open(f"{label}.end")

    def text(self, result: str = "void") -> str:
        """The complete function.

        Args:
            result: type and name of the value that it returns.
        """
        return "\n".join([self._head + " {", *self._lines, f"  ret {result}", "}", ""])

    def _new(self) -> str:
        self._number += 1
        return f"%v{self._number}"

    def _label(self) -> int:
        self._number += 1
        return self._number

    def _open(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label
