"""A toy format that stores each tensor of a model in another way, one for each access, and the twin that stores values.

Values are small whole numbers, so a float32 holds them exactly however they are computed, and the merge of a toy model
has to equal the merge of its twin byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mergeloom.engine.model.logical import Decode, LogicalTensor, Part
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.io.tensors.dtypes import F32
from mergeloom.methods.kernel.access import (
    ALIGNED,
    Access,
    BlockRows,
    GatheredRows,
    SameRows,
    Slice,
    TransposedSlice,
    Whole,
)
from mergeloom.methods.kernel.decoder import Decoder, low_rank
from tests.support.models import write_checkpoint

SCALED = Decoder("toy scaled", lambda codes, scales: codes * scales)
ADAPTED = Decoder("toy adapted", lambda base, b, a: base + low_rank(b, a))
BLOCK = (3, 5)
HIDDEN, INNER, RANK, VOCABULARY = 12, 20, 4, 30
ORDER = tuple((7 * row + 3) % VOCABULARY if row % 6 else -1 for row in range(VOCABULARY))
"""For each row of the embedding, the stored row; -1 for a row of zeros."""
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}


def numbers(seed: int, *shape: int) -> Tensor:
    """Whole numbers from -4 to 4 as float32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def write_pair(directory: Path, seed: int) -> tuple[Path, Path]:
    """Write a model in the toy format, and its twin that stores the values."""
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    table = numbers(seed, VOCABULARY, HIDDEN)
    stored["model.embed_tokens.weight.rows"] = table
    picked = [table[row] if row >= 0 else torch.zeros(HIDDEN) for row in ORDER]
    values["model.embed_tokens.weight"] = torch.stack(picked)
    for layer in range(2):
        prefix, key = f"model.layers.{layer}", seed + 100 * (layer + 1)
        codes = numbers(key, INNER, HIDDEN)
        scales = 2.0 ** numbers(key + 1, -(-INNER // BLOCK[0]), -(-HIDDEN // BLOCK[1]))
        stored[f"{prefix}.mlp.up_proj.weight"] = codes.to(torch.bfloat16)
        stored[f"{prefix}.mlp.up_proj.weight.scales"] = scales
        expanded = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:INNER, :HIDDEN]
        values[f"{prefix}.mlp.up_proj.weight"] = codes * expanded
        base, b, a = numbers(key + 2, HIDDEN, INNER), numbers(key + 3, HIDDEN, RANK), numbers(key + 4, RANK, INNER)
        stored[f"{prefix}.mlp.down_proj.weight"] = base
        stored[f"{prefix}.mlp.down_proj.weight.b"] = b
        stored[f"{prefix}.mlp.down_proj.weight.a"] = a.to(torch.bfloat16)
        values[f"{prefix}.mlp.down_proj.weight"] = base + b @ a
        fused = numbers(key + 5, HIDDEN, 3 * HIDDEN)  # q, k and v next to each other in each row
        stored[f"{prefix}.self_attn.qkv"] = fused
        for place, name in enumerate("qkv"):
            part = fused[:, place * HIDDEN : (place + 1) * HIDDEN]
            values[f"{prefix}.self_attn.{name}_proj.weight"] = part.contiguous()
        interleaved = numbers(key + 6, HIDDEN, 2 * HIDDEN)  # the columns of o and of the gate by turns
        stored[f"{prefix}.self_attn.turned"] = interleaved
        values[f"{prefix}.self_attn.o_proj.weight"] = interleaved[:, 0::2].T.contiguous()
        values[f"{prefix}.self_attn.gate.weight"] = interleaved[:, 1::2].T.contiguous()
        stored[f"{prefix}.norm.weight"] = values[f"{prefix}.norm.weight"] = numbers(key + 7, HIDDEN)
    toy = write_checkpoint(directory / f"toy{seed}", stored, config=CONFIG | {"toy": True})
    return toy, write_checkpoint(directory / f"plain{seed}", values, config=CONFIG)


def find(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
    """The values of a toy model."""
    if not (checkpoint.config or {}).get("toy"):
        return

    def part(name: str, access: Access = ALIGNED) -> Part:
        return Part(name, checkpoint.tensors[name], access)

    embedding = "model.embed_tokens.weight"
    yield LogicalTensor(embedding, (VOCABULARY, HIDDEN), F32, (part(f"{embedding}.rows", GatheredRows.of(ORDER)),))
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        up, down = f"{prefix}.mlp.up_proj.weight", f"{prefix}.mlp.down_proj.weight"
        parts = part(up), part(f"{up}.scales", BlockRows(*BLOCK))
        yield LogicalTensor(up, (INNER, HIDDEN), F32, parts, Decode(SCALED))
        adapted = part(down), part(f"{down}.b", SameRows()), part(f"{down}.a", Whole())
        yield LogicalTensor(down, (HIDDEN, INNER), F32, adapted, Decode(ADAPTED))
        square = (HIDDEN, HIDDEN)
        for place, name in enumerate("qkv"):
            sliced = part(f"{prefix}.self_attn.qkv", Slice(place * HIDDEN, 3 * HIDDEN))
            yield LogicalTensor(f"{prefix}.self_attn.{name}_proj.weight", square, F32, (sliced,))
        for place, name in enumerate(("o_proj", "gate")):
            turned = part(f"{prefix}.self_attn.turned", TransposedSlice(place, 2 * HIDDEN, 2))
            yield LogicalTensor(f"{prefix}.self_attn.{name}.weight", square, F32, (turned,))
