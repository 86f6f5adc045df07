"""Two real sentence encoders, of which one has further tokens, in other rows than the first one's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from tests.support import models
from tests.support.outputs import read_model

EMBEDDING = "embeddings.word_embeddings.weight"
NEW = ("[unused_for_code]", "<tool>", "mergeloom")


def write_encoders(directory: Path) -> None:
    """Write `a`, an encoder from the package index, and `b`, its fine-tune with three tokens more and rows moved."""
    (directory / "a").symlink_to(models.encoder_dir())
    b = directory / "b"
    shutil.copytree(models.fine_tuned_encoder_dir(), b, copy_function=shutil.copyfile)
    content = json.loads((b / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    count = len(words) - 2000
    moved = {text: row if row < 2000 else 2000 + (row + 77) % count for text, row in words.items()}
    assert len(set(moved.values())) == len(words)
    content["model"]["vocab"] = moved
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken(NEW[0], special=True, normalized=False), *NEW[1:]])
    tokenizer.save(str(b / "tokenizer.json"))
    tensors = read_model(b)
    table = tensors[EMBEDDING]
    rows = torch.empty(len(words), dtype=torch.long)
    for text, row in words.items():
        rows[moved[text]] = row
    new = torch.randn(len(NEW), table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.dtype)
    tensors[EMBEDDING] = torch.cat([table[rows], new * 0.02]).contiguous()
    for file in b.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, b / "model.safetensors", {"format": "pt"})
    config = json.loads((b / "config.json").read_text()) | {"vocab_size": len(tensors[EMBEDDING])}
    (b / "config.json").write_text(json.dumps(config))


def expected_rows(directory: Path, weights: tuple[float, float], tokens: list[str]) -> Tensor:
    """The rows of tokens in a linear merge of `a` and `b`, whose union has the tokens of both, in float64."""
    sides = []
    for name in "ab":
        known = Tokenizer.from_file(str(directory / name / "tokenizer.json")).get_vocab()
        sides.append((known, read_model(directory / name)[EMBEDDING].double()))
    merged = []
    for text in tokens:
        own = [table[known[text]] if text in known else None for known, table in sides]
        rows = [each if each is not None else own[1 - number] for number, each in enumerate(own)]
        merged.append(sum(w * row for w, row in zip(weights, rows, strict=True)))  # type: ignore[operator]
    return torch.stack(merged)  # type: ignore[arg-type]
