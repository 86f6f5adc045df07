"""Models whose embeddings are merged or combined have one vocabulary, or the user learns which tokens differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.files import vocabulary_checks
from mergeloom.engine.model.vocabularies.vocabulary import Difference, Vocabulary, read_vocabulary
from mergeloom.engine.model.warnings import ModelWarning, ModelWarningKind
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, RecipeError
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.models.tokenizers import write_vocabulary
from tests.support.outputs import digests
from tests.support.plans import without_location

CPU = Options(device="cpu", threads=1)
STRICT = Options(device="cpu", threads=1, strict=True)
WORDS = ["<unk>", *(f"word{row}" for row in range(1, 60))]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(name, tokens, added)``: a model with 64 rows and this tokenizer; None for no tokenizer."""

    def make(name: str, tokens: Sequence[str] | None = WORDS, added: Sequence[str] = ()) -> Path:
        model = write_checkpoint(tmp_path / name, tiny_llama(), fill=sum(name.encode()))
        return model if tokens is None else write_vocabulary(model, tokens, added)

    return make


def linear(*models: Path, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": entries, **more}


def stack(*models: Path, **more: Any) -> dict[str, Any]:
    """One layer of each model: the embeddings come from the first model, norm and head from the last."""
    slices = [
        {"sources": [{"model": str(model), "layer_range": [layer, layer + 1]}]} for layer, model in enumerate(models)
    ]
    return {"merge_method": "passthrough", "slices": slices, **more}


def warning_of(recipe: Any) -> ModelWarning:
    """The only warning of a plan."""
    (found,) = plan(recipe, CPU).findings
    assert isinstance(found, ModelWarning)
    assert found.kind is ModelWarningKind.VOCABULARY
    return found


def swapped(first: int, second: int) -> list[str]:
    words = list(WORDS)
    words[first], words[second] = words[second], words[first]
    return words


# ------------------------------------------------------------------------------------------------ differences


def test_unrelated_vocabularies_are_rejected(make: Make) -> None:
    a, b = make("a"), make("b", [f"other{row}" for row in range(60)])
    with pytest.raises(CheckpointError) as caught:
        plan(linear(a, b), CPU)
    message = without_location(caught.value)
    assert message.startswith(f"the vocabularies of {a} and {b} are unrelated: 60 of 60 rows differ; ")
    assert f"row 0 is '<unk>' in {a} and 'other0' in {b}, and 59 others differ as well" in message
    assert "set `allow_vocabulary_mismatch: true`" in message
    assert plan(linear(a, b, allow_vocabulary_mismatch=True), STRICT).warnings == ()


def test_the_same_tokens_in_other_rows_are_unrelated(make: Make) -> None:
    a, b = make("a"), make("b", [WORDS[0], *WORDS[:0:-1]])
    with pytest.raises(CheckpointError, match="are unrelated: 58 of 60 rows differ"):
        plan(linear(a, b), CPU)


def test_a_few_different_rows_are_named(make: Make) -> None:
    a, b = make("a"), make("b", swapped(7, 9))
    found = warning_of(linear(a, b))
    assert found.names == ("word7", "word9")
    assert found.problem == (
        f"the vocabularies of {a} and {b} differ in 2 of 60 rows, which are merged although they belong to different "
        f"tokens: token 'word7' has row 7 in {a} and row 9 in {b}, and 1 other differs as well ('word9')"
    )
    assert "set `allow_vocabulary_mismatch: true`" in found.advice
    with pytest.raises(CheckpointError, match="1 warning, which strict mode treats as errors"):
        plan(linear(a, b), STRICT)
    assert plan(linear(a, b, allow_vocabulary_mismatch=True), STRICT).warnings == ()


def test_different_added_tokens_in_the_last_rows(make: Make) -> None:
    a, b, c = make("a", added=["<x>", "<y>"]), make("b", added=["<p>", "<y>"]), make("c")
    assert warning_of(linear(a, b)).names == ("<x>", "<p>")
    assert warning_of(linear(a, c)).names == ("<x>", "<y>")  # c's rows 60 and 61 are padding
    assert len(plan(linear(a, b, c), CPU).warnings) == 2


@pytest.mark.parametrize(
    ("rows", "compared", "expected"),
    [(1, 1, True), (2, 4, False), (3, 4, True), (8, 64, False), (9, 64, True), (256, 128256, False)]
    + [(12825, 128256, False), (12826, 128256, True), (0, 0, False)],
)
def test_how_many_rows_are_a_few(rows: int, compared: int, expected: bool) -> None:
    assert Difference("", (), rows, compared).unrelated is expected


def test_tokens_without_a_row_are_not_compared(make: Make) -> None:
    """Fine-tunes add a padding token without resizing the embeddings: the models have the same tokens in 64 rows."""
    words = [f"word{row}" for row in range(64)]
    a, b = make("a", words), make("b", words, ["[PAD]"])
    for more in ({}, {"tokenizer_source": "base"}, {"tokenizer": {}}):
        assert plan(linear(a, b, **more), CPU).warnings == ()


def test_deberta_with_and_without_a_tokenizer_json(make: Make) -> None:
    """The published model has spm.model only, and its class adds [MASK]. Fine-tunes have tokenizer.json."""
    a, b = make("a", None), make("b", added=["[MASK]"])
    pieces = [b"\x0a" + bytes([len(word)]) + word.encode() for word in WORDS]
    (a / "spm.model").write_bytes(b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in pieces))
    for more in ({}, {"tokenizer_source": str(b)}, {"tokenizer_source": str(a)}):
        assert plan(linear(a, b, **more), STRICT).warnings == ()
    assert warning_of(linear(a, make("c", added=["<x>"]))).names == ("[MASK]", "<x>")


def test_formats_that_cannot_be_compared(make: Make) -> None:
    a, b = make("a"), make("b", None)
    (b / "qwen.tiktoken").write_text("YQ== 0\n")
    found = warning_of(linear(a, b))
    assert f"{a} has tokenizer.json and {b} has qwen.tiktoken, which cannot be compared" in found.problem
    assert plan(linear(a, b, allow_vocabulary_mismatch=True), STRICT).warnings == ()


# ------------------------------------------------------------------------------------------------ which models


def test_equal_files_are_not_parsed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(directory: Path) -> None:
        raise AssertionError(directory)

    monkeypatch.setattr(vocabulary_checks, "read_vocabulary", forbidden)
    a, b, c = (make(name) for name in "abc")
    for more in ({}, {"tokenizer_source": "union"}, {"tokenizer": {}}, {"files_from": str(c)}):
        assert plan(linear(a, b, c, **more), CPU).warnings == ()


def test_the_words_for_what_the_output_combines(make: Make) -> None:
    a, b = make("a"), make("b", swapped(7, 9))
    stacked = f"the vocabularies of {a} and {b} differ in 2 of 60 rows, although the output has the tokenizer of {a}"
    assert f"{stacked} and embeddings or a head of {b}: token 'word7'" in warning_of(stack(a, b)).problem
    d = make("d", [f"other{row}" for row in range(60)])
    with pytest.raises(
        CheckpointError, match=r"The output has the tokenizer of .*a and embeddings or a head of .*d: set"
    ):
        plan(stack(a, d), CPU)
    with pytest.raises(
        CheckpointError, match="Embeddings are merged row by row, which would mix different tokens: set"
    ):
        plan(linear(a, d), CPU)
    unmerged = linear(a, b, non_layer={"embeddings": str(a), "head": str(b)})
    assert f"the tokenizer of {a} and embeddings or a head of {b}" in warning_of(unmerged).problem


def test_each_vocabulary_is_parsed_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def read(directory: Path) -> Vocabulary | None:
        parsed.append(directory.name)
        return read_vocabulary(directory)

    monkeypatch.setattr(vocabulary_checks, "read_vocabulary", read)
    models = [make("a"), *(make(f"b{number}", swapped(7, number)) for number in range(9, 14))]
    assert len(plan(linear(*models), CPU).warnings) == 5
    assert sorted(parsed) == ["a", "b10", "b11", "b12", "b13", "b9"]


def test_a_stack_with_embeddings_and_head_of_different_models(make: Make) -> None:
    a, b, c = make("a"), make("b", swapped(7, 9)), make("c")
    assert warning_of(stack(a, b)).names == ("word7", "word9")
    assert plan(stack(a, b, c), CPU).warnings == ()  # no embedding or head of b is used


@pytest.mark.parametrize("key", ["non_layer", "outside"])
@pytest.mark.parametrize("part", ["embeddings", "head"])
def test_embeddings_or_a_head_that_the_recipe_chooses(key: str, part: str, make: Make) -> None:
    a, b = make("a"), make("b", swapped(7, 9))
    assert warning_of(stack(a, a, **{key: {part: str(b)}})).names == ("word7", "word9")
    assert plan(stack(a, a, **{key: {"norm": str(b)}}), CPU).warnings == ()


def test_a_stack_of_models_with_different_numbers_of_rows(make: Make) -> None:
    """The advice of the error works."""
    a, large = make("a"), make("large", added=["<x>"])
    write_checkpoint(large, tiny_llama(vocabulary=66), fill=7)
    with pytest.raises(CheckpointError) as caught:
        plan(stack(a, large), CPU)
    assert f"lm_head.weight: {a} has a vocabulary of 64 rows and {large} one of 66" in str(caught.value)
    advice = f"or take it from {a} with `non_layer: {{head: {a}}}`"
    assert advice in str(caught.value)
    assert plan(stack(a, large, non_layer={"head": str(a)}), STRICT).warnings == ()
    for recipe in (linear(a, large), stack(a, large, non_layer={"head": str(large)})):
        with pytest.raises(CheckpointError, match="set `tokenizer_source: union`") as caught:
            plan(recipe, CPU)
        assert "non_layer: {" not in str(caught.value)


def test_files_of_a_model_with_another_vocabulary(make: Make) -> None:
    a, b, c = make("a"), make("b", swapped(7, 9)), make("c", [f"other{row}" for row in range(60)])
    assert warning_of(stack(a, files_from=str(b))).names == ("word9", "word7")  # by row in b
    with pytest.raises(CheckpointError, match=f"the vocabularies of {c} and {a} are unrelated"):
        plan(stack(a, files_from=str(c)), CPU)
    assert plan(stack(a, files_from=str(c), allow_vocabulary_mismatch=True), STRICT).warnings == ()


def test_a_base_that_is_not_merged_but_provides_the_tokenizer(make: Make) -> None:
    a, base = make("a"), make("base", swapped(7, 9))
    assert warning_of(stack(a, base_model=str(base))).names == ("word9", "word7")


def test_a_stage_has_the_vocabulary_of_its_tokenizer(make: Make) -> None:
    a, b, c = make("a"), make("b"), make("c", swapped(7, 9))
    stages = [linear(a, b) | {"name": "mean"}, linear(Path("mean"), c)]
    found = warning_of(stages)
    assert found.names == ("word7", "word9")
    assert f"the vocabularies of {a} and {c}" in found.problem
    stages = [linear(a, c, allow_vocabulary_mismatch=True) | {"name": "mean"}, linear(Path("mean"), b)]
    assert plan(stages, STRICT).warnings == ()


# ------------------------------------------------------------------------------------------------ missing tokenizers


def test_missing_tokenizers_are_reported_once(make: Make) -> None:
    a, b, c = make("a"), make("b", None), make("c", None)
    found = warning_of(linear(a, b, c))
    assert found.problem == (
        f"{b}, {c} have no tokenizer files, so their vocabularies cannot be compared with the other models'"
    )
    assert plan(linear(a, b, c, allow_vocabulary_mismatch=True), STRICT).warnings == ()
    assert "and the output has no tokenizer" in warning_of(linear(b, a)).problem
    assert plan(linear(b, c), CPU).warnings == ()  # no model has one
    assert plan(stack(a, b, a), CPU).warnings == ()  # only layers of b are used


def test_models_are_compared_although_the_output_has_no_tokenizer(make: Make) -> None:
    a, b, c = make("a", None), make("b"), make("c", swapped(7, 9))
    missing, differing = plan(linear(a, b, c), CPU).findings
    (_, stacked) = plan(stack(b, c, base_model=str(a)), CPU).findings
    assert "differ in 2 of 60 rows, although the output has embeddings or heads of both: " in str(stacked)
    assert f"{a} has no tokenizer files" in str(missing)
    assert f"the vocabularies of {b} and {c} differ in 2 of 60 rows" in str(differing)


# ------------------------------------------------------------------------------------------------ unions

UNIONS = ({"tokenizer_source": "union"}, {"tokenizer": {}}, {"tokenizer": {"source": "union"}})


@pytest.mark.parametrize("union", UNIONS, ids=str)
def test_a_union_of_equal_vocabularies_is_that_vocabulary(union: dict[str, Any], make: Make) -> None:
    a, b = make("a"), make("b")
    assert plan(linear(a, b, base_model=str(b), **union), STRICT).files.tokenizer_from == str(b)
    assert plan(linear(a, b, **union), STRICT).files.tokenizer_from == str(a)
    assert plan(linear(make("lone", None), **union), STRICT).warnings == ()


@pytest.mark.parametrize("union", UNIONS, ids=str)
def test_a_union_of_equal_vocabularies_costs_nothing(union: dict[str, Any], tmp_path: Path, make: Make) -> None:
    a, b = make("a"), make("b")
    planned, plain = (plan(linear(a, b, **more), CPU) for more in (union, {}))
    assert (planned.bytes_read, planned.bytes_written) == (plain.bytes_read, plain.bytes_written)
    for each, out in ((planned, "union"), (plain, "plain")):
        merge(each, tmp_path / out)
    assert digests(tmp_path / "union", "*.safetensors") == digests(tmp_path / "plain", "*.safetensors") != {}
    assert digests(tmp_path / "union", "*token*") == digests(a, "*token*") != {}


@pytest.mark.parametrize("union", UNIONS, ids=str)
def test_a_union_needs_tokenizers_and_merges_by_token(union: dict[str, Any], make: Make) -> None:
    a, b, c = make("a"), make("b", swapped(7, 9)), make("c", None)
    assert plan(linear(a, b, **union), STRICT).warnings == ()
    with pytest.raises(
        RecipeError, match=f"{c} has no tokenizer files, so its vocabulary is unknown. Add its tokenizer"
    ):
        plan(linear(a, c, **union), CPU)
    with pytest.raises(RecipeError, match=f"{a} and {b} differ: .*Remove `allow_vocabulary_mismatch`: a union merges"):
        plan(linear(a, b, allow_vocabulary_mismatch=True, **union), CPU)


def test_a_tokenizer_that_the_recipe_sets_merges_by_token(make: Make) -> None:
    a, b, c = make("a"), make("b", swapped(7, 9)), make("c", [f"other{row}" for row in range(60)])
    recipe = linear(a, b, tokenizer_source=str(b))
    assert plan(recipe, STRICT).warnings == ()
    found = warning_of(linear(a, c, tokenizer_source=str(c)))
    assert f"only 0 of the 60 tokens of {a} (0.0%) are in the output's vocabulary" in found.problem
    planned = plan(recipe | {"allow_vocabulary_mismatch": True}, STRICT)
    assert planned.files.tokenizer_from == str(b)
    assert planned.warnings == ()
    assert planned.built.vocabulary is None
