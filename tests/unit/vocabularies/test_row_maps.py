"""Where rows come from, by hand: own rows, the only model's, the base's, means, zeros, padding."""

from __future__ import annotations

from mergeloom.engine.model.vocabularies.row_maps import Chosen, ModelRows, RowMaps
from mergeloom.engine.model.vocabularies.union import ModelTokens


def model(name: str, tokens: str, embeddings: int | None = None) -> ModelTokens:
    """A model with a token for each letter; a dot is a row without a token."""
    rows = {text: row for row, text in enumerate(tokens) if text != "."}
    return ModelTokens(name, rows, {}, len(tokens) if embeddings is None else embeddings)


def sources(rows: ModelRows) -> list[list[tuple[int, int, int]]]:
    """For each row of the output, the tables, rows and counts that it comes from."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in rows.tables[0].rows]
    for table in rows.tables:
        for row, source in enumerate(table.rows):
            if source >= 0:
                found[row].append((table.model, source, table.count))
    return found


OUTPUT = {text: row for row, text in enumerate("abcde")}


def test_own_rows_then_the_only_models() -> None:
    maps = RowMaps(OUTPUT, 5, [model("m", "ab"), model("n", "edcab")], base=0)
    own, other = maps.of(0), maps.of(1)
    assert sources(own) == [[(0, 0, 1)], [(0, 1, 1)], [(1, 2, 1)], [(1, 1, 1)], [(1, 0, 1)]]
    assert sources(other) == [[(1, 3, 1)], [(1, 4, 1)], [(1, 2, 1)], [(1, 1, 1)], [(1, 0, 1)]]
    assert (own.counts.own, own.counts.others, other.counts.own) == (2, {1: 3}, 5)
    assert maps.without == ()


def test_the_bases_row_comes_before_a_mean() -> None:
    models = [model("m", "a"), model("base", "abcde"), model("n", "abcde")]
    assert sources(RowMaps(OUTPUT, 5, models, base=1).of(0)) == [[(0, 0, 1)], *([(1, row, 1)] for row in range(1, 5))]
    without_base = RowMaps(OUTPUT, 5, models, base=None).of(0)
    assert sources(without_base)[1] == [(1, 1, 2), (2, 1, 2)]
    assert without_base.counts.mean == 4


def test_means_of_different_numbers_of_models_have_tables_of_their_own() -> None:
    models = [model("m", ""), model("n", "ab"), model("o", "ab"), model("p", "a")]
    found = RowMaps({"a": 0, "b": 1}, 2, models, base=0).of(0)
    assert sources(found) == [[(1, 0, 3), (2, 0, 3), (3, 0, 3)], [(1, 1, 2), (2, 1, 2)]]


def test_a_token_that_no_model_has_is_zeros() -> None:
    maps = RowMaps(OUTPUT, 5, [model("m", "ab"), model("n", "cd")], base=0)
    assert sources(maps.of(0))[4] == []
    assert maps.of(0).counts.zero == 1
    assert maps.without == (4,)


def test_padding_is_own_then_the_bases_then_the_first_ones() -> None:
    models = [model("base", "ab.", 3), model("n", "ba..", 4), model("o", "ab", 2)]
    maps = RowMaps({"a": 0, "b": 1}, 5, models, base=0)
    assert [sources(maps.of(number))[2:] for number in range(3)] == [
        [[(0, 2, 1)], [(1, 3, 1)], []],
        [[(1, 2, 1)], [(1, 3, 1)], []],
        [[(0, 2, 1)], [(1, 3, 1)], []],
    ]
    assert maps.of(2).counts.padding == 3
    assert maps.of(2).counts.zero == 0


def test_a_row_with_a_token_is_not_padding() -> None:
    """The row of a token that the output has elsewhere, or not at all, is not used for another row."""
    maps = RowMaps({"a": 0}, 2, [model("m", "xa"), model("n", "a.", 2)], base=0)
    assert sources(maps.of(0)) == [[(0, 1, 1)], [(1, 1, 1)]]


def test_what_the_recipe_chooses() -> None:
    models = [model("m", "abc"), model("n", "abcde")]
    chosen = {
        "a": Chosen(1, 4, force=True),
        "b": Chosen(None, force=True),
        "d": Chosen(0, 1),
        "e": Chosen(None),
        "c": Chosen(usual=True, force=True),
    }
    maps = RowMaps(OUTPUT, 5, models, 0, chosen)
    assert sources(maps.of(0)) == [[(1, 4, 1)], [], [(0, 2, 1)], [(0, 1, 1)], []]
    assert sources(maps.of(1)) == [[(1, 4, 1)], [], [(0, 2, 1)], [(1, 3, 1)], [(1, 4, 1)]]
    assert list(maps.of(0).same) == [0, 1, 2, -1, -1]  # for ids of special tokens
    assert maps.without == ()


def test_equal_vocabularies_are_unchanged() -> None:
    maps = RowMaps(OUTPUT, 6, [model("m", "abcde.", 6), model("n", "abcde", 5)], base=0)
    assert maps.of(0).unchanged
    assert not maps.of(1).unchanged
