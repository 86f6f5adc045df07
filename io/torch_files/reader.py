"""Reads where the tensors of a PyTorch checkpoint file lie: of the zip format, and of the one before it.

Both hold a pickle that describes the tensors, and their storages as plain bytes. Sources: ``torch/serialization.py``
(``_save``, ``_legacy_save``), and docs/source/notes/serialization.rst of PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from ...errors import CheckpointError
from ..open_source import open_source, quoted, read_range
from .objects import Storage, Unsupported
from .pickle_reader import PickleReader
from .source import CONVERT, DAMAGED, Metadata, ReadRanges
from .state_dict import TorchFile, describe, find_tensors
from .zip_archive import Entry, read_archive

_ZIP = b"PK\3\4"
_PICKLE = 0x80
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_VERSIONS = range(1, 11)
_METADATA_ENTRIES = ("data.pkl", "byteorder", "version")
_SCRIPT = ("constants.pkl", "code/", "extra/")
_FOREIGN = (
    (b"version ", "a Git LFS pointer, not the weights: run `git lfs pull`, or download the file itself"),
    (b"GGUF", "a GGUF file, which mergeloom can't read: download the model's safetensors files"),
    (b"\x89HDF", "an HDF5 file, which mergeloom can't read: download the model's safetensors files"),
    (b"<", "a web page, probably from a failed download: download the file again"),
)


def read_torch_file(file: Path) -> TorchFile:
    """Read where the tensors of a file lie. Nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, not readable or damaged, or holds more than tensors.
        EnvironmentFailure: reading failed.
    """
    with open_source(file) as (descriptor, size):

        def read(ranges: Sequence[tuple[int, int]]) -> list[bytes]:
            return [read_range(descriptor, offset, nbytes, file=file) for offset, nbytes in ranges]

        return parse_torch_file(file, size, read)


def parse_torch_file(file: Path, size: int, read: ReadRanges) -> TorchFile:
    """Read where the tensors of a file lie, wherever it is; see `read_torch_file`.

    Args:
        file: the file, for references and errors.
        size: size of the file in bytes.
        read: function that reads ranges of the file.
    """
    source = Metadata(file, size, read)
    if size == 0:
        source.refuse("is empty, probably from an interrupted download: download it again")
    magic = source.read(0, min(8, size))
    if magic.startswith(_ZIP):
        return _read_zip(source)
    if magic[0] == _PICKLE:
        return _read_legacy(source)
    for beginning, meaning in _FOREIGN:
        if magic.startswith(beginning):
            raise CheckpointError(f"{file}: is not a PyTorch checkpoint but {meaning}")
    raise CheckpointError(f"{file}: is not a file of torch.save (it begins with {quoted(magic)}): {DAMAGED}")


def _unsupported(source: Metadata, error: Unsupported) -> CheckpointError:
    return CheckpointError(
        f"{source.file}: its pickle {error}. mergeloom reads tensors only, and runs nothing of a file: {CONVERT}; if "
        "torch can't load it either, download it again"
    )


# ------------------------------------------------------------------------------------------------ zip


def _read_zip(source: Metadata) -> TorchFile:
    """Read a file in the zip format: ``NAME/data.pkl``, ``NAME/byteorder`` and storages ``NAME/data/KEY``."""
    entries = _in_folder(source, read_archive(source))
    texts = {name: _content(source, entries[name]) for name in _METADATA_ENTRIES if name in entries}
    if "data.pkl" not in texts:
        source.refuse(f"has no data.pkl, so it is not a file of torch.save: {DAMAGED}")
    version = texts.get("version", b"").strip()
    if not version.isdigit() or int(version[:8]) not in _VERSIONS:
        source.refuse(
            f"has the format version {quoted(version)}, of which mergeloom knows 1 to {_VERSIONS[-1]}: {CONVERT}"
        )
    if texts.get("byteorder", b"little") != b"little":
        source.refuse(f"has the byte order {quoted(texts['byteorder'])}, and mergeloom reads only 'little': {CONVERT}")
    reader = PickleReader(iter([texts["data.pkl"]]))
    try:
        tensors, others = find_tensors(reader.load())
    except Unsupported as error:
        raise _unsupported(source, error) from None
    if reader.position != len(texts["data.pkl"]):
        source.refuse(f"data.pkl continues after its end: {DAMAGED}")
    storages = {name[5:]: entry for name, entry in entries.items() if name.startswith("data/")}
    for key, storage in reader.storages.items():
        if key not in storages or storages[key].nbytes != storage.nbytes:
            found = f"has {storages[key].nbytes:,}" if key in storages else "is missing"
            source.refuse(f"needs {storage.nbytes:,} bytes of data/{quoted(key)}, which {found}: {DAMAGED}")
    unused = [key for key in storages if key not in reader.storages]
    if unused:
        source.refuse(f"has {len(unused)} storages that data.pkl does not name, such as {quoted(unused[0])}: {DAMAGED}")
    starts = {key: entry.offset for key, entry in storages.items()}
    return describe(source.file, tensors, others, starts, "PyTorch (zip)", source.digest())


def _in_folder(source: Metadata, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Return the entries by their names in the archive's only folder."""
    folders = {name.partition("/")[0] for name in entries}
    if len(folders) != 1 or any("/" not in name for name in entries):
        source.refuse(f"its zip archive has {len(folders)} folders, and torch.save writes one: {DAMAGED}")
    inside = {name.partition("/")[2]: entry for name, entry in entries.items()}
    for name in inside:
        if name.startswith(_SCRIPT):
            source.refuse(f"is a TorchScript program ({quoted(name)}), which is code: use the model's checkpoint")
        if not name.startswith(("data/", ".")) and name not in _METADATA_ENTRIES:
            source.refuse(f"has the entry {quoted(name)}, which torch.save does not write: {CONVERT}")
    return inside


def _content(source: Metadata, entry: Entry) -> bytes:
    """Read a small entry and check its CRC-32; 0 means that torch was told not to compute it."""
    raw = source.read(entry.offset, entry.nbytes)
    if entry.crc and crc32(raw) != entry.crc:
        source.refuse(f"{quoted(entry.name)} differs from its CRC-32: {DAMAGED}")
    return raw


# ------------------------------------------------------------------------------------------------ legacy


def _read_legacy(source: Metadata) -> TorchFile:
    """Read a file in the format before zip: five pickles, then the storages with 8 bytes for the size of each."""
    reader = PickleReader(source.blocks(0))
    try:
        if reader.load() != _LEGACY_MAGIC:
            raise Unsupported("was not written by torch.save")
        if reader.load() != _LEGACY_PROTOCOL:
            raise Unsupported("has another protocol than 1001")
        _check_system(reader.load())
        tensors, others = find_tensors(reader.load())
        storages = dict(reader.storages)
        if any(storage.dtype is None for storage in storages.values()):  # torch itself fails on these
            raise Unsupported("has a storage without a dtype, which this format can't have")
        keys = reader.load()
        if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
            raise Unsupported("does not list the storages of its tensors")
    except Unsupported as error:
        raise _unsupported(source, error) from None
    starts = _find_storages(source, reader.position, [storages[key] for key in keys])
    return describe(source.file, tensors, others, starts, "PyTorch (legacy)", source.digest())


def _check_system(system: Any) -> None:
    """Refuse a file from a big-endian machine."""
    if not isinstance(system, dict) or system.get("protocol_version") != _LEGACY_PROTOCOL:
        raise Unsupported("does not describe the machine that wrote it")
    if system.get("little_endian") is not True:
        raise Unsupported("is of a big-endian machine, whose numbers mergeloom doesn't read")


def _find_storages(source: Metadata, position: int, storages: Sequence[Storage]) -> dict[str, int]:
    """Find the first byte of each storage; they follow each other, each after the number of its elements."""
    starts: dict[str, int] = {}
    for storage in storages:
        starts[storage.key] = position + 8
        position += 8 + storage.nbytes
    if position != source.size:
        source.refuse(
            f"has {source.size:,} bytes, and its storages end at byte {position:,}: it is truncated, probably by an "
            "interrupted download, or damaged: download it again"
        )
    counts = source.read_all([(starts[storage.key] - 8, 8) for storage in storages])
    for storage, raw in zip(storages, counts, strict=True):
        if int.from_bytes(raw, "little") != storage.elements:
            source.refuse(f"storage {quoted(storage.key)} has another size than its tensors need: {DAMAGED}")
    return starts
