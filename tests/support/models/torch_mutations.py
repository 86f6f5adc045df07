"""PyTorch files that somebody has tampered with, what torch makes of them, and a watch over what mergeloom does."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import sys
import tracemalloc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.support.models.torch_files import archive, entries_of, read_values, same, saved

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
OPCODES = bytes(ord(each.code) for each in pickletools.opcodes)
NAMES = [
    b"torch._utils\n_rebuild_tensor_v2\n", b"torch._utils\n_rebuild_tensor\n", b"torch._utils\n_rebuild_parameter\n",
    b"torch._utils\n_rebuild_tensor_v3\n", b"torch\nFloatStorage\n", b"torch\nHalfStorage\n", b"torch\nint8\n",
    b"torch\nSize\n", b"collections\nOrderedDict\n", b"posix\nsystem\n", b"os\nsystem\n", b"builtins\neval\n",
    b"builtins\nexec\n", b"subprocess\nPopen\n", b"torch\nload\n", b"torch._utils\n_rebuild_sparse_tensor\n",
    b"torch.storage\nUntypedStorage\n", b"pickle\nloads\n", b"torch.jit\nload\n", b"numpy\nload\n",
]  # fmt: skip
PIECES = [
    b"(", b"t", b"R", b"b", b"Q", b"}", b")", b"N", b"\x88", b"K\0", b"J\xff\xff\xff\xff", b"M\xff\xff", b"h\0", b"q\0",
    b"0", b"2", b"\x93", b"\x94", b"\x81", b"\x85", b"cos\nsystem\n", b"X\2\0\0\0id", b"\x8c\2os", b"\x8c\6system",
    b"\x95" + b"\xff" * 8, b"\x8d" + b"\xff" * 8, b"X\xff\xff\xff\xff", b"\x8a\xff" + b"\x01" * 255, b"PK\1\2",
    b"PK\5\6", b"PK\6\6", b"PK\7\b", b"../", b"\0\0\0\0", b"\xff\xff\xff\xff",
]  # fmt: skip
BYTES = 8 << 20
"""No mutated file, of a few kilobytes, may take more memory."""


def bases() -> dict[str, bytes]:
    """Small files of every format."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(6, 5, generator=generator)
    state: dict[str, Any] = OrderedDict(
        {
            "a": values,
            "b": values[2:],
            "c": values.t(),
            "d": torch.nn.Parameter(values.to(torch.bfloat16)),
            "e": torch.arange(5, dtype=torch.int64),
            "f": values.to(torch.float8_e4m3fn),
            "g": torch.tensor(2.0),
            "h": torch.zeros(0, 3),
        }
    )
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    older = OrderedDict((name, value) for name, value in state.items() if name != "f")
    wrapped = {"state_dict": state, "epoch": 3, "loss": [0.5, None, True], "optimizer": {"state": {0: {"m": values}}}}
    old = {"_use_new_zipfile_serialization": False}
    return {
        "zip": saved(state),
        "zip, wrapped": saved(wrapped),
        "zip, protocol 4": saved(state, pickle_protocol=4),
        "legacy": saved(older, **old),
        "legacy, wrapped": saved(wrapped | {"state_dict": older}, **old),
        "legacy, protocol 5": saved(older, pickle_protocol=5, **old),
    }


# ------------------------------------------------------------------------------------------------ what torch says


class _Restricted(pickle.Unpickler):
    """Python's own unpickler, restricted to names that run nothing."""

    def find_class(self, module: str, name: str) -> Any:
        known = module in ("torch", "torch.storage") and (name.endswith("Storage") or name == "Size")
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        known = known or (module == "torch._utils" and name.startswith(("_rebuild_tensor", "_rebuild_parameter")))
        if not known and (module, name) != ("collections", "OrderedDict"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _module() -> ModuleType:
    module = ModuleType("restricted")
    module.Unpickler = _Restricted  # type: ignore[attr-defined]
    module.load = lambda file, **options: _Restricted(file, **options).load()  # type: ignore[attr-defined]
    return module


def torch_values(data: bytes) -> dict[str, Tensor] | str:
    """The tensors of the model that torch finds in a file, or why it doesn't load it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(io.BytesIO(data), "cpu", _module(), weights_only=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not any(isinstance(value, Tensor) for value in found.values()):
        found = next(found[key] for key in WRAPPERS if key in found)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


# ------------------------------------------------------------------------------------------------ tampering


def mutate(chance: random.Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """A few changes of bytes between two positions."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 1, 2, 3))):
        place = chance.randrange(first, max(first + 1, min(len(data) if last is None else last, len(found))))
        change = chance.randrange(7)
        length = chance.choice((1, 1, 2, 4, 8, 40))
        if change == 0:
            found[place : place + 1] = bytes(byte ^ (1 << chance.randrange(8)) for byte in found[place : place + 1])
        elif change == 1:
            found[place : place + 1] = bytes([chance.randrange(256)])
        elif change == 2:
            found[place:place] = chance.choice(PIECES)
        elif change == 3:
            del found[place : place + length]
        elif change == 4:
            found[place : place + length] = chance.choice(PIECES)
        elif change == 5:
            other = chance.randrange(len(found) + 1)
            found[other:other] = found[place : place + length]
        elif chance.random() < 0.3:
            del found[place:]
    return bytes(found)


def mutate_pickle(chance: random.Random, data: bytes, start: int = 0) -> bytes:
    """A change of an opcode, of an argument or of a name in a pickle that begins at a position."""
    codes = [(each.code, argument, place) for each, argument, place in pickletools.genops(data[start:])]
    number = chance.randrange(len(codes))
    code, _, place = codes[number]
    place += start
    end = start + codes[number + 1][2] if number + 1 < len(codes) else place + 1
    change = chance.randrange(6)
    if change == 0:  # another opcode
        return data[:place] + bytes([chance.choice(OPCODES)]) + data[place + 1 :]
    if change == 1:  # one opcode less, or twice
        return data[:place] + data[place:end] * chance.choice((0, 2)) + data[end:]
    if change == 2:  # another argument
        return mutate(chance, data, place + 1, max(end, place + 2))
    if change == 3:  # another name
        names = [p for c, _, p in codes if c == "c"]
        if names:
            place = start + chance.choice(names)
            end = data.index(b"\n", data.index(b"\n", place) + 1) + 1
            return data[:place] + b"c" + chance.choice(NAMES) + data[end:]
    if change == 4:  # something inserted
        return data[:place] + chance.choice(PIECES) + data[place:]
    other = codes[chance.randrange(len(codes))][2] + start  # two opcodes exchanged
    if code in "(tRQ)N\x88\x89" and data[other : other + 1] in b"(tRQ)N\x88\x89":
        found = bytearray(data)
        found[place], found[other] = found[other], found[place]
        return bytes(found)
    return data[:place] + b"(" + data[place:end] + b"t" + data[end:]


def mutated(chance: random.Random, files: dict[str, bytes]) -> tuple[str, bytes, bool]:
    """A mutated file: its kind, its bytes, and whether its checksums fit, so only its pickle shows the change."""
    kind = chance.choice(list(files))
    data = files[kind]
    if kind.startswith("legacy"):
        start = _object_start(data)
        if chance.random() < 0.6:
            return kind, mutate_pickle(chance, data, start), True
        return kind, mutate(chance, data), True
    if chance.random() < 0.6:
        entries = [
            (name, mutate_pickle(chance, content) if name.endswith("data.pkl") else content)
            for name, content in entries_of(data)
        ]
        return kind, archive(entries, zip64=chance.random() < 0.2), True
    return kind, mutate(chance, data), False


def _object_start(data: bytes) -> int:
    stream = io.BytesIO(data)
    for _ in range(3):
        for _ in pickletools.genops(stream):
            pass
    return stream.tell()


# ------------------------------------------------------------------------------------------------ watching


class Watch:
    """Notes what no reader may do while a block runs: the hook stays for the life of the process, and is quiet then."""

    FORBIDDEN = (
        "exec",
        "compile",
        "import",
        "os.system",
        "subprocess.",
        "os.exec",
        "os.posix_spawn",
        "pickle.",
        "ctypes.",
    )
    _installed: Watch | None = None

    def __init__(self) -> None:
        self.active = False
        self.seen: list[str] = []

    @classmethod
    @contextmanager
    def on(cls) -> Iterator[list[str]]:
        """Watch a block; yield the list of what was seen."""
        if cls._installed is None:
            cls._installed = cls()
            sys.addaudithook(cls._installed._note)
        watch = cls._installed
        watch.seen, watch.active = [], True
        try:
            yield watch.seen
        finally:
            watch.active = False

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if event.startswith(self.FORBIDDEN) or (event == "open" and arguments[2] & writes):
            self.seen.append(f"{event} {arguments!r}"[:200])


@dataclass
class Outcome:
    """What came of mutated files."""

    tried: int = 0
    refused: int = 0
    changed: int = 0  # accepted, with other values than the original, as torch reads them
    peak: int = 0
    failures: list[str] = field(default_factory=list)


def fuzz(count: int, seed: int, directory: Path, report: Callable[[str, bytes], None] | None = None) -> Outcome:
    """Read so many mutated files: each is refused, or has the tensors that torch finds in it."""
    chance = random.Random(seed)
    files = bases()
    originals = {}
    file = directory / "mutated.bin"
    for kind, data in files.items():
        file.write_bytes(data)
        originals[kind] = read_values(file)
        expected = torch_values(data)
        assert isinstance(originals[kind], dict), originals[kind]
        assert isinstance(expected, dict), expected
        assert same(originals[kind], expected), kind  # type: ignore[arg-type]
    outcome = Outcome()
    tracemalloc.start()
    for number in range(count):
        kind, data, plausible = mutated(chance, files)
        file.write_bytes(data)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        with Watch.on() as seen:
            found = read_values(file)
        outcome.peak = max(outcome.peak, tracemalloc.get_traced_memory()[1] - before)
        outcome.tried += 1
        if seen:
            outcome.failures.append(f"{number} {kind}: {seen}")
        if isinstance(found, str):
            outcome.refused += 1
            continue
        original = originals[kind]
        assert isinstance(original, dict)
        if same(found, original):
            continue
        outcome.changed += 1
        expected = torch_values(data)
        kept = plausible or _described(found) == _described(original)  # else only values may differ
        if isinstance(expected, str) or not same(found, expected) or not kept:
            outcome.failures.append(f"{number} {kind}: {sorted(found)} is not {str(expected)[:300]}")
            if report is not None:
                report(kind, data)
    tracemalloc.stop()
    return outcome


def _described(values: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (value.dtype, value.shape) for name, value in values.items()}
