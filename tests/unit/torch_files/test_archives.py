"""Zip archives in which two programs could see different contents, or that lead elsewhere, are refused."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergeloom.io.torch_files.source import Metadata
from mergeloom.io.torch_files.zip_archive import Entry, read_archive
from tests.support.models.torch_files import archive, entries_of, read_values, saved

STATE = {"x": torch.arange(6.0), "y": torch.ones(3)}
DATA = saved(STATE)
PLAIN = archive(entries_of(DATA))  # Python's archives have no padding and no descriptors


def entries(data: bytes) -> dict[str, Entry]:
    """The entries of an archive in memory."""
    return read_archive(Metadata(Path("x.bin"), len(data), lambda ranges: [data[o : o + n] for o, n in ranges]))


def refused(data: bytes, directory: Path) -> str:
    file = directory / "x.bin"
    file.write_bytes(data)
    found = read_values(file)
    assert isinstance(found, str), "it was accepted"
    return found


def central(data: bytes, number: int) -> int:
    """The offset of an entry in the central directory."""
    place = data.index(b"PK\1\2")
    for _ in range(number):
        place = data.index(b"PK\1\2", place + 4)
    return place


def patched(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


@pytest.mark.parametrize("data", [DATA, PLAIN], ids=["torch", "zipfile"])
def test_entries_are_those_of_the_library(data: bytes) -> None:
    found = entries(data)
    assert {name: data[each.offset : each.offset + each.nbytes] for name, each in found.items()} == dict(
        entries_of(data)
    )


def test_compressed_entries(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        data = archive([(name, content + bytes(2000)) for name, content in entries_of(DATA)], method)
        assert f"is compressed (method {method})" in refused(data, tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("archive/../../x", "not a path of a file inside the archive"),
        ("/etc/passwd", "not a path of a file inside the archive"),
        ("archive//x", "not a path of a file inside the archive"),
        ("archive/./x", "not a path of a file inside the archive"),
        ("archive/x/", "not a path of a file inside the archive"),
        ("c:\\x", "not a path of a file inside the archive"),
        ("archive/a\x1b[2J", "not a path of a file inside the archive"),
        ("other/x", "has 2 folders"),
        ("x", "has 2 folders"),
        ("archive/code/__torch__.py", "is a TorchScript program"),
        ("archive/constants.pkl", "is a TorchScript program"),
        ("archive/x", "which torch.save does not write"),
        ("archive/data/99", "storages that data.pkl does not name"),
    ],
)
def test_names(name: str, reason: str, tmp_path: Path) -> None:
    assert reason in refused(archive([*entries_of(DATA), (name, b"x")]), tmp_path)


@pytest.mark.parametrize(
    ("left_out", "reason"),
    [
        ("data.pkl", "has no data.pkl"),
        ("version", "has the format version b''"),
        ("data/0", "data/'0', which is missing"),
    ],
)
def test_missing_entries(left_out: str, reason: str, tmp_path: Path) -> None:
    data = archive([each for each in entries_of(DATA) if not each[0].endswith(left_out)])
    assert reason in refused(data, tmp_path)


@pytest.mark.parametrize("version", [b"0", b"11", b"x", b"-1", b"9" * 400, "\u0663".encode()])
def test_unknown_versions(version: bytes, tmp_path: Path) -> None:
    data = archive([(name, version if name.endswith("/version") else each) for name, each in entries_of(DATA)])
    assert "has the format version" in refused(data, tmp_path)


@pytest.mark.filterwarnings("ignore")  # of the library, about the name
def test_names_that_occur_twice(tmp_path: Path) -> None:
    data = archive([*entries_of(DATA), ("archive/version", b"3\n")])
    assert "lists 'archive/version' more than once" in refused(data, tmp_path)


def test_another_checksum(tmp_path: Path) -> None:
    found = entries_of(PLAIN)
    pickle = dict(found)["archive/data.pkl"]
    place = PLAIN.index(pickle)
    assert "'archive/data.pkl' differs from its CRC-32" in refused(patched(PLAIN, place + 5, b"\0"), tmp_path)


CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "encrypted": (lambda d: patched(d, central(d, 0) + 8, b"\1\0"), "is encrypted"),
    "unknown flags": (lambda d: patched(d, central(d, 0) + 8, b"\x20\0"), "unknown zip flags"),
    "a method in the directory only": (lambda d: patched(d, central(d, 0) + 10, b"\x08\0"), "is compressed"),
    "a method in the local header only": (lambda d: patched(d, 8, b"\x08\0"), "disagrees with the zip directory"),
    "another name in the local header": (lambda d: patched(d, 30, b"X"), "disagrees with the zip directory"),
    "another size in the local header": (lambda d: patched(d, 18, b"\1"), "disagrees with the zip directory"),
    "another date in the local header": (lambda d: patched(d, 12, b"\1"), "disagrees with the zip directory"),
    "another stored size": (lambda d: patched(d, central(d, 0) + 20, b"\1\0\0\0"), "of which 1 are stored"),
    "entries that overlap": (
        lambda d: patched(d, central(d, 1) + 42, struct.pack("<L", 0)),
        "has no local header|begins at byte|disagrees",
    ),
    "an entry past the directory": (lambda d: patched(d, central(d, 1) + 42, b"\xff\xff\xff\x7f"), "ends after byte"),
    "a disk of a split archive": (lambda d: patched(d, central(d, 0) + 34, b"\1"), "on another disk"),
    "a split archive": (lambda d: patched(d, len(d) - 18, b"\1"), "is a part of a split zip archive"),
    "a comment": (lambda d: patched(d, len(d) - 2, b"\1\0") + b"x", "its zip directory is not at the end"),
    "fewer entries": (lambda d: patched(d, len(d) - 14, b"\1\0\1\0"), "bytes after its last entry"),
    "more entries": (lambda d: patched(d, len(d) - 14, b"\x0a\0\x0a\0"), "ends within an entry|list of entries"),
    "very many entries": (lambda d: patched(d, len(d) - 14, b"\xff\xff\xff\xff"), "states 65,535 entries"),
    "a directory elsewhere": (lambda d: patched(d, len(d) - 6, b"\0\0\0\0"), "and not those before byte"),
    "something before the first entry": (lambda d: b"PK\3\4" + d, "and not those before byte"),
    "something between entries": (
        lambda d: _with_gap(d),
        "is not followed by a matching descriptor or the next entry",
    ),
    "no offset with 64 bits": (
        lambda d: patched(d, central(d, 1) + 42, b"\xff" * 4),
        "a zip64 field that does not fit",
    ),
}


def _with_gap(data: bytes) -> bytes:
    """An archive with bytes between its last entry and its directory."""
    start = data.index(b"PK\1\2")
    found = data[:start] + b"gap" + data[start:]
    return patched(found, len(found) - 6, struct.pack("<L", start + 3))


@pytest.mark.parametrize("change", CHANGES)
def test_archives_that_do_not_agree_with_themselves(change: str, tmp_path: Path) -> None:
    make, reason = CHANGES[change]
    error = refused(make(PLAIN), tmp_path)
    assert any(each in error for each in reason.split("|")), error


def test_a_descriptor_that_disagrees(tmp_path: Path) -> None:
    place = DATA.index(b"PK\7\b")
    for offset in (0, 4, 8, 12):
        assert "is not followed by a matching descriptor" in refused(patched(DATA, place + offset, b"\x77"), tmp_path)


def test_directories_with_64_bits_that_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipfile.ZIP64_LIMIT", 100)
    data = archive(entries_of(DATA), zip64=True)
    record = data.index(b"PK\6\6")
    assert "disagree" in refused(patched(data, record + 4, b"\x2d"), tmp_path)
    assert "does not point to the record" in refused(patched(data, record + 56 + 8, b"\0"), tmp_path)
    field = data.index(b"\1\0\x10\0")  # of the first local header
    assert "disagrees" in refused(patched(data, field + 4, b"\x77"), tmp_path)
