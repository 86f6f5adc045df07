"""Small tokenizers of the kinds that published models have, made by the tokenizers library."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

TEXT = [
    "The quick brown fox jumps over the lazy dog while the other dogs sleep in the shade of the old tree.",
    "A merge of models takes the tensors of several fine-tunes and averages what they have in common.",
    "Who are you, and what did you learn from the books that you read over the summer?",
    "def add(a, b):\n    return a + b\n\nfor number in range(10):\n    print(add(number, number))",
]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA_2_CHAT = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
LLAMA_3_CHAT = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and its special tokens.

    Args:
        tokenizer: content of tokenizer.json.
        special: special tokens by role, such as ``eos_token``.
        also_end: end tokens of chats, in addition to ``eos_token``.
        template: chat template of the fine-tunes.
        settings: other entries of tokenizer_config.json.
        first: first token by config.json of a model whose tokenizer adds none, such as Qwen's.
    """

    tokenizer: str
    special: dict[str, str]
    also_end: tuple[str, ...] = ()
    template: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    first: str = ""

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def ids(self) -> dict[str, int]:
        """The row of each token."""
        return dict(Tokenizer.from_str(self.tokenizer).get_vocab())

    def id_of(self, role: str) -> int | None:
        """The row of a special token by config.json, or None."""
        token = self.special.get(role) or (self.first if role == "bos_token" else None)
        return self.ids[token] if token else None

    @property
    def ends(self) -> list[int]:
        """The rows of all end tokens, the tokenizer's own first."""
        ids = self.ids
        return [ids[token] for token in (self.special["eos_token"], *self.also_end)]

    def write(self, directory: Path, *, chat: bool, newer: bool) -> None:
        """Write the tokenizer files.

        Args:
            directory: directory of the model.
            chat: whether there is a chat template.
            newer: whether the files are as newer versions of transformers write them.
        """
        (directory / "tokenizer.json").write_text(self.tokenizer)
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special, **self.settings}
        if newer:
            added = json.loads(self.tokenizer)["added_tokens"]
            settings["added_tokens_decoder"] = {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
            }
            settings |= {"clean_up_tokenization_spaces": False, "extra_special_tokens": {}, "padding_side": "left"}
        if chat and self.template:
            settings["chat_template"] = self.template
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        special: dict[str, Any] = dict(self.special)
        if newer:
            options = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            special = {role: {"content": token, **options} for role, token in special.items()}
        (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def _byte_level(special: list[str], size: int = 300) -> str:
    """A byte-level BPE, as in GPT-NeoX, Llama 3 and Qwen: special tokens after the others."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return str(tokenizer.to_str())


def _byte_fallback(special: list[str], size: int = 100) -> str:
    """A BPE with byte fallback, as converted from SentencePiece in Llama 2, Mistral and Gemma: special tokens first."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    content = json.loads(tokenizer.to_str())
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *content["model"]["vocab"]]
    content["model"] |= {"vocab": {piece: row for row, piece in enumerate(pieces)}, "byte_fallback": True}
    content["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return str(tokenizer.to_str())


def _word_piece(size: int) -> str:
    tokenizer = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return str(tokenizer.to_str())


def _unigram() -> str:
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return str(tokenizer.to_str())


_MASKS = {
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "pad_token": "[PAD]",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
}
_SENTENCE_PIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


@cache
def vocabulary(kind: str) -> Vocabulary:
    """The tokenizer of a kind of models."""
    if kind == "llama 2":
        return Vocabulary(
            _byte_fallback(["<unk>", "<s>", "</s>"]), _SENTENCE_PIECE, (), LLAMA_2_CHAT, {"legacy": False}
        )
    if kind == "phi 3":
        special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
        return Vocabulary(_byte_fallback(["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>"]), special, ("<|end|>",))
    if kind == "yi":  # its two ChatML tokens have no rows
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
        content = Tokenizer.from_str(_byte_fallback(["<unk>", "<|startoftext|>", "<|endoftext|>"]))
        content.add_special_tokens([AddedToken(token, special=True) for token in _CHATML_TOKENS])
        return Vocabulary(str(content.to_str()), special, (), CHATML)
    if kind == "gemma":
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        return Vocabulary(_byte_fallback(tokens), special, ("<end_of_turn>",))
    if kind == "nemo":
        special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokens = ["<unk>", "<s>", "</s>", "<pad>", *_CHATML_TOKENS]
        return Vocabulary(_byte_level(tokens), special, ("</s>",), CHATML)
    if kind == "llama 3":
        special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        tokens = [*special.values(), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
        return Vocabulary(_byte_level(tokens), special, ("<|eom_id|>", "<|eot_id|>"), LLAMA_3_CHAT)
    if kind == "qwen":
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
        tokens = ["<|endoftext|>", *_CHATML_TOKENS, *vision]
        return Vocabulary(_byte_level(tokens), special, ("<|endoftext|>",), CHATML, first="<|endoftext|>")
    if kind == "neox":
        tokens = ["<|endoftext|>", "<|padding|>"]
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokens[0])
        return Vocabulary(_byte_level(tokens), special)
    if kind == "t5":
        return Vocabulary(_unigram(), {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    if kind in ("bert", "chinese bert"):
        return Vocabulary(_word_piece(160 if kind == "bert" else 120), _MASKS, (), "", {"do_lower_case": True})
    raise KeyError(kind)
