"""What torch saves is read as torch loads it, in every format; what has more than tensors is refused by name."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeloom.io.torch_files.reader import read_torch_file
from tests.support.models.torch_files import SparseFile, archive, entries_of, read_values, same, saved
from tests.support.models.torch_mutations import Watch, torch_values

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]
OLD = {"_use_new_zipfile_serialization": False}
UNTYPED = DTYPES[11:]


def read(data: bytes, directory: Path) -> dict[str, torch.Tensor] | str:
    file = directory / "model.bin"
    file.write_bytes(data)
    return read_values(file)


def refused(data: bytes, directory: Path) -> str:
    """The error for a file, while which nothing is executed."""
    with Watch.on() as seen:
        found = read(data, directory)
    assert [event for event in seen if not event.startswith("open")] == []
    assert isinstance(found, str), "it was accepted"
    assert found.startswith(f"{directory / 'model.bin'}: ")
    return found


def state() -> dict[str, Any]:
    values = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return OrderedDict(
        {
            "plain": values,
            "same": values,
            "rows": values[1:3],
            "transposed": values.t(),
            "columns": values[:, 2:4],
            "flipped": values.reshape(2, 3, 4).permute(2, 0, 1),
            "every second": values.reshape(-1)[::2],
            "scalar": torch.tensor(1.5),
            "empty": torch.zeros(0, 5),
            "one": values[2:3, 1:2],
            "expanded": torch.ones(1).expand(7),
            "parameter": torch.nn.Parameter(values.clone()),
        }
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
def test_what_torch_saves_is_read(options: dict[str, Any], protocol: int, tmp_path: Path) -> None:
    found = read(saved(state(), pickle_protocol=protocol, **options), tmp_path)
    assert isinstance(found, dict), found
    assert same(found, state())


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    values = torch.arange(48, dtype=torch.uint8).view(dtype) if dtype is not torch.bool else torch.tensor([True, False])
    found = read(saved({"x": values, "y": values[1:]}, **options), tmp_path)
    if options and dtype in UNTYPED:  # torch writes it and can't load it
        assert isinstance(found, str)
        assert "a storage without a dtype" in found
    else:
        assert isinstance(found, dict), found
        assert same(found, {"x": values, "y": values[1:]})


def test_tensors_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    torch.save(state(), file)
    found = read_torch_file(file)
    assert list(found.offsets) == sorted(found.offsets)
    assert set(found.views) == {"transposed", "columns", "flipped", "every second", "expanded"}
    assert found.names[:2] == ("rows", "one") or found.names[0] in ("plain", "same", "every second")
    assert found.metadata == {"format": "pt"}


def test_a_file_of_more_than_4_gib_has_64_bit_offsets(tmp_path: Path) -> None:
    large = torch.zeros((1 << 32) + 8, dtype=torch.int8)
    expected = {"first": torch.arange(4.0), "large": large, "last": torch.arange(3.0)}
    file = tmp_path / "large.bin"
    with file.open("wb") as stream:
        torch.save(expected, SparseFile(stream))  # type: ignore[arg-type]
        stream.truncate()
    assert file.stat().st_blocks * 512 < 1 << 20 < 1 << 32 < file.stat().st_size
    found = read_torch_file(file)
    assert found.names == ("first", "large", "last")
    assert [kind.nbytes for kind in found.classes] == [16, (1 << 32) + 8, 12]
    data = os.pread(os.open(file, os.O_RDONLY), 12, found.offsets[2])
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), expected["last"])


def test_other_zip_tools_and_small_archives_with_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = entries_of(saved(state()))
    for zip64 in (False, True):
        found = read(archive(entries, zip64=zip64), tmp_path)
        assert isinstance(found, dict), found
        assert same(found, state())
    monkeypatch.setattr("zipfile.ZIP64_LIMIT", 100)  # offsets and the directory, too
    data = archive(entries, zip64=True)
    assert b"PK\6\6" in data
    found = read(data, tmp_path)
    assert isinstance(found, dict), found
    assert same(found, state())


def test_checksums_that_torch_was_told_not_to_compute(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(state())
    finally:
        torch.serialization.set_crc32_options(True)
    found = read(data, tmp_path)
    assert isinstance(found, dict), found
    assert same(found, state())


def test_a_file_of_python_2(tmp_path: Path) -> None:
    """An OrderedDict is made of pairs, texts are bytes, hooks are None, and the state of optimizers has addresses."""
    data = saved({"x": torch.ones(3)}, **OLD)
    start = data.index(b"}q\0X\1\0\0\0x") - 2  # of the pickle of the object
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((U\7storagectorch\nFloatStorage\nU\1kU\6cuda:0K\3NtQK\0"
    tensor += b"(K\3t(K\1t\x89NtR"
    pairs = b"ccollections\nOrderedDict\n](](U\1x" + tensor + b"ee\x85R"
    wrapped = b"\x80\2}(U\12state_dict" + pairs + b"U\11optimizer}\x8a\6\1\2\3\4\5\6Nsu."
    values = torch.tensor([1.0, 2.0, 3.0])
    content = data[:start] + wrapped + b"\x80\2](U\1ke." + (3).to_bytes(8, "little") + values.numpy().tobytes()
    found = read(content, tmp_path)
    assert isinstance(found, dict), found
    assert same(found, {"x": values})
    expected = torch_values(content)
    assert isinstance(expected, dict), expected
    assert same(found, expected)


# ------------------------------------------------------------------------------------------------ what is in a file


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model_state", "model", "module"])
def test_a_wrapped_state_dict(key: str, tmp_path: Path) -> None:
    wrapped = {key: state(), "epoch": 1, "optimizer": {"state": {0: torch.ones(3)}, "lr": [0.1, (1, None)]}}
    found = read(saved(wrapped), tmp_path)
    assert isinstance(found, dict), found
    assert same(found, state())
    (remark,) = read_torch_file(tmp_path / "model.bin").remarks
    assert remark.endswith("they are not tensors of the model: 'epoch', 'optimizer'")


def test_plain_values_next_to_tensors_are_listed(tmp_path: Path) -> None:
    found = read(saved({"x": torch.ones(2), "step": 3, "name": "y", "none": None, "rate": 0.5, "on": True}), tmp_path)
    assert isinstance(found, dict)
    assert list(found) == ["x"]
    (remark,) = read_torch_file(tmp_path / "model.bin").remarks
    assert remark.endswith("'step', 'name', 'none', 'rate' and 1 more")


ONE = torch.ones(2, 2)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a tensor": (lambda: ONE, "is a single tensor without a name"),
    "a list": (lambda: [ONE], "is a list, not a dictionary of tensors"),
    "nothing": (dict, "has no tensors at its top"),
    "no tensors": (lambda: {"a": 1}, "has no tensors at its top, and none under 'state_dict'"),
    "an unknown wrapper": (lambda: {"weights": {"x": ONE}}, "(its keys: 'weights')"),
    "two models": (lambda: {"model": {"x": ONE}, "state_dict": {"x": ONE}}, "has tensors in 'state_dict' and 'model'"),
    "both": (lambda: {"model": {"x": ONE}, "y": ONE}, "has tensors both next to 'model' and in it"),
    "nested": (lambda: {"x": ONE, "y": [ONE]}, "has a list under 'y', next to tensors"),
    "numbered": (lambda: {"x": ONE, 3: ONE}, "has a tensor under 3, next to tensors"),
    "a module": (lambda: torch.nn.Linear(2, 2), "needs 'torch.nn.modules.linear.Linear'"),
    "an object": (lambda: {"x": ONE, "y": Fraction(1, 2)}, "needs 'fractions.Fraction'"),
    "sparse": (lambda: {"x": ONE.to_sparse()}, "needs 'torch._utils._rebuild_sparse_tensor'"),
    "quantized": (
        lambda: {"x": torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8)},
        "needs 'torch._utils._rebuild_qtensor'",
    ),
    "complex numbers of 128 bits": (lambda: {"x": ONE.to(torch.complex128)}, "needs 'torch.ComplexDoubleStorage'"),
    "no values": (lambda: {"x": ONE.to("meta")}, "meta"),
    "a conjugate": (lambda: {"x": ONE.to(torch.complex64).conj()}, "call .resolve_conj()"),
    "a set": (lambda: {"x": ONE, "y": {1}}, "needs '__builtin__.set'"),
    "bytes": (lambda: {"x": ONE, "y": bytearray(b"1")}, "needs '__builtin__.bytearray'"),
    "a key of another type": (lambda: {"x": ONE, "y": {(1, 2): 3}}, "has the key (1, 2)"),
    "a large number as key": (lambda: {"x": ONE, "y": {1 << 70: 3}}, "has the key 1180591620717411303424"),
    "pairs": (lambda: {"x": ONE, "y": defaultdict(list)}, "needs 'collections.defaultdict'"),
}


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")  # quantized tensors are deprecated
def test_more_than_tensors_is_refused_by_name(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, reason = REFUSED[case]
    error = refused(saved(make(), **options), tmp_path)
    assert reason in error or "holds the source code of a class" in error
    assert "runs nothing of a file" in error
    assert "safetensors" in error


class Evil:
    """Would write a file if it were unpickled."""

    def __reduce__(self) -> object:
        return os.system, ("touch /tmp/mergeloom-was-here",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
def test_code_is_not_run(options: dict[str, Any], protocol: int, tmp_path: Path) -> None:
    witness = Path("/tmp/mergeloom-was-here")
    witness.unlink(missing_ok=True)
    error = refused(saved({"x": ONE, "y": Evil()}, pickle_protocol=protocol, **options), tmp_path)
    assert "needs 'posix.system', which is not a tensor" in error
    assert not witness.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!doctype html>", "a web page"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"\x80\2}.", "was not written by torch.save"),
        (pickle.dumps({"x": 1}, 0), "is not a file of torch.save"),
        (b"\x10\0\0\0\0\0\0\0{}", "is not a file of torch.save"),
    ],
)
def test_other_files_are_named(data: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in refused(data, tmp_path)


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    for options in ({}, OLD):
        data = saved({"x": ONE, "y": torch.ones(3)}, **options)
        for end in (*range(0, len(data), 13), *range(len(data) - 50, len(data))):
            refused(data[:end], tmp_path)
        refused(data + b"x", tmp_path)


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    entries = entries_of(saved({"x": ONE}))
    swapped = [(name, b"big" if name.endswith("byteorder") else content) for name, content in entries]
    assert "has the byte order b'big', and mergeloom reads only 'little'" in refused(archive(swapped), tmp_path)
    data = saved({"x": ONE}, **OLD)
    place = data.index(b"little_endian") + len(b"little_endianq\2")
    assert data[place : place + 1] == b"\x88"
    assert "a big-endian machine" in refused(data[:place] + b"\x89" + data[place + 1 :], tmp_path)
