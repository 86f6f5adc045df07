"""The model card: metadata that the Hub knows, no path of the machine, the recipe as it was."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from mergeloom import __version__
from mergeloom.engine.files.card import CardModel, model_card

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
TUNE = CardModel("/home/me/checkpoints/my-tune/", local=True)
OTHER = CardModel("org/other", revision="main")
BASE = CardModel("org/base")


def card(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "name": "merged",
        "methods": ["linear"],
        "models": [TUNE, OTHER],
        "recipe": RECIPE,
        "layers": 16,
        "parameters": 1_235_814_400,
        "dtype": "bfloat16",
        "base_model": BASE,
    }
    return model_card(**arguments | changes)


def metadata(text: str) -> dict[str, Any]:
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def recipe_in(text: str) -> str:
    return text.split("yaml\n")[-1].rsplit("\n`", 1)[0].rstrip("`").rstrip("\n")


def test_metadata() -> None:
    assert metadata(card()) == {
        "base_model": ["org/base", "my-tune", "org/other"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["mergeloom", "merge"],
    }
    assert metadata(card(license_name="apache-2.0"))["license"] == "apache-2.0"
    assert metadata(card(models=[BASE], base_model=BASE))["base_model"] == ["org/base"]
    assert metadata(card(models=[CardModel("1e5"), CardModel("yes")], base_model=None))["base_model"] == ["1e5", "yes"]


def test_text() -> None:
    text = card()
    assert "\n# merged\n" in text
    assert f"made with mergeloom {__version__} by the merge method `linear`, with" in text
    assert "- [org/other](https://huggingface.co/org/other) at `main`\n" in text
    assert "- `my-tune`\n" in text
    assert "| Layers | 16 |\n| Parameters | 1,235,814,400 (1.24B) |\n| dtype | bfloat16 |\n" in text
    assert text.endswith("```\n")
    assert "Layers" not in card(layers=0)
    assert "methods `slerp` and `linear`" in card(methods=["slerp", "linear", "slerp"])


def test_same_arguments_same_text() -> None:
    assert card() == card()


def test_recipe_stays_a_recipe() -> None:
    shown = yaml.safe_load(recipe_in(card()))
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
    text = card(recipe=line, models=[CardModel(path, local=True) for path in local], base_model=None)
    assert recipe_in(text) == shown
    assert "/home/me" not in text
    assert "/data" not in text


def test_fences_in_the_recipe() -> None:
    text = card(recipe="chat_template: |\n  ```python\n  ```\n")
    assert "\n````yaml\nchat_template: |\n  ```python\n  ```\n````\n" in text
