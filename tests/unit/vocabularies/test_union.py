"""The tokens of a union: their order, their flags, and what tokenizer.json keeps."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tokenizers import AddedToken as TheirToken
from tokenizers import Tokenizer

from mergeloom.engine.model.vocabularies.added_tokens import AddedToken, with_added_tokens
from mergeloom.engine.model.vocabularies.union import ModelTokens, united
from tests.support.vocabularies.pairs import byte_level, unigram, with_tokens, word_piece


def tokens(name: str, text: str, *added: AddedToken) -> ModelTokens:
    rows = {each: row for row, each in enumerate(text.split())}
    return ModelTokens(name, {**rows, **{each.text: each.row for each in added}}, {each.text: each for each in added})


def test_plain_tokens_come_first_in_the_order_of_models_and_rows() -> None:
    base = tokens("a", "x y", AddedToken("<s>", 2, special=True))
    others = [tokens("b", "q p x", AddedToken("<e>", 3)), tokens("c", "r q", AddedToken("<s>", 2, special=True))]
    found = united(base, others, 3).new
    assert [(each.text, each.row) for each in found] == [("q", 3), ("p", 4), ("r", 5), ("<e>", 6)]
    assert found[0].flags == {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }


def test_the_first_models_flags_win() -> None:
    base = tokens("a", "x", AddedToken("<e>", 1, lstrip=True))
    found = united(base, [tokens("b", "x", AddedToken("<e>", 1)), tokens("c", "x", AddedToken("<f>", 1))], 2)
    assert [each.text for each in found.new] == ["<f>"]
    assert found.conflicts == ("<e>",)


def test_a_token_of_the_bases_vocabulary_that_another_model_adds_keeps_its_row() -> None:
    found = united(tokens("a", "x <e> y"), [tokens("b", "x", AddedToken("<e>", 1, special=True))], 3)
    assert [(each.text, each.row, each.special) for each in found.new] == [("<e>", 1, True)]


@pytest.mark.parametrize("make", [byte_level, unigram, word_piece])
def test_a_tokenizer_with_appended_tokens_is_what_the_library_makes(make: Callable[[], Tokenizer]) -> None:
    """The list is spliced into the file; the library's own result of adding the tokens is the reference."""
    tokenizer = make()
    text = tokenizer.to_str(pretty=True)
    first = len(tokenizer.get_vocab())
    new = [AddedToken("<new>", first, normalized=False, special=True), AddedToken('"added_tokens": [', first + 1)]
    made = Tokenizer.from_str(with_added_tokens(text, new))
    wanted = with_tokens(
        tokenizer, TheirToken("<new>", special=True, normalized=False), TheirToken('"added_tokens": [')
    )
    assert json.loads(made.to_str()) == json.loads(wanted.to_str())
    again = with_added_tokens(with_added_tokens(text, new[:1]), new[1:])
    assert json.loads(again) == json.loads(with_added_tokens(text, new))


def test_only_the_list_changes() -> None:
    text = '{"model": {"vocab": {"\\"added_tokens\\": [": 0}},\n\t"added_tokens" : [], "other": 1.50}'
    changed = with_added_tokens(text, [AddedToken("<x>", 1)])
    before, after = text.split("[]")
    assert changed.startswith(before)
    assert changed.endswith(after)
    assert json.loads(changed)["added_tokens"][0]["content"] == "<x>"
    with pytest.raises(ValueError, match="no list"):
        with_added_tokens("{}", [])
