"""Pairs of small models with real tokenizers, made by the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

from tests.support import models

CORPUS = (
    "The quick brown fox jumps over the lazy dog while the other dogs sleep in the shade of the old tree.",
    "A merge of models takes the tensors of several fine-tunes and averages what they have in common.",
    "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, number))",
    "Zebras quickly jump over fences; x1 and x2 are coordinates, <x> is a token & so is <|im_start|>user<|im_end|>.",
)
OTHER = (
    "Die Katze sitzt auf dem Dach und schaut den Vögeln zu, die über die alten Häuser fliegen.",
    "Un merge de modèles prend les tenseurs de plusieurs modèles et en fait la moyenne.",
    "SELECT name, price FROM products WHERE price > 100 ORDER BY price DESC LIMIT 10;",
)
TEXTS = (*CORPUS, *OTHER, "The <x>token</x> is <y> here [MASK] and there.", "naïve café 12345 \t tabs")
HIDDEN = 16

Add = str | AddedToken


def byte_level(corpus: Sequence[str] = CORPUS, size: int = 300, first: Sequence[str] = ("<s>", "</s>")) -> Tokenizer:
    """A byte-level BPE, as of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(first), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def unigram(corpus: Sequence[str] = CORPUS, size: int = 90) -> Tokenizer:
    """A Unigram model, as SentencePiece makes it."""
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def word_piece(corpus: Sequence[str] = CORPUS, size: int = 140) -> Tokenizer:
    """A WordPiece model, as of BERT."""
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["<s>", "</s>", "[UNK]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def reordered(tokenizer: Tokenizer, shift: int) -> Tokenizer:
    """The same tokens in other rows: those after the two special ones are rotated."""
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    count = len(vocabulary) - 2
    content["model"]["vocab"] = {
        text: row if row < 2 else 2 + (row - 2 + shift) % count for text, row in vocabulary.items()
    }
    return Tokenizer.from_str(json.dumps(content))


def with_tokens(tokenizer: Tokenizer, *added: Add) -> Tokenizer:
    """The tokenizer with added tokens."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_tokens(list(added))
    return copy


@dataclass(frozen=True)
class Side:
    """One model of a pair.

    Args:
        tokenizer: makes its tokenizer.
        rows: rows of its embeddings; None for one for each token.
        tied: whether its head is the embedding.
    """

    tokenizer: Callable[[], Tokenizer]
    rows: int | None = None
    tied: bool = False


@dataclass(frozen=True)
class Pair:
    """Two models, `a` and `b`.

    Args:
        a: the base.
        b: the other model.
        settings: other entries of both tokenizer_config.json files.
    """

    a: Side
    b: Side
    settings: dict[str, Any] = field(default_factory=dict)


@cache
def _bpe(size: int = 300) -> Tokenizer:
    return byte_level(size=size)


SPECIAL = AddedToken("<|im_start|>", special=True, normalized=False)
END = AddedToken("<|im_end|>", special=True, normalized=False)
LEFT = AddedToken("<x>", lstrip=True, normalized=False)

PAIRS: dict[str, Pair] = {
    "added tokens": Pair(Side(_bpe), Side(lambda: with_tokens(_bpe(), SPECIAL, END))),
    "other added tokens in the same rows": Pair(
        Side(lambda: with_tokens(_bpe(), "<x>", "<y>")), Side(lambda: with_tokens(_bpe(), "<p>", "<y>", END))
    ),
    "other flags": Pair(Side(lambda: with_tokens(_bpe(), "<x>")), Side(lambda: with_tokens(_bpe(), LEFT, "<y>"))),
    "padding in one": Pair(Side(_bpe, rows=384), Side(_bpe)),
    "padding and added tokens": Pair(Side(_bpe, rows=384), Side(lambda: with_tokens(_bpe(), SPECIAL), rows=320)),
    "reordered": Pair(Side(_bpe), Side(lambda: reordered(_bpe(), 37))),
    "another corpus": Pair(Side(_bpe), Side(lambda: byte_level((*OTHER, *CORPUS), 320))),
    "tied and untied": Pair(Side(_bpe, tied=True), Side(lambda: with_tokens(_bpe(), SPECIAL, "<y>"))),
    "both tied": Pair(Side(_bpe, tied=True), Side(lambda: with_tokens(reordered(_bpe(), 5), "<y>"), tied=True)),
    "unigram": Pair(Side(unigram), Side(lambda: with_tokens(unigram((*OTHER, *CORPUS), 120), SPECIAL))),
    "wordpiece": Pair(Side(word_piece), Side(lambda: with_tokens(word_piece((*CORPUS, *OTHER), 170), "<y>"))),
    "BPE and unigram": Pair(Side(_bpe), Side(unigram)),
}
"""Twelve pairs, of which each has a difference that published models have."""


def write_pair(directory: Path, pair: Pair) -> None:
    """Write the models `a` and `b` of a pair below a directory."""
    for name, side, seed in (("a", pair.a, 1), ("b", pair.b, 2)):
        write_model(directory / name, side.tokenizer(), seed, rows=side.rows, tied=side.tied, settings=pair.settings)


def write_model(
    path: Path,
    tokenizer: Tokenizer,
    seed: int,
    *,
    rows: int | None = None,
    tied: bool = False,
    settings: dict[str, Any] | None = None,
    dtype: str = "F32",
) -> Path:
    """Write a Llama of one layer with a tokenizer. Its embedding has a row for each token, or as many as given."""
    count = rows or max(tokenizer.get_vocab().values()) + 1
    shape = models.llama(layers=1, hidden=HIDDEN, intermediate=32, heads=2, kv_heads=2, vocabulary=count, tied=tied)
    ids = {"bos_token_id": tokenizer.token_to_id("<s>"), "eos_token_id": tokenizer.token_to_id("</s>")}
    model = models.Model(shape.tensors, shape.config | ids)
    models.write_checkpoint(path, model, dtype=dtype, fill=models.Random(seed))
    tokenizer.save(str(path / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **(settings or {}),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    (path / "generation_config.json").write_text(json.dumps(ids) + "\n")
    return path
