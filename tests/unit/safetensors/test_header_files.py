"""Headers are read from files and built; errors name foreign formats, and parsing is cheap."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tracemalloc
from math import prod
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.errors import CheckpointError, EnvironmentFailure
from mergeloom.io.safetensors.header import MAX_JSON_BYTES, PAGE, build_header, parse_header, read_header
from mergeloom.io.tensors.dtypes import BF16, DTYPES, F32, DType
from tests.examples import examples
from tests.unit.safetensors.headers import (
    DATA,
    FILE,
    NAMES,
    assert_same_tensors,
    entry,
    file_bytes,
    parse_or_error,
    tensor_lists,
)

# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("begin", "meaning"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\3\4\0\0\10\10" + bytes(8), "pickle"),
        (b"GGUF\3\0\0\0" + bytes(8), "GGUF"),
        (b"<!DOCTYPE html>", "a web page"),
        (b'{"weight_map": {}}', "a JSON file"),
    ],
)
def test_a_file_of_another_kind_is_named(begin: bytes, meaning: str) -> None:
    found = parse_or_error(begin)
    assert isinstance(found, str)
    assert meaning in found


def test_a_hostile_name_is_escaped_and_shortened_in_an_error() -> None:
    name = "\\u001b[2J" + "n" * 100_000
    found = parse_or_error(file_bytes(f'{{"{name}":null}}'))
    assert isinstance(found, str)
    assert "\x1b" not in found
    assert len(found) < 1000


def test_a_raw_that_ends_inside_the_header_is_a_mistake_of_the_caller() -> None:
    raw = file_bytes(entry(shape="[]"), b"x")
    with pytest.raises(ValueError, match="got 20 bytes"):
        parse_header(raw[:20], len(raw), file=FILE)


# ------------------------------------------------------------------------------------------- reading files


def test_read_header_reads_a_file_without_its_tensors(tmp_path: Path) -> None:
    file = tmp_path / "sparse.safetensors"
    head = build_header([("a", BF16, (1 << 20, 1 << 20))], {})
    file.write_bytes(head)
    os.truncate(file, len(head) + (2 << 40))
    header = read_header(file)
    assert header.tensors["a"].nbytes == 2 << 40
    assert header.tensors["a"].file == file


def test_read_header_of_a_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "short.safetensors"
    file.write_bytes(build_header([("a", F32, (4,))], {}) + bytes(15))
    with pytest.raises(CheckpointError, match="1 too few; the file is truncated"):
        read_header(file)


def test_read_header_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.safetensors: there is no such file"):
        read_header(tmp_path / "missing.safetensors")


def test_read_header_of_a_broken_link(tmp_path: Path) -> None:
    link = tmp_path / "x.safetensors"
    link.symlink_to("../../blobs/abc")
    with pytest.raises(CheckpointError, match="is a broken link"):
        read_header(link)


def test_read_header_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory"):
        read_header(tmp_path)


def test_read_header_does_not_wait_for_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [
        (errno.EACCES, CheckpointError, "check its owner and mode"),
        (errno.EIO, EnvironmentFailure, "check the disk"),
        (errno.EMFILE, EnvironmentFailure, "can.t be read"),
    ],
)
def test_read_header_tells_a_forbidden_file_from_a_failing_system(
    number: int, error: type[Exception], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(error, match=reason):
        read_header(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------- building


@settings(max_examples=examples(200), deadline=None)
@given(tensor_lists(), st.dictionaries(NAMES, NAMES, max_size=3), st.none() | st.integers(0, PAGE - 1), DATA)
def test_the_library_opens_what_is_built_and_finds_the_same_tensors(
    tensors: list[tuple[str, DType, list[int]]], metadata: dict[str, str], modulo: int | None, data: Any
) -> None:
    head = build_header(tensors, metadata, data_offset_modulo=modulo)
    assert len(head) % (8 if modulo is None else PAGE) == (modulo or 0)
    raw = head + data.randbytes(sum(dtype.nbytes(prod(shape)) for _, dtype, shape in tensors))
    header = assert_same_tensors(raw)
    assert [(name, t.dtype, list(t.shape)) for name, t in header.tensors.items()] == tensors
    assert header.metadata == metadata
    assert header.data_start == len(head)


def test_a_built_file_opens_with_safe_open(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(
        build_header([("b", F32, (2,)), ("a", BF16, ())], {"format": "pt"}, data_offset_modulo=4095) + bytes(10)
    )
    with safetensors.safe_open(file, framework="np") as opened:
        assert sorted(opened.keys()) == ["a", "b"]
        assert opened.metadata() == {"format": "pt"}
        assert opened.get_slice("b").get_shape() == [2]


@pytest.mark.parametrize("modulo", [0, 1, 7, 4088, 4095])
def test_padding_reaches_any_data_offset(modulo: int) -> None:
    head = build_header([("a", F32, (1,))], {}, data_offset_modulo=modulo)
    assert len(head) % PAGE == modulo
    assert head[8:].rstrip(b" ") == b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", F32, (1,)), ("a", F32, (1,))],
        [("__metadata__", F32, (1,))],
        [("\ud800", F32, (1,))],
        [("a", F32, (-1,))],
        [("a", DTYPES["F4"], (3,))],
        [("a" * MAX_JSON_BYTES, F32, (1,))],
    ],
    ids=["twice", "the metadata's name", "no text", "negative", "part of a byte", "too long"],
)
def test_invalid_tensors_are_rejected(tensors: list[tuple[str, DType, tuple[int, ...]]]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (any of several)
        build_header(tensors, {})


def test_a_modulo_outside_the_page_is_rejected() -> None:
    with pytest.raises(ValueError, match="data_offset_modulo is 4096"):
        build_header([], {}, data_offset_modulo=PAGE)


# ------------------------------------------------------------------------------------------- cost


def test_100_000_tensors_parse() -> None:
    tensors = [
        (f"model.layers.{i // 768}.mlp.experts.{i % 768}.up_proj.weight", BF16, (2048, 7168)) for i in range(100_000)
    ]
    head = build_header(tensors, {})
    header = parse_header(head, len(head) + 100_000 * 2048 * 7168 * 2, file=FILE)
    assert len(header.tensors) == 100_000


def test_parsing_takes_little_memory() -> None:
    tensors = [(f"model.layers.{i}.mlp.up_proj.weight", BF16, (2048, 7168)) for i in range(5_000)]
    head = build_header(tensors, {})
    tracemalloc.start()
    try:
        header = parse_header(head, len(head) + 5_000 * 2048 * 7168 * 2, file=FILE)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(header.tensors) == 5_000
    assert held / 5_000 < 600
    assert peak / 5_000 < 1200


def test_io_imports_no_torch() -> None:
    code = (
        "import sys; from mergeloom.io.checkpoint import checkpoint, identity; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'safetensors', 'networkx')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
