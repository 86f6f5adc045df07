"""The model card: metadata that the Hub knows, no path of the machine, the recipe as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeloom.engine.files.card import CardMethod, CardModel, model_card
from mergeloom.engine.files.licenses import license_of
from mergeloom.engine.files.published import published_names, published_recipe

RECIPE = """\
models:
  - model: /home/me/checkpoints/my-tune/
    parameters: {weight: 0.5}
  - model: org/other@main
    parameters: {weight: [0, 0.5, 1]}
merge_method: linear
base_model: org/base
chat_template: "{% if x %}</think>\\n{{ x }}/{{ y }}</s>{% endif %}"
dtype: bfloat16
"""
TUNE = CardModel("/home/me/checkpoints/my-tune/", local="my-tune")
OTHER = CardModel("org/other", revision="main")
BASE = CardModel("org/base")


def card(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "name": "merged",
        "methods": [CardMethod("linear", "https://arxiv.org/abs/2203.05482")],
        "models": [TUNE, OTHER],
        "recipe": RECIPE,
        "layers": 16,
        "parameters": 1_235_814_400,
        "dtype": "bfloat16",
        "base_model": BASE,
        "command": "mergeloom merge mergekit_config.yml merged --seed 3",
        "versions": {"mergeloom": "1.2.3", "torch": "2.13.0+cpu"},
    }
    return model_card(**arguments | changes)


def metadata(text: str) -> dict[str, Any]:
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def test_metadata() -> None:
    assert metadata(card()) == {
        "base_model": ["org/base", "org/other"],  # the Hub knows no directory
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergeloom"],
    }
    assert metadata(card(models=[BASE], base_model=BASE))["base_model"] == ["org/base"]
    assert metadata(card(models=[CardModel("1e5"), CardModel("yes")], base_model=None))["base_model"] == ["1e5", "yes"]
    assert metadata(card(models=[TUNE], base_model=None)).keys() == {"library_name", "tags"}


@pytest.mark.parametrize(
    ("licenses", "front", "row"),
    [
        (("apache-2.0", "apache-2.0"), "apache-2.0", "apache-2.0"),
        (("apache-2.0", "mit"), "other", "org/a: apache-2.0, org/b: mit"),
        (("mit", None), "other", "org/a: mit, org/b: not stated"),
        ((None, None), None, "not stated by the models"),
    ],
)
def test_the_license_is_that_of_the_parents_if_they_agree(
    licenses: tuple[str | None, str | None], front: str | None, row: str
) -> None:
    models = [CardModel(f"org/{name}", license_name=own) for name, own in zip("ab", licenses, strict=True)]
    text = card(models=models, base_model=None)
    assert metadata(text).get("license") == front
    assert f"| License | {row} |\n" in text


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("---\nlicense: mit\n---\n# A", "mit"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("# A\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_license_is_read_from_the_card_of_a_model(tmp_path: Path, content: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(content)
    assert license_of(tmp_path) == found
    assert license_of(tmp_path / "missing") is None


def test_text() -> None:
    text = card()
    assert "\n# merged\n" in text
    assert "1.2.3 by the merge method `linear` ([paper](https://arxiv.org/abs/2203.05482)), with" in text
    assert "- [org/other](https://huggingface.co/org/other) at `main`\n" in text
    assert "- `my-tune`\n" in text
    assert "| Layers | 16 |\n| Parameters | 1,235,814,400 (1.24B) |\n| dtype | bfloat16 |\n" in text
    assert "| torch | 2.13.0+cpu |\n" in text
    assert text.endswith("```bash\nmergeloom merge mergekit_config.yml merged --seed 3\n```\n")
    assert "Layers" not in card(layers=0)
    several = [CardMethod("slerp"), CardMethod("linear"), CardMethod("slerp")]
    assert "methods `slerp` and `linear`" in card(methods=several)


@pytest.mark.parametrize(
    "name",
    ["a`b", "[x](http://evil)", "<script>alert(1)</script>", "a|b", "line\nbreak", "*bold*", "_under_", "# head", "--"],
)
def test_names_have_no_meaning_in_markdown(name: str) -> None:
    from markdown_it import MarkdownIt

    text = card(name=name, models=[CardModel(f"/data/{name}", local=name), CardModel(f"org/{name}")], base_model=None)
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [
        token for token in (*tokens, *inline) if token.type in ("html_block", "html_inline", "em_open", "strong_open")
    ]
    links = [str(token.attrs["href"]) for token in inline if token.type == "link_open"]
    assert all(link.startswith(("https://huggingface.co/org/", "https://arxiv.org/")) for link in links)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 4
    assert metadata(text)["base_model"] == [f"org/{name}"]


def test_the_card_says_where_local_models_belong() -> None:
    place = "To repeat the merge, with this recipe in `mergekit_config.yml`{}:\n"
    assert place.format(" and the local models under the names that it uses") in card(models=[TUNE, OTHER])
    assert place.format("") in card(models=[OTHER])


def test_same_arguments_same_text() -> None:
    assert card() == card()


def test_recipe_stays_a_recipe() -> None:
    shown = yaml.safe_load(published_recipe(RECIPE, published_names([TUNE.path])))
    original = yaml.safe_load(RECIPE)
    original["models"][0]["model"] = "my-tune"
    assert shown == original


@pytest.mark.parametrize(
    ("line", "local", "shown"),
    [
        ("model: /data/models/a b c/tune", ["/data/models/a b c/tune"], "model: tune"),
        ("model: '/data/x'  # from /data/x", ["/data/x"], "model: 'x'  # from x"),
        ("model: ../models/tune", ["../models/tune"], "model: tune"),
        ("model: models/tune", ["models/tune"], "model: tune"),
        ("[{model: ./tune}, {model: ./tune-2}]", ["./tune"], "[{model: tune}, {model: ./tune-2}]"),
        ("model: ~/models/tune", ["~/models/tune"], "model: tune"),
        ("# was /home/me/secret/plan.yml", [], "# was plan.yml"),
        ("# see https://huggingface.co/org/model/tree/main", [], "# see https://huggingface.co/org/model/tree/main"),
        ("model: org/model", [], "model: org/model"),
        ("weight: 1/2", ["/"], "weight: 1/2"),
        ("model: .", ["."], "model: model"),
    ],
)
def test_no_path_of_this_machine(line: str, local: list[str], shown: str) -> None:
    assert published_recipe(line, published_names(local)) == shown


@pytest.mark.parametrize(
    ("paths", "taken", "names"),
    [
        (["/data/tune", "base"], [], ["tune", "base"]),
        (["x/model", "y/model"], [], ["x/model", "y/model"]),
        (["/a/x/model", "/b/x/model", "/c/other"], [], ["a/x/model", "b/x/model", "other"]),
        (["model", "x/model"], [], ["model", "x/model"]),
        (["./tune", "tune", "x/../tune/"], [], ["tune", "tune", "tune"]),
        (["tune", "../tune"], [], ["tune", "tune#2"]),
        (["/x/org/model", "/y/stage"], ["org/model", "model", "stage"], ["x/org/model", "y/stage"]),
        (["./stage"], ["stage"], ["stage#2"]),
        (["../model", "model"], [], ["model#2", "model"]),
    ],
)
def test_published_names_are_the_shortest_that_differ(paths: list[str], taken: list[str], names: list[str]) -> None:
    assert published_names(paths, taken) == dict(zip(paths, names, strict=True))


def test_a_published_name_is_not_taken_for_another_models_path() -> None:
    text = "[{model: /data/x/tune}, {model: x/tune}, {model: ../tune}]"
    names = {"/data/x/tune": "x/tune", "x/tune": "tune", "../tune": "tune#2"}
    assert published_recipe(text, names) == "[{model: x/tune}, {model: tune}, {model: tune#2}]"


def test_fences_in_the_recipe() -> None:
    text = card(recipe="chat_template: |\n  ```python\n  ```\n")
    assert "\n````yaml\nchat_template: |\n  ```python\n  ```\n````\n" in text
