"""Writes PyTorch checkpoint files with torch, and their twins in safetensors."""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mergeloom.errors import CheckpointError
from mergeloom.io.torch_files.reader import read_torch_file
from tests.support.models.files import write_checkpoint

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
ZEROS = bytes(1 << 20)


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The state dict of a small model with tensors that share a storage, and transposed and sliced ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    state: dict[str, Tensor] = OrderedDict({"model.embed_tokens.weight": normal(32, 16)})
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        fused = normal(48, 16)
        for place, name in enumerate("qkv"):
            state[f"{prefix}.self_attn.{name}_proj.weight"] = fused[16 * place : 16 * place + 16]
        state[f"{prefix}.mlp.up_proj.weight"] = normal(16, 24).t()
        state[f"{prefix}.mlp.down_proj.weight"] = normal(16, 48)[:, 4:28]
        state[f"{prefix}.mlp.experts"] = normal(3, 8, 4).permute(0, 2, 1)
        state[f"{prefix}.norm.weight"] = torch.nn.Parameter(normal(16))
    state["model.norm.weight"] = normal(16, 2)[:, 1]
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def write_torch_model(
    directory: Path, state: Mapping[str, Any], *, shards: int = 1, index: bool = True, **options: Any
) -> Path:
    """Write a model as ``save_pretrained(safe_serialization=False)`` does.

    Args:
        directory: directory to make.
        state: tensors by name.
        shards: number of files.
        index: whether to write an index for several files.
        options: further arguments of ``torch.save``.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    names = list(state)
    weight_map = {}
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        some = OrderedDict((name, state[name]) for name in names[number::shards])
        torch.save(some, directory / file, **options)
        weight_map |= dict.fromkeys(some, file)
    if shards > 1 and index:
        content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    return directory


def write_twin(directory: Path, state: Mapping[str, Tensor]) -> Path:
    """Write the same model as one safetensors file."""
    plain = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    return write_checkpoint(directory, plain, config=CONFIG)


class SparseFile:
    """A file to write to, in which long runs of zeros take no space on the disk."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        """Write bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), len(ZEROS)):
            part = view[start : start + len(ZEROS)]
            if part == ZEROS:
                self._stream.seek(len(part), io.SEEK_CUR)
            else:
                self._stream.write(part)
        return len(view)

    def flush(self) -> None:
        """Write what is buffered."""
        self._stream.flush()


def archive(entries: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED, *, zip64: bool = False) -> bytes:
    """A zip archive as Python's library writes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as written:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with written.open(info, "w", force_zip64=zip64) as entry:
                entry.write(content)
    return stream.getvalue()


def entries_of(data: bytes) -> list[tuple[str, bytes]]:
    """The entries of a zip archive, as Python's library reads them."""
    with zipfile.ZipFile(io.BytesIO(data)) as found:
        return [(info.filename, found.read(info)) for info in found.infolist()]


def saved(state: object, **options: Any) -> bytes:
    """What ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(state, stream, **options)
    return stream.getvalue()


def read_values(file: Path) -> dict[str, Tensor] | str:
    """The tensors that mergeloom finds in a file, or its error. Any other exception is a bug."""
    try:
        found = read_torch_file(file)
    except CheckpointError as error:
        return str(error)
    data = file.read_bytes()
    values = {}
    for name, kind, offset in zip(found.names, found.classes, found.offsets, strict=True):
        dtype = getattr(torch, str(kind.dtype.torch_name))
        flat = torch.empty(0, dtype=dtype)
        if kind.nbytes:
            flat = torch.frombuffer(bytearray(data[offset : offset + kind.nbytes]), dtype=dtype)
        view = found.views.get(name)
        values[name] = flat.reshape(kind.shape) if view is None else flat.as_strided(view.shape, view.strides)
    return values


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two dictionaries have the same tensors, bit for bit, in any order."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and _bytes(found[name]) == _bytes(tensor)
        for name, tensor in expected.items()
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
