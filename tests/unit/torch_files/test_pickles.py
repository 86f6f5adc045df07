"""The interpreter of pickles has the opcodes that tensors need, checks the stack, and bounds what a file can take."""

from __future__ import annotations

import pickletools
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from mergeloom.io.torch_files import pickle_reader
from mergeloom.io.torch_files.objects import GLOBALS, Unsupported
from mergeloom.io.torch_files.pickle_reader import PickleReader
from tests.support.counting import count_lines
from tests.support.models.torch_mutations import Watch

ALLOWED = set(pickle_reader._OPCODES) | {ord(".")}


def load(data: bytes, block: int = 1 << 20) -> Any:
    return PickleReader(data[start : start + block] for start in range(0, len(data), block)).load()


def refused(code: bytes, protocol: int = 2) -> str:
    """The error for a pickle of these opcodes; nothing is executed."""
    with Watch.on() as seen, pytest.raises(Unsupported) as caught:
        load(b"\x80" + bytes([protocol]) + code + b".")
    assert seen == []
    return str(caught.value)


OTHERS = [each for each in pickletools.opcodes if ord(each.code) not in ALLOWED]


@pytest.mark.parametrize("opcode", OTHERS, ids=lambda each: each.name)
def test_an_opcode_that_tensors_do_not_need_is_refused_by_name(opcode: Any) -> None:
    assert f"the opcode {opcode.name} at byte 2" in refused(opcode.code.encode("latin-1"))


def test_opcodes_and_names_are_few() -> None:
    names = {each.name for each in pickletools.opcodes if ord(each.code) in ALLOWED}
    assert names.isdisjoint({"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "POP", "DUP"})
    assert (len(names), len(GLOBALS)) == (39, 38)  # SECURITY.md states both
    assert {name for name in GLOBALS if GLOBALS[name].build is not None} == {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        *(("torch._utils", f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    }
    assert all(module.startswith(("torch", "collections")) for module, _ in GLOBALS)


def test_unknown_opcodes() -> None:
    assert "0xff, which is not an opcode," in refused(b"\xff")


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_values(block: int) -> None:
    code = b"\x80\4\x95\5" + bytes(7) + b"}(\x8c\1aK\7X\1\0\0\0bJ\xff\xff\xff\xffU\1cG?\xf8" + bytes(6)
    code += b"\x8c\1d\x8a\2\0\1\x8c\1e(N\x88\x89t\x8c\1f](M\1\1eu."
    assert load(code, block) == {"a": 7, "b": -1, "c": 1.5, "d": 256, "e": (None, True, False), "f": [257]}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (b"", "ends with 0 objects"),
        (b"NN", "ends with 2 objects"),
        (b"(N", "ends with 1 objects instead of one"),
        (b"\x85", "takes an object from an empty stack"),
        (b"N(\x85", "takes an object from an empty stack"),
        (b"t", "from a mark that it did not set"),
        (b"h\0", "uses object 0, which it has not made"),
        (b"q\0", "takes an object from an empty stack"),
        (b"N(q\0", "takes an object from an empty stack"),
        (b"Na", "takes an object from an empty stack"),
        (b"NNa", "adds items to None"),
        (b"}NNs", "has the key None"),
        (b"}GAAAAAAAANs", "has the key"),
        (b"}(K\1NK\1Nu", "has the key 1 more than once"),
        (b"}(K\1u", "sets a key without a value"),
        (b"NNR", "calls None with None"),
        (b"ctorch\nFloatStorage\n)R", "calls torch.FloatStorage with ()"),
        (b"ccollections\nOrderedDict\nNR", "calls collections.OrderedDict with None"),
        (b"ccollections\nOrderedDict\n(NtR", "makes a collections.OrderedDict of something"),
        (b"}}b", "adds items to a dict"),
        (b"ccollections\nOrderedDict\n)RNb", "sets attributes with None"),
        (b"cos\nsystem\n", "needs 'os.system'"),
        (b"X\2\0\0\0osX\6\0\0\0system\x93", "needs 'os.system'"),
        (b"NN\x93", "needs 'None.None'"),
        (b"ctorch\nload\n", "needs 'torch.load'"),
        (b"c" + b"x" * 600 + b"\n", "has a name that begins with"),
        (b"NQ", "refers to None, which is not a storage"),
        (b"\x80\2", "states its protocol more than once"),
        (b"X\xff\xff\xff\x7f", "has a text of 2,147,483,647 bytes"),
        (b"\x8d" + b"\xff" * 8, "has a text of"),
        (b"B\xff\xff\xff\xff", "has a text of"),
        (b"X\1\0\0\0\xff", "which is not UTF-8"),
        (b"\x95\3" + bytes(7) + b"N", "has a frame that ends at byte 14"),
        (b"\x95\x0c" + bytes(7) + b"N\x95\1" + bytes(7), "has a frame that ends at byte 23"),
        (b"\x95" + b"\xff" * 8 + b"N", "has a frame that ends at byte 18,446,744,073,709,551,626"),
        (b"(" * 200, "is nested more than 100 deep"),
    ],
)
def test_programs_that_make_no_sense(code: bytes, reason: str) -> None:
    assert reason in refused(code)


@pytest.mark.parametrize("start", [b"", b"}.", b"\x80\0}.", b"\x80\1}.", b"\x80\6}.", b"\x80"])
def test_other_protocols(start: bytes) -> None:
    with pytest.raises(Unsupported):
        load(start)


BOMBS: dict[str, bytes] = {
    "dicts": b"}",
    "dicts that are remembered": b"}\x94",
    "tuples in tuples": b"\x85",
    "lists": b"]",
    "marks": b"(t",
    "texts": b"\x8c\3\xe2\x82\xac",
    "numbers": b"\x8a\xff" + b"\x01" * 255,
    "attributes": b"ccollections\nOrderedDict\n)R",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_and_work_are_bounded(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per opcode, as a file may have 1.5 million of them."""
    monkeypatch.setattr(pickle_reader, "MAX_OPCODES", 20_000)
    piece = BOMBS[bomb]

    def blocks() -> Iterator[bytes]:
        yield b"\x80\4N"
        while True:
            yield piece * 1000

    def run() -> None:
        with pytest.raises(Unsupported, match="more than 20,000 opcodes"):
            PickleReader(blocks()).load()

    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * (150 if bomb != "numbers" else 400)
    assert count_lines(run) < 20_000 * 60
