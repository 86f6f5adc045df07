"""Wrong recipes and command lines: the exit code, and a message that says what is wrong, where, and what to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mergeloom.__main__ import main
from tests.support import models


@dataclass(frozen=True)
class Wrong:
    """A wrong recipe or command line.

    Args:
        recipe: text of ``r.yml``.
        says: parts of what `plan` prints, in their order.
        code: the exit code; 0 if it is a warning.
        arguments: the command line.
    """

    recipe: str
    says: tuple[str, ...]
    code: int = 2
    arguments: tuple[str, ...] = ("plan", "r.yml")


A = "- {model: models/a, parameters: {weight: 1}}\n"
B = "- {model: models/base, parameters: {weight: 1}}\n"
SOURCES = "merge_method: passthrough\nslices:\n- sources:\n"
TIES = "merge_method: ties\nbase_model: models/base\nmodels:\n- {model: models/a, parameters: {weight: 1}}\n"

WRONG = {
    # YAML
    "a key that is indented by one space less": Wrong(
        "merge_method: linear\nmodels:\n  - model: models/a\n   parameters:\n      weight: 1\n",
        ("r.yml:4: ", "`parameters` is indented by 3 spaces, `model` on line 3 by 4", "3 |   - model", "4 |    param"),
    ),
    "a block that is indented": Wrong(
        "models:\n  - model: models/a\n    parameters:\n      weight: 1\n merge_method: linear\n dtype: float16\n",
        ("r.yml:5: ", "`merge_method` is indented by 1 space, `models` on line 1 by 0", "5 |  merge_method"),
    ),
    "only the first key is indented": Wrong(
        "  slices:\n  - sources:\n    - {model: models/a, layer_range: [0, 2]}\nmerge_method: passthrough\n",
        ("r.yml:4: ", "`merge_method` is indented by 0 spaces, `slices` on line 1 by 2"),
    ),
    "list items after a value": Wrong(
        "merge_method: linear\nbase_model: models/base\n  - model: models/a\n",
        ("r.yml:3: ", "a list item follows the value of `base_model`: is a line such as `models:` missing before it?"),
    ),
    "list items without `models:`": Wrong(
        "- model: models/a\n- model: models/base\nmerge_method: linear\n",
        ("r.yml:3: ", "is a line such as `models:` missing before the list item on line 1?"),
    ),
    "list items in different columns": Wrong(
        "merge_method: linear\nmodels:\n  - model: models/a\n - model: models/base\n",
        ("r.yml:4: ", "this list item is indented by 1 space, that on line 3 by 2"),
    ),
    "an indented separator": Wrong(
        "  name: one\n  merge_method: linear\n  models:\n  - model: models/a\n  ---\n  merge_method: linear\n",
        ("r.yml:5: ", "`---`, which separates stages, must start in the first column", "indentation of line 5"),
    ),
    "a word of a code block": Wrong(
        f"yaml\nmerge_method: linear\nmodels:\n{A}", ("r.yml:2: ", "remove line 1, `yaml`, which is left over")
    ),
    "a fence of a code block": Wrong(
        f"```yaml\nmerge_method: linear\nmodels:\n{A}```\n", ("r.yml:1: ", "remove this line, which is left over")
    ),
    "no space after a colon": Wrong(
        "merge_method: linear\nmodels:\n  - model:models/a\n    parameters: {weight: 1}\n",
        ("r.yml:4: ", "write a space after the colon in `model:models/a` on line 3"),
    ),
    "an open bracket": Wrong(
        "models: [models/a, models/base\nmerge_method: linear\n", ("r.yml:2: ", "is the [ on line 1 closed?")
    ),
    "an open quote": Wrong(
        "merge_method: 'linear\nmodels: []\ndtype: 'float16'\n", ("r.yml:3: ", "is the ' on line 1 closed?")
    ),
    "two keys on a line": Wrong(
        "merge_method: linear dtype: float16\nmodels: []\n", ("r.yml:1: ", "or write `dtype` on a line of its own")
    ),
    "a backslash in quotes": Wrong(
        'merge_method: linear\nmodels:\n- model: "C:\\models\\a"\n', ("r.yml:3: ", "use single quotes, or / in a path")
    ),
    # keys in the wrong place
    "revision next to model": Wrong(
        f"{SOURCES}  - {{model: models/a, revision: v2, layer_range: [0, 2]}}\n",
        ("r.yml:4: slices[0].sources[0].revision: unknown key, ignored; write `model: models/a@v2`",),
        0,
    ),
    "padding at the top": Wrong(
        f"merge_method: linear\nmodels:\n{A}pad_to_multiple_of: 8\n",
        ("r.yml:4: pad_to_multiple_of: unknown key, ignored; write it under `tokenizer`: `tokenizer: {source: base,",),
        0,
    ),
    "dtype under parameters": Wrong(
        f"merge_method: linear\nmodels:\n{A}parameters: {{dtype: float16}}\n",
        ("parameters.dtype: linear has no such parameter, ignored; write it at the top level of the recipe",),
        0,
    ),
    "dtype of a model": Wrong(
        "merge_method: linear\nmodels:\n- {model: models/a, dtype: float16, parameters: {weight: 1}}\n",
        ("r.yml:3: models[0].dtype: unknown key, ignored; write it at the top level of the recipe",),
        0,
    ),
    "a method for one slice": Wrong(
        f"{SOURCES}  - {{model: models/a, layer_range: [0, 2]}}\n  merge_method: linear\n",
        ("slices[0].merge_method: unknown key, ignored; only a stage has a method: write a separate stage with",),
        0,
    ),
    "layers of a complete model": Wrong(
        "merge_method: linear\nmodels:\n- {model: models/a, layers: [0, 2], parameters: {weight: 1}}\n",
        ("r.yml:3: models[0].layers: unknown key, ignored; `models` lists complete models: use `slices` for ranges",),
        0,
    ),
    "an adapter next to model": Wrong(
        "merge_method: linear\nmodels:\n- {model: models/a, lora: models/lora, parameters: {weight: 1}}\n",
        ("r.yml:3: models[0].lora: LoRA adapters are not supported yet: merge the adapter into its base model",),
    ),
    "a weight outside parameters": Wrong(
        f"merge_method: linear\nmodels:\n- model: models/a\n  weight: 1\n{B}",
        (
            "warning: r.yml:4: models[0].weight: unknown key, ignored; write it under `parameters`",
            "mergeloom: r.yml:3: models[0]: linear, model models/a, tensor ",
            "`weight` has no value; is it in the wrong place? r.yml:4: models[0].weight",
        ),
    ),
    "models in a condition": Wrong(
        f"merge_method: linear\nmodels:\n{A}parameters: {{weight: [{{model: models/a, value: 0.3}}]}}\n",
        ("weight[0].model: unknown key, ignored; a condition holds for all models: write the value in the `param",),
        0,
    ),
    "models in a slice": Wrong(
        "merge_method: linear\nslices:\n- models:\n  - {model: models/a, layer_range: [0, 2]}\n",
        ("r.yml:3: slices[0]: `sources` is missing: list the models of the slice below it: `sources: [{model: ..., ",),
    ),
    # parameters
    "a weight for sce": Wrong(
        "merge_method: sce\nbase_model: models/base\nmodels:\n- {model: models/a, parameters: {weight: 1}}\n",
        ("sce has no such parameter, ignored; its parameters: select_topk", "(`weight` is a parameter of linear"),
        0,
    ),
    "a misspelt weight for sce": Wrong(
        "merge_method: sce\nbase_model: models/base\nmodels:\n- {model: models/a, parameters: {weigth: 1}}\n",
        ("sce has no such parameter, ignored; `weight` is a parameter of linear", "its parameters: select_topk"),
        0,
    ),
    "dare without density": Wrong(
        TIES.replace("ties", "dare_ties"),
        ("r.yml:1: merge_method: dare_ties drops nothing: `density` is 1 by default; set `density` under `param",),
        0,
    ),
    # models
    "a base with another path": Wrong(
        "merge_method: slerp\nbase_model: orig/base\nparameters: {t: 0.5}\nslices:\n- sources:\n"
        "  - {model: models/a, layer_range: [0, 2]}\n  - {model: models/base, layer_range: [0, 2]}\n",
        (
            "r.yml:5: slices[0]: slerp needs the base model, orig/base, among the slice's sources: if models/base is "
            "the same model, write `base_model: models/base`",
        ),
    ),
    "a base with another path, and models": Wrong(
        "merge_method: slerp\nbase_model: orig/base\nparameters: {t: 0.5}\nmodels:\n- model: models/a\n"
        "- model: models/base\n",
        ("got 2: models/a, models/base: if models/base is the same model, write `base_model: models/base`",),
    ),
    "no base": Wrong(
        "merge_method: slerp\nparameters: {t: 0.5}\nmodels:\n- model: models/a\n- model: models/base\n",
        ("r.yml:1: merge_method: slerp needs a `base_model`, such as `base_model: models/a`",),
    ),
    "a model merged with itself": Wrong(
        "merge_method: slerp\nbase_model: models/a\nparameters: {t: 0.5}\nmodels:\n- model: models/a\n",
        ("got 0: only the base model, models/a, is listed, and merging it with itself changes nothing",),
    ),
    "empty models": Wrong(
        "merge_method: linear\nmodels:\ndtype: float16\n",
        ("r.yml:2: models: `models` is empty: list the models below it: `- model: ...`",),
    ),
    "a null model": Wrong(
        "merge_method: linear\nmodels:\n- model: null\n",
        ("r.yml:3: models[0].model: `model` is empty (null): write `model:` and a directory or a Hub id",),
    ),
    "a placeholder as a model": Wrong(
        "merge_method: linear\nmodels:\n- {model: None, parameters: {weight: 1}}\n",
        ("r.yml:3: models[0].model: 'None' does not name a model: write a directory or a Hub id",),
    ),
    "ranges to stack in one slice": Wrong(
        f"{SOURCES}  - {{model: models/a, layer_range: [0, 2]}}\n  - {{model: models/base, layer_range: [2, 4]}}\n",
        ("passthrough takes 1 model, got 2: models/a, models/base: a slice merges its sources layer by layer; to",),
    ),
    "-1 as the last layer": Wrong(
        f"{SOURCES}  - {{model: models/a, layer_range: [0, -1]}}\n",
        ("[0, -1] ends before layer 0: the second number is the layer after the last, such as for all 4 layers of "
         "models/a: [0, 4]",),
    ),
    "a slice without a range": Wrong(
        f"{SOURCES}  - model: models/a\n",
        ("`layer_range` is missing: write `layer_range: [first layer, layer after the last]`, or list complete",),
    ),
    # paths
    "a misspelt directory": Wrong(
        f"merge_method: linear\nmodels:\n{A.replace('models/a', 'modles/a')}{B}",
        ("r.yml:3: models[0].model: there is no directory modles/a here; did you mean `models/a`?",),
    ),
    "a misspelt base and tokenizer": Wrong(
        TIES.replace("models/base", "models/bsae") + "tokenizer_source: ./model/a\n",
        (
            "r.yml:2: base_model: there is no directory models/bsae here; did you mean `models/base`?",
            "r.yml:5: tokenizer_source: there is no directory ./model/a here; did you mean `./models/a`?",
        ),
    ),
    "a misspelt model to inspect": Wrong(
        "", ("there is no directory modles/a here; did you mean `models/a`?",), 2, ("inspect", "modles/a")
    ),
    "a misspelt recipe": Wrong(
        "", ("recipe.yaml: no such file; did you mean `recipe.yml`?",), 2, ("plan", "recipe.yaml")
    ),
    # several at once
    "five mistakes": Wrong(
        "merge_method: slerp\nbase_model: orig/base\ntokenizer: {pad_to_multiple_of: 8}\ndtype: bf16\nslices:\n"
        "- sources:\n"
        "  - {model: models/a, layer_range: [2, 0]}\n  - {modle: models/base, layer_range: [0, 2]}\n- sources:\n"
        "  - {model: models/a, layer_range: [0, 2]}\n  - {model: models/base, layer_range: [0, 2]}\n",
        (
            "r.yml:4: dtype: unknown dtype 'bf16'; did you mean `bfloat16`?",
            "r.yml:7: slices[0].sources[0].layer_range: [2, 0] is reversed",
            "r.yml:8: slices[0].sources[1].modle: unknown key; did you mean `model`?",
            "r.yml:9: slices[1]: slerp needs the base model, orig/base, among the slice's sources: if models/base is",
            "r.yml:3: tokenizer.pad_to_multiple_of: padding the vocabulary is not supported yet",
        ),
    ),
}  # fmt: skip


def prepare(directory: Path) -> None:
    """Write the models that the recipes name, and a recipe with another name."""
    for seed, name in enumerate(("a", "base")):
        model = models.tiny_llama()
        models.write_checkpoint(directory / "models" / name, model, fill=seed)
    (directory / "recipe.yml").write_text("merge_method: linear\nmodels: [{model: models/a}]\n")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrong")
    prepare(path)
    return path


@pytest.mark.parametrize("wrong", [pytest.param(each, id=name) for name, each in WRONG.items()])
def test_what_is_wrong_and_what_to_write(
    wrong: Wrong, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    (directory / "r.yml").write_text(wrong.recipe)
    code = main([*wrong.arguments])
    printed = capsys.readouterr()
    said = printed.err if wrong.code else printed.out
    assert code == wrong.code, printed.err
    assert "Traceback" not in said
    position = 0
    for part in wrong.says:
        assert part in said[position:], said
        position = said.index(part, position)
