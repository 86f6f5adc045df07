"""Interprets the pickle opcodes that tensors need. Nothing is imported, called or executed.

Source: ``pickletools`` and PEP 307, 3154 (protocols 2 to 5). A pickle is a program for a stack machine. The dangerous
opcodes import names and call them; here a name is looked up in `objects.GLOBALS`, and calling it makes a description
of a tensor. Opcodes that the pickles of ``torch.save`` do not have are refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

from .objects import GLOBALS, Attributed, Global, Storage, Unsupported, set_items, shown, storage_of

MAX_OPCODES = 1_500_000
"""The maximum number of opcodes of a pickle: about 35 for a tensor."""
_MAX_MARKS = 100  # levels of nesting
_MAX_LINE = 512  # bytes of a module's or a name's line


class PickleReader:
    """Reads pickles that follow each other in a stream of bytes.

    Args:
        blocks: the bytes, in blocks.

    Attributes:
        position: offset in the stream of the next byte.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.position = 0
        self.storages: dict[str, Storage] = {}
        self._blocks = blocks
        self._block = b""
        self._start = 0  # offset of the block in the stream
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._opcodes = 0
        self._frame_end = 0  # offset in the stream

    def load(self) -> Any:
        """Read one pickle, and return what it describes: dicts, lists, tuples, numbers, texts, `StoredTensor`.

        Raises:
            Unsupported: it has an opcode, name or value that tensors don't need, or is damaged or too large.
        """
        self._stack, self._marks, self._memo, self._frame_end = [], [], {}, 0
        first = self._take(2)
        if first[0] != 0x80 or not 2 <= first[1] <= 5:
            raise Unsupported(f"does not begin as a pickle of protocol 2 to 5 (bytes {shown(first)})")
        while True:
            start = self.position
            code = self._take(1)[0]
            if code == _STOP:
                break
            self._opcodes += 1
            if self._opcodes > MAX_OPCODES:
                raise Unsupported(f"has more than {MAX_OPCODES:,} opcodes, the limit of mergeloom")
            run = _OPCODES.get(code)
            if run is None:
                name = _OTHER_OPCODES.get(code)
                what = f"the opcode {name}" if name else f"0x{code:02x}, which is not an opcode,"
                raise Unsupported(f"has {what} at byte {start:,}, which tensors don't need")
            run(self)
        self.check_frame(self.position)
        if len(self._stack) != 1 or self._marks:
            raise Unsupported(f"ends with {len(self._stack)} objects instead of one")
        result = self._stack[0]
        self._stack, self._memo = [], {}
        return result

    # -------------------------------------------------------------------------------------------- bytes

    def _take(self, nbytes: int) -> bytes:
        """Return the next bytes."""
        begin = self.position - self._start
        if len(self._block) - begin < nbytes:
            parts = [self._block[begin:]]
            missing = nbytes - len(parts[0])
            while missing > 0:
                parts.append(next(self._blocks, b""))
                if not parts[-1]:
                    raise Unsupported("ends within an opcode")
                missing -= len(parts[-1])
            self._block, self._start, begin = b"".join(parts), self.position, 0
        self.position += nbytes
        return self._block[begin : begin + nbytes]

    def _number(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    def _text(self, nbytes: int) -> str:
        """Return a text of some bytes. Long ones are refused before they are read."""
        return self._decoded(self._content(nbytes))

    def _content(self, nbytes: int) -> bytes:
        if nbytes > _MAX_CONTENT:
            raise Unsupported(f"has a text of {nbytes:,} bytes")
        return self._take(nbytes)

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise Unsupported(f"has the text {shown(raw)}, which is not UTF-8") from None

    def _line(self) -> str:
        begin = self.position - self._start
        end = self._block.find(b"\n", begin, begin + _MAX_LINE)
        if end >= 0:
            return self._decoded(self._take(end + 1 - begin)[:-1])
        raw = bytearray()  # the line continues in the next block
        while (byte := self._take(1)) != b"\n":
            raw += byte
            if len(raw) > _MAX_LINE:
                raise Unsupported(f"has a name that begins with {shown(bytes(raw))}")
        return self._decoded(bytes(raw))

    # -------------------------------------------------------------------------------------------- stack

    def push(self, value: Any) -> None:
        """Push a value."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Pop a value. Raises Unsupported if there is none above the last mark."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise Unsupported("takes an object from an empty stack")
        return self._stack.pop()

    def pop_mark(self) -> list[Any]:
        """Pop the values above the last mark, and the mark."""
        if not self._marks:
            raise Unsupported("takes objects from a mark that it did not set")
        start = self._marks.pop()
        found = self._stack[start:]
        del self._stack[start:]
        return found

    def top(self, kind: type) -> Any:
        """Return the value on the top, of a class."""
        value = self.pop()
        if not isinstance(value, kind):
            raise Unsupported(f"adds items to {shown(value)}")
        self.push(value)
        return value

    def set_mark(self) -> None:
        """Mark the top of the stack."""
        if len(self._marks) >= _MAX_MARKS:
            raise Unsupported(f"is nested more than {_MAX_MARKS} deep")
        self._marks.append(len(self._stack))

    def push_tuple(self, count: int) -> None:
        """Replace the last `count` values with a tuple."""
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def put(self, index: int) -> None:
        """Remember the value on the top."""
        value = self.pop()
        self._memo[index] = value
        self.push(value)

    def memoize(self) -> None:
        """Remember the value on the top under the next number."""
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        """Push a value that was remembered."""
        if index not in self._memo:
            raise Unsupported(f"uses object {index}, which it has not made")
        self.push(self._memo[index])

    # -------------------------------------------------------------------------------------------- objects

    def append(self, values: list[Any]) -> None:
        """Append values to the list on the top."""
        self.top(list).extend(values)

    def set_items(self, items: list[Any]) -> None:
        """Add keys and values to the dictionary on the top."""
        target = self.top(dict)
        if len(items) % 2:
            raise Unsupported("sets a key without a value")
        set_items(target, zip(items[::2], items[1::2], strict=True))

    def find_global(self, module: object, name: object) -> None:
        """Push an allowed name."""
        found = GLOBALS.get((module, name)) if type(module) is str and type(name) is str else None
        if found is None:
            raise Unsupported(f"needs {shown(f'{module}.{name}')}, which is not a tensor or a part of one")
        self.push(found)

    def stack_global(self) -> None:
        """Push an allowed name whose parts are on the stack."""
        name, module = self.pop(), self.pop()
        self.find_global(module, name)

    def reduce(self) -> None:
        """Make what an allowed name describes."""
        arguments, called = self.pop(), self.pop()
        if not isinstance(called, Global) or called.build is None or type(arguments) is not tuple:
            raise Unsupported(f"calls {shown(called)} with {shown(arguments)}")
        self.push(called.build(arguments))

    def build(self) -> None:
        """Forget the attributes of an OrderedDict, such as ``_metadata``."""
        state = self.pop()
        if not isinstance(state, dict):
            raise Unsupported(f"sets attributes with {shown(state)}")
        self.top(Attributed)

    def persistent(self) -> None:
        """Push a storage. All that refer to one key must agree."""
        storage = storage_of(self.pop())
        if self.storages.setdefault(storage.key, storage) != storage:
            raise Unsupported(f"gives storage {shown(storage.key)} two sizes or dtypes")
        self.push(storage)

    def frame(self) -> None:
        """Note the end of a frame. Frames only speed up other readers, but these fail if one is not complete."""
        self.check_frame(self.position - 1)
        self._frame_end = self.position + 8 + self._number(8)

    def check_frame(self, position: int) -> None:
        """Refuse a pickle that ends, or begins another frame, before the end of a frame."""
        if position < self._frame_end:
            raise Unsupported(f"has a frame that ends at byte {self._frame_end:,}")

    def protocol(self) -> None:
        """Refuse a second protocol."""
        raise Unsupported("states its protocol more than once")

    def long(self) -> None:
        """Push an integer of up to 255 bytes."""
        self.push(int.from_bytes(self._take(self._number(1)), "little", signed=True))


_MAX_CONTENT: Final = 16 << 20
_STOP: Final = ord(".")

_OPCODES: Final[dict[int, Callable[[PickleReader], None]]] = {
    0x80: PickleReader.protocol,  # PROTO
    0x95: PickleReader.frame,  # FRAME
    ord("("): PickleReader.set_mark,  # MARK
    ord("N"): lambda r: r.push(None),  # NONE
    0x88: lambda r: r.push(True),  # NEWTRUE
    0x89: lambda r: r.push(False),  # NEWFALSE
    ord("J"): lambda r: r.push(int.from_bytes(r._take(4), "little", signed=True)),  # BININT
    ord("K"): lambda r: r.push(r._number(1)),  # BININT1
    ord("M"): lambda r: r.push(r._number(2)),  # BININT2
    0x8A: PickleReader.long,  # LONG1
    ord("G"): lambda r: r.push(struct.unpack(">d", r._take(8))[0]),  # BINFLOAT
    ord("U"): lambda r: r.push(r._text(r._number(1))),  # SHORT_BINSTRING, the str of Python 2
    ord("X"): lambda r: r.push(r._text(r._number(4))),  # BINUNICODE
    0x8C: lambda r: r.push(r._text(r._number(1))),  # SHORT_BINUNICODE
    0x8D: lambda r: r.push(r._text(r._number(8))),  # BINUNICODE8
    ord("C"): lambda r: r.push(r._take(r._number(1))),  # SHORT_BINBYTES
    ord("B"): lambda r: r.push(r._content(r._number(4))),  # BINBYTES
    ord(")"): lambda r: r.push(()),  # EMPTY_TUPLE
    0x85: lambda r: r.push_tuple(1),  # TUPLE1
    0x86: lambda r: r.push_tuple(2),  # TUPLE2
    0x87: lambda r: r.push_tuple(3),  # TUPLE3
    ord("t"): lambda r: r.push(tuple(r.pop_mark())),  # TUPLE
    ord("]"): lambda r: r.push([]),  # EMPTY_LIST
    ord("a"): lambda r: r.append([r.pop()]),  # APPEND
    ord("e"): lambda r: r.append(r.pop_mark()),  # APPENDS
    ord("}"): lambda r: r.push({}),  # EMPTY_DICT
    ord("s"): lambda r: r.set_items([r.pop(), r.pop()][::-1]),  # SETITEM
    ord("u"): lambda r: r.set_items(r.pop_mark()),  # SETITEMS
    ord("h"): lambda r: r.get(r._number(1)),  # BINGET
    ord("j"): lambda r: r.get(r._number(4)),  # LONG_BINGET
    ord("q"): lambda r: r.put(r._number(1)),  # BINPUT
    ord("r"): lambda r: r.put(r._number(4)),  # LONG_BINPUT
    0x94: PickleReader.memoize,  # MEMOIZE
    ord("c"): lambda r: r.find_global(r._line(), r._line()),  # GLOBAL
    0x93: PickleReader.stack_global,  # STACK_GLOBAL
    ord("R"): PickleReader.reduce,  # REDUCE
    ord("b"): PickleReader.build,  # BUILD
    ord("Q"): PickleReader.persistent,  # BINPERSID
}

_OTHER_OPCODES: Final = {
    ord("0"): "POP", ord("1"): "POP_MARK", ord("2"): "DUP", ord("I"): "INT", ord("L"): "LONG", 0x8B: "LONG4",
    ord("F"): "FLOAT", ord("S"): "STRING", ord("T"): "BINSTRING", ord("V"): "UNICODE", ord("l"): "LIST",
    ord("d"): "DICT", ord("g"): "GET", ord("p"): "PUT", ord("i"): "INST", ord("o"): "OBJ", 0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX", ord("P"): "PERSID", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x8E: "BINBYTES8",
    0x8F: "EMPTY_SET", 0x90: "ADDITEMS", 0x91: "FROZENSET", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}  # fmt: skip
