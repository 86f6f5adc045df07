"""The plan, --explain and --json say where the rows of embeddings come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.report.explain import explain, explanation_sections
from mergeloom.report.plan import plan_sections
from mergeloom.report.sections import Section, plain
from tests.support.vocabularies.pairs import byte_level, with_tokens, write_model

CPU = Options(device="cpu", threads=1)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A union of a padded model, one with two tokens more, and one with one of them."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("a"), byte_level(), 1, rows=320)
    write_model(Path("b"), with_tokens(byte_level(), "<x>", "<y>"), 2)
    write_model(Path("c"), with_tokens(byte_level(), "<y>"), 3)
    entries = [{"model": name, "parameters": {"weight": 1}} for name in "abc"]
    tokens = {"<z>": {"source": {"kind": "zero"}}}
    recipe: dict[str, Any] = {"merge_method": "linear", "models": entries, "tokenizer": {"tokens": tokens}}
    return plan(recipe, CPU)


WANTED = """Vocabulary
  rows       320: 303 tokens, 17 padding rows
  tokenizer  that of a and 3 added tokens
  a          300 own, 1 from b, 1 mean, 1 zero, 17 padding
  b          302 own, 1 zero, 17 padding (some from a)
  c          301 own, 1 from b, 1 zero, 17 padding (some from a)"""


def vocabulary_of(sections: list[Section]) -> str:
    return plain([section for section in sections if section.title == "Vocabulary"])


def test_the_plan_says_it(planned: Plan) -> None:
    assert vocabulary_of(plan_sections(planned)) == WANTED


def test_an_explanation_says_it_of_tensors_with_a_row_for_each_token(planned: Plan) -> None:
    assert vocabulary_of(explanation_sections(explain(planned, "lm_head.weight"))) == WANTED
    assert vocabulary_of(explanation_sections(explain(planned, "model.norm.weight"))) == ""


def test_plain_data(planned: Plan) -> None:
    facts = planned.to_dict()["vocabulary"]
    assert (facts["tokenizer"], facts["rows"], facts["tokens"]) == ("a", 320, 303)
    assert facts["added"] == ["<x>", "<y>", "<z>"]
    assert facts["models"][2] == {
        "model": "c",
        "own": 301,
        "others": {"b": 1},
        "mean": 0,
        "zero": 1,
        "padding": 17,
        "padding_from": ["a"],
    }


def test_rows_that_several_models_use_are_read_again_with_any_budget(planned: Plan) -> None:
    groups = planned.to_dict()["read_again"]
    assert {group["pattern"] for group in groups} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert not any(group["limited_by_budget"] for group in groups)
    (section,) = (each for each in plan_sections(planned) if each.title == "Read more than once")
    assert "parts of each are used in several places of one output tensor" in plain([section])
    assert "--what-if" not in plain([section])


def test_an_explanation_has_each_model_once_with_the_tables_of_its_rows(planned: Plan) -> None:
    sources = explain(planned, "model.embed_tokens.weight").sources
    assert [source.model for source in sources] == ["a", "b", "c"]
    assert [source.format for source in sources] == ["gathered rows"] * 3
    tables = [{part.model for part in source.parts} for source in sources]
    assert tables == [{"a", "b", "c"}, {"a", "b"}, {"a", "b", "c"}]
