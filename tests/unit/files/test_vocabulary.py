"""A vocabulary is read from every kind of tokenizer file, and two of them are compared token by token."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.engine.model.vocabularies.tokenizer_files import same_vocabulary_files
from mergeloom.engine.model.vocabularies.vocabulary import difference, last_row, read_vocabulary
from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.checkpoint import Checkpoint

ROWS = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}


def write(directory: Path, **files: Any) -> Path:
    """A directory with these files; ``__`` stands for a dot, and other values are written as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, (bytes, str)) else json.dumps(content)
        (directory / name.replace("__", ".")).write_bytes(data if isinstance(data, bytes) else data.encode())
    return directory


def tokenizer(vocabulary: Any = ROWS, **added: int) -> dict[str, Any]:
    """What of a tokenizer.json matters here."""
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "added_tokens": [{"id": row, "content": token} for token, row in added.items()],
    }


def piece(text: str) -> bytes:
    """A SentencePiece message's field 1: a piece with its text, its score (4 bytes) and its type (a varint)."""
    body = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15\x00\x00\x80\xbf" + b"\x18\x03"
    return b"\x0a" + bytes([len(body)]) + body


SENTENCEPIECE = b"".join(map(piece, ROWS)) + b"\x12\x02\x08\x01" + b"\x19" + bytes(8)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": tokenizer()},
        {"tokenizer__json": tokenizer([[token, -1.0] for token in ROWS])},
        {"vocab__json": ROWS, "merges__txt": "a b"},
        {"vocab__txt": "\n".join(ROWS) + "\n"},
        {"vocab__txt": "\r\n".join(ROWS)},
        {"tokenizer__model": SENTENCEPIECE},
        {"spiece__model": SENTENCEPIECE},
        {"tokenizer__json": tokenizer(), "vocab__json": {"stale": 0}, "added_tokens__json": {"older": 9}},
        {"tokenizer__json": tokenizer({"<unk>": 0, "a": 1}, b=2, ab=3)},
        {"vocab__json": {"<unk>": 0, "a": 1}, "added_tokens__json": {"b": 2, "ab": 3}},
        {
            "tokenizer__model": SENTENCEPIECE,
            "tokenizer_config__json": {"added_tokens_decoder": {"3": {"content": "ab"}}},
        },
        {
            "tokenizer__json": tokenizer({"<unk>": 0, "a": 1, "b": 2}),
            "tokenizer_config__json": {"added_tokens_decoder": {"3": {"content": "ab", "special": True}}},
        },
    ],
    ids=lambda files: "+".join(files),
)
def test_rows_of_tokens(files: dict[str, Any], tmp_path: Path) -> None:
    found = read_vocabulary(write(tmp_path, **files))
    assert found is not None
    assert found.rows == ROWS


def test_the_librarys_own_files(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    for number, model in enumerate(
        (
            tokenizers.models.BPE(ROWS, [("a", "b")]),
            tokenizers.models.WordLevel(ROWS, unk_token="<unk>"),
            tokenizers.models.WordPiece(ROWS, unk_token="<unk>"),
            tokenizers.models.Unigram([(token, -1.0) for token in ROWS], unk_id=0),
        )
    ):
        ours = tokenizers.Tokenizer(model)
        ours.add_special_tokens(["<|end|>"])
        ours.add_tokens(["\u2028", "a b"])
        directory = tmp_path / str(number)
        directory.mkdir()
        ours.save(str(directory / "tokenizer.json"))
        found = read_vocabulary(directory)
        assert found is not None
        assert found.rows == ours.get_vocab()
        assert len(found.rows) == 7


def test_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_vocabulary(write(tmp_path, tokenizer_config__json={"added_tokens_decoder": {}})) is None
    assert read_vocabulary(tmp_path / "gone") is None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "[]"},
        {"tokenizer__json": "{}"},
        {"tokenizer__json": "{"},
        {"tokenizer__json": {"model": {"vocab": {"a": "b"}}}},
        {"vocab__json": ["a"]},
        {"vocab__txt": b"\xff\xfe"},
        {"tokenizer__model": b"\x0a\xff"},
        {"tokenizer__model": b"\x0b"},
        {"tokenizer__model": b"\x80" * 20},
        {"spm__model": b""},
        {"tokenizer__model": piece("a")[:-1]},
        {"vocab__json": {}, "added_tokens__json": []},
        {"vocab__json": {}, "added_tokens__json": [1]},
        {"vocab__json": {}, "tokenizer_config__json": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        {"vocab__json": {}, "tokenizer_config__json": [1]},
        {"tokenizer__json": {"model": {"vocab": {"a": float("inf")}}}},
        {"tokenizer__json": {"model": {"vocab": {"a": 1.5}}}},
        {"spiece__model": SENTENCEPIECE, "tokenizer_config__json": {"extra_ids": "2"}},
        {"spiece__model": SENTENCEPIECE, "tokenizer_config__json": {"extra_ids": 10**12}},
        {"tokenizer__json": {"model": {"vocab": {}}, "added_tokens": [{"content": "a", "id": float("nan")}]}},
    ],
    ids=str,
)
def test_damaged_files_are_said(files: dict[str, Any], tmp_path: Path) -> None:
    directory = write(tmp_path, **files)
    if files.get("added_tokens__json") == []:  # no tokens, however they are written
        assert read_vocabulary(directory) is not None
        return
    with pytest.raises(CheckpointError, match=r"download (it|them) again"):
        read_vocabulary(directory)


@given(st.binary(max_size=60))
def test_any_bytes_are_pieces_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = write(tmp_path_factory.mktemp("any"), tokenizer__model=data)
    with contextlib.suppress(CheckpointError):
        assert read_vocabulary(directory) is not None


def compared(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether two sets of files hold a vocabulary in the same bytes, and how the vocabularies differ."""
    one, other = write(tmp_path / "1", **first), write(tmp_path / "2", **second)
    ours, theirs = read_vocabulary(one), read_vocabulary(other)
    assert ours is not None
    assert theirs is not None
    models = [Checkpoint(directory, {}, None, {}, (), ()) for directory in (one, other)]
    same = same_vocabulary_files(*models)
    assert same_vocabulary_files(*reversed(models)) is same
    found = difference(ours, theirs, ("A", "B"))
    return same, None if found is None else found.text


def test_equal_ones(tmp_path: Path) -> None:
    plain = {"tokenizer__json": tokenizer()}
    assert compared(tmp_path / "a", plain, plain) == (True, None)
    spaced = {"tokenizer__json": json.dumps(tokenizer(), indent=2)}
    assert compared(tmp_path / "b", plain, spaced) == (False, None)
    assert compared(tmp_path / "c", plain, {"tokenizer__model": SENTENCEPIECE}) == (False, None)
    told = {"tokenizer_config__json": {"added_tokens_decoder": {"3": {"content": "ab"}}, "model_max_length": 5}}
    assert compared(tmp_path / "d", plain, plain | told) == (False, None)
    assert compared(tmp_path / "e", plain | told, plain | {"tokenizer_config__json": {}}) == (False, None)
    tekken = {"tekken__json": {"vocab": []}}
    assert compared(tmp_path / "f", tekken, tekken) == (True, None)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (tokenizer(), tokenizer(new=4), "token 'new' has no row in A and row 4 in B"),
        (
            tokenizer(new=4, newer=5),
            tokenizer(),
            "token 'new' has row 4 in A and no row in B, and 1 other differs",
        ),
        (tokenizer(), tokenizer({"<unk>": 0, "b": 1, "a": 2, "ab": 3}), "token 'a' has row 1 in A and row 2 in B"),
        (tokenizer(), tokenizer({"<unk>": 0, "a": 1, "c": 2, "ab": 3}), "row 2 is 'b' in A and 'c' in B"),
    ],
)
def test_the_first_difference_is_named(first: Any, second: Any, words: str, tmp_path: Path) -> None:
    same, found = compared(tmp_path, {"tokenizer__json": first}, {"tokenizer__json": second})
    assert not same
    assert found is not None
    assert words in found


def test_renamed_tokens_are_one_difference_each(tmp_path: Path) -> None:
    """As Hermes does with two of Llama 3's reserved tokens."""
    first, second = tokenizer(r1=4, r2=5, r3=6, only=7), tokenizer(start=4, end=5, r3=6)
    same, text = compared(tmp_path, {"tokenizer__json": first}, {"tokenizer__json": second})
    assert not same
    assert text == "row 4 is 'r1' in A and 'start' in B, and 2 others differ as well ('r2' / 'end', 'only')"


T5 = {"extra_ids": 2, "tokenizer_class": "T5Tokenizer"}
EXTRA = tokenizer([[token, 0.0] for token in ROWS]) | {
    "added_tokens": [{"id": 4 + number, "content": f"<extra_id_{1 - number}>"} for number in range(2)]
}


@pytest.mark.parametrize(
    ("files", "added"),
    [
        ({"spm__model": SENTENCEPIECE}, {"[MASK]": 4}),
        ({"spm__model": SENTENCEPIECE + piece("[MASK]")}, {"[MASK]": 4}),
        ({"spm__model": SENTENCEPIECE, "added_tokens__json": {"[MASK]": 7}}, {"[MASK]": 7}),
        ({"sentencepiece__model": SENTENCEPIECE}, {}),
        ({"spiece__model": SENTENCEPIECE, "tokenizer_config__json": {}}, {}),
        (
            {
                "spiece__model": SENTENCEPIECE,
                "special_tokens_map__json": {"additional_special_tokens": ["<extra_id_0>", "<x>"]},
            },
            {"<extra_id_0>": 4},
        ),
        ({"spiece__model": SENTENCEPIECE, "tokenizer_config__json": T5}, {"<extra_id_1>": 4, "<extra_id_0>": 5}),
        ({"spiece__model": SENTENCEPIECE, "tokenizer_config__json": T5 | {"extra_ids": 0}}, {}),
        ({"tokenizer__model": SENTENCEPIECE, "tokenizer_config__json": {"extra_ids": 2}}, {}),
    ],
)
def test_tokens_that_the_class_of_the_tokenizer_adds(
    files: dict[str, Any], added: dict[str, int], tmp_path: Path
) -> None:
    found = read_vocabulary(write(tmp_path, **files))
    assert found is not None
    assert found.rows == ROWS | added
    assert last_row(tmp_path) >= max(found.rows.values())


def test_t5s_default_number_of_extra_tokens(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "T5TokenizerFast"}
    found = read_vocabulary(write(tmp_path, spiece__model=SENTENCEPIECE, tokenizer_config__json=settings))
    assert found is not None
    assert len(found.rows) == 104
    assert (found.rows["<extra_id_99>"], found.rows["<extra_id_0>"]) == (4, 103)


def test_a_sentencepiece_model_and_the_tokenizer_json_made_from_it(tmp_path: Path) -> None:
    piece_files = {"spiece__model": SENTENCEPIECE, "tokenizer_config__json": T5}
    assert compared(tmp_path / "t5", {"tokenizer__json": EXTRA}, piece_files) == (False, None)
    mask = tokenizer([[token, 0.0] for token in ROWS], **{"[MASK]": 4})
    assert compared(tmp_path / "deberta", {"tokenizer__json": mask}, {"spm__model": SENTENCEPIECE}) == (False, None)
    other = {"spiece__model": SENTENCEPIECE, "tokenizer_config__json": T5 | {"extra_ids": 1}}
    text = compared(tmp_path / "fewer", {"tokenizer__json": EXTRA}, other)[1]
    assert text == "token '<extra_id_1>' has row 4 in A and no row in B, and 1 other differs as well ('<extra_id_0>')"


def test_tokens_that_are_bytes(tmp_path: Path) -> None:
    one, other = {"qwen__tiktoken": "YQ== 0"}, {"qwen__tiktoken": "Yg== 0"}
    assert compared(tmp_path / "a", one, other)[1] == ("row 0 is 'a' in A and 'b' in B")
    assert compared(tmp_path / "odd", one, {"qwen__tiktoken": "a"})[1] == "qwen.tiktoken differs between A and B"
    assert "cannot be compared" in str(compared(tmp_path / "b", one, {"tokenizer__json": tokenizer()})[1])
    added = one | {"tokenizer_config__json": {"added_tokens_decoder": {"7": {"content": "<|end|>"}}}}
    assert compared(tmp_path / "c", one, added) == (False, "token '<|end|>' has no row in A and row 7 in B")
