"""Writes checkpoints as public ones are written, without mergeloom's reader and writer, so these can be tested."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.models.shapes import Model, Shape
from tests.support.models.values import BITS, CHUNK, Fill, Random, encode

if TYPE_CHECKING:
    import torch


def header_bytes(entries: Mapping[str, tuple[str, Shape, int, int]], metadata: Mapping[str, str] | None) -> bytes:
    """The length and the JSON that begin a safetensors file, padded with spaces to 8 bytes as its library does.

    Args:
        entries: element type, shape, first and last byte (exclusive, counted from the data's start) by name.
        metadata: ``__metadata__``, or None for none.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for name, (dtype, shape, begin, end) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_checkpoint(
    directory: Path,
    tensors: Model | Mapping[str, Shape | torch.Tensor],
    *,
    dtype: str | Mapping[str, str] = "BF16",
    shard_bytes: int | None = None,
    fill: Fill | int | None = 0,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = {"format": "pt"},
) -> Path:
    """Write a checkpoint as transformers does: shards, index and config.json. Memory stays small at any size.

    Args:
        directory: made if it isn't there.
        tensors: shapes by name, or torch tensors, which keep their dtype and values; a `Model` brings its config.
        dtype: the element type of all tensors given by shape, or of each.
        shard_bytes: shards hold at most this many bytes of tensors (one tensor at least); None for a single file.
        fill: the values of tensors given by shape; a seed stands for `Random`; None leaves holes (zeros, no disk used).
        config: config.json; None for the model's, and for no file where `tensors` is no `Model`.
        metadata: each header's ``__metadata__``.

    Returns:
        The directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtypes: Mapping[str, str] = {}
    if isinstance(tensors, Model):
        config = tensors.config if config is None else config
        dtypes = tensors.dtypes
        tensors = tensors.tensors
    if isinstance(fill, int):
        fill = Random(fill)
    sources = {
        name: _Source.of(name, value, dtypes.get(name) or (dtype if isinstance(dtype, str) else dtype[name]))
        for name, value in tensors.items()
    }
    shards = _shards(sources, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_shard(directory / file, shard, fill, metadata)
        weight_map |= {source.name: file for source in shard}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(source.nbytes for source in sources.values())},
            "weight_map": weight_map,
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return directory


def write_tokenizer(directory: Path, words: int = 32) -> Path:
    """Add the files of a small tokenizer that transformers loads, and a generation config, to a checkpoint.

    The generation config agrees with the checkpoint's config.json about the ids of the special tokens.
    """
    config = directory / "config.json"
    stated: dict[str, Any] = json.loads(config.read_text()) if config.exists() else {}
    ends = {key: stated.get(key, default) for key, default in (("bos_token_id", 1), ("eos_token_id", 2))}
    vocabulary = {"<unk>": 0} | {f"word{number}": number for number in range(1, words)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"},
        "special_tokens_map.json": {"unk_token": "<unk>"},
        "generation_config.json": ends | {"transformers_version": "4.45.0"},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    return directory


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor to be written: `data` holds its bytes, or is None where the fill makes them."""

    name: str
    dtype: str
    shape: Shape
    data: memoryview | None

    @classmethod
    def of(cls, name: str, value: Shape | torch.Tensor, dtype: str) -> _Source:
        if isinstance(value, tuple):
            return cls(name, dtype, value, None)
        import torch

        attributes = {
            "F64": "float64",
            "F32": "float32",
            "F16": "float16",
            "BF16": "bfloat16",
            "BOOL": "bool",
            "F8_E4M3": "float8_e4m3fn",
            "F8_E5M2": "float8_e5m2",
            "F8_E8M0": "float8_e8m0fnu",
            **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
        }
        dtypes = {getattr(torch, attribute): dtype for dtype, attribute in attributes.items()}
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return cls(name, dtypes[value.dtype], tuple(value.shape), flat.numpy().data)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8


def _shards(sources: Mapping[str, _Source], limit: int | None) -> list[list[_Source]]:
    """Tensors in their order, as many to a shard as the limit allows; in a shard by width, then name."""
    shards: list[list[_Source]] = [[]]
    size = 0
    for source in sources.values():
        if limit is not None and shards[-1] and size + source.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.nbytes
    return [sorted(shard, key=lambda source: (-BITS[source.dtype], source.name)) for shard in shards]


def _write_shard(path: Path, shard: list[_Source], fill: Fill | None, metadata: Mapping[str, str] | None) -> None:
    entries: dict[str, tuple[str, Shape, int, int]] = {}
    offset = 0
    for source in shard:
        entries[source.name] = (source.dtype, source.shape, offset, offset + source.nbytes)
        offset += source.nbytes
    with path.open("wb", buffering=0) as file:
        file.write(header := header_bytes(entries, metadata))
        for source in shard:
            file.seek(len(header) + entries[source.name][2])
            for piece in _pieces(source, fill):
                file.write(piece)
        file.truncate(len(header) + offset)


def _pieces(source: _Source, fill: Fill | None) -> Iterator[memoryview]:
    if source.data is not None:
        yield source.data
    elif fill is not None:
        elements = prod(source.shape)
        for start in range(0, elements, CHUNK):
            yield encode(fill(source.name, start, min(CHUNK, elements - start)), source.dtype)


if sys.byteorder != "little":
    raise OSError(f"checkpoints are little-endian, and {os.uname().machine} is not")
