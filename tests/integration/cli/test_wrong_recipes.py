"""Wrong recipes: the exit code, and a message that says what is wrong, where, and what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cli.wrong import GOOD, SOURCES, TIES, A, B, Wrong, check, prepare

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
        ("r.yml:4: pad_to_multiple_of: unknown key, ignored; write it under `tokenizer`: `tokenizer: {source: ...,",),
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
        ("r.yml:3: models[0].lora: unknown key; for a model with a LoRA adapter, write `model: models/a+adapter`",),
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
    "a filter that matches nothing": Wrong(
        "merge_method: linear\nmodels:\n- model: models/a\n  parameters:\n    weight:\n"
        "    - {filter: mpl, value: 0.3}\n    - {value: 1}\n",
        ("r.yml:6: models[0].parameters.weight[0].filter: filter 'mpl' matches no tensor name: its value is not used; "
         "did you mean `mlp`?",),
        0,
    ),
    "a filter as a key": Wrong(
        "merge_method: linear\nmodels:\n- {model: models/a, parameters: {weight: {mlp: 0.5}}}\n",
        ("models[0].parameters.weight: `value` is missing: write `{filter: mlp, value: 0.5}`, for example",),
    ),
    "a filter and a number": Wrong(
        "merge_method: linear\nmodels:\n- {model: models/a, parameters: {weight: [{filter: mlp, value: 1}, 0.5]}}\n",
        ("weight[1]: conditions ({filter, value}) and plain values can't be mixed: for all other tensors, write "
         "`{value: 0.5}` as the last condition",),
    ),
    "a gradient in quotes": Wrong(
        "merge_method: linear\nmodels:\n- {model: models/a, parameters: {weight: '[0, 1]'}}\n",
        ("weight must be a finite number, got '[0, 1]'; for a list of values, write [0, 1] without quotes",),
    ),
    "a dtype of a quantized model": Wrong(
        f"merge_method: linear\nmodels:\n{A}dtype: q4_k_m\n",
        ("r.yml:4: dtype: unknown dtype 'q4_k_m'; use one of bfloat16, float16, float32, float64; for other "
         "quantized models, quantize the merged one with another tool",),
    ),
    "FP8 as a dtype": Wrong(
        f"merge_method: linear\nmodels:\n{A}dtype: float8_e4m3fn\n",
        ("r.yml:4: dtype: unknown dtype 'float8_e4m3fn'; use one of bfloat16, float16, float32, float64; for FP8, "
         "set `out_dtype: fp8_blocks`",),
    ),
    "no method": Wrong(
        f"models:\n{A}", ("r.yml:1: `merge_method` is missing: write, for example, `merge_method: linear`;",)
    ),
    # models
    "one text for all models": Wrong(
        "merge_method: linear\nmodels: models/a, models/base\n",
        ("r.yml:2: models: expected a list of models, got 'models/a, models/base'; write one line for each model, such "
         "as `- model: models/a`",),
    ),
    "a model that is listed twice": Wrong(
        f"merge_method: linear\nmodels:\n{A}{B}{A}",
        ("r.yml:3: models[0]: models/a is listed twice, here and on line 5: it counts once; remove one",),
        0,
    ),
    "a base that is not among two sources": Wrong(
        "merge_method: slerp\nbase_model: orig/other\nparameters: {t: 0.5}\nslices:\n- sources:\n"
        "  - {model: models/a, layer_range: [0, 2]}\n  - {model: models/base, layer_range: [0, 2]}\n",
        ("r.yml:5: slices[0]: slerp needs the base model, orig/other, among the slice's sources: choose one of them, "
         "such as `base_model: models/a`",),
    ),
    "a base that is not among the sources": Wrong(
        "merge_method: ties\nbase_model: orig/other\nparameters: {weight: 0.5}\nslices:\n- sources:\n"
        "  - {model: models/a, layer_range: [0, 2]}\n",
        ("among the slice's sources: add it to `sources`, with as many layers as the others\n",),
    ),
    "a base that is not among two sources of ties": Wrong(
        "merge_method: ties\nbase_model: orig/other\nparameters: {weight: 0.5}\nslices:\n- sources:\n"
        "  - {model: models/a, layer_range: [0, 2]}\n  - {model: models/base, layer_range: [0, 2]}\n",
        ("add it to `sources`, with as many layers as the others, or choose one of them, such as `base_model: mo",),
    ),
    "two models for slerp": Wrong(
        "merge_method: slerp\nbase_model: orig/other\nparameters: {t: 0.5}\nmodels:\n- model: models/a\n"
        "- model: models/base\n",
        ("got 2: models/a, models/base: remove all but one, or use a method for any number of models, such as",),
    ),
    "ranges to stack, as complete models": Wrong(
        "merge_method: passthrough\nmodels:\n- {model: models/a, layers: [0, 2]}\n"
        "- {model: models/base, layers: [2, 4]}\n",
        ("models[0].layers: unknown key, ignored; `models` lists complete models: use `slices` for ranges of layers\n",
         "r.yml:2: models: passthrough takes 1 model, got 2: models/a, models/base: use `slices` for ranges of",),
    ),
    "one layer": Wrong(
        f"{SOURCES}  - {{model: models/a, layer_range: [1, 1]}}\n",
        ("[1, 1] is empty; for layer 1 alone, write [1, 2]: the second number is the layer after the last\n",),
    ),
    "no layer": Wrong(
        f"{SOURCES}  - {{model: models/a, layer_range: [4, 4]}}\n",
        ("layer_range: [4, 4] is empty: the second number is the layer after the last; to take only tensors outside",
         "`non_layer: {head: models/a}`"),
    ),
    "the output's path": Wrong(
        f"{GOOD}out_path: ./merged\n",
        ("r.yml:5: out_path: unknown key, ignored; OUT on the command line is the directory of the merged model",),
        0,
    ),
    "a base with another path": Wrong(
        "merge_method: slerp\nbase_model: orig/base\nparameters: {t: 0.5}\nslices:\n- sources:\n"
        "  - {model: models/a, layer_range: [0, 2]}\n  - {model: models/base, layer_range: [0, 2]}\n",
        (
            "r.yml:5: slices[0]: slerp needs the base model, orig/base, among the slice's sources: if models/base is "
            "the same model as orig/base, write `base_model: models/base`",
        ),
    ),
    "a base with another path, and models": Wrong(
        "merge_method: slerp\nbase_model: orig/base\nparameters: {t: 0.5}\nmodels:\n- model: models/a\n"
        "- model: models/base\n",
        ("got 2: models/a, models/base: if models/base is the same model as orig/base, write `base_model: models/",),
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
        ("r.yml:3: models[0].model: `model` is empty (null): write a directory or a Hub id after `model:`",),
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
        ("[0, -1] ends before layer 0: the second number is the layer after the last; for all 4 layers of models/a, "
         "write [0, 4]",),
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
    "a misspelt directory that resembles one of directories": Wrong(
        f"merge_method: linear\nmodels:\n{B}- {{model: ./model-e}}\n",
        ("r.yml:4: models[1].model: model-e: there is no such directory or file: check the path\n",),
        4,
    ),
    "a misspelt base and tokenizer": Wrong(
        TIES.replace("models/base", "models/bsae") + "tokenizer_source: ./model/a\n",
        (
            "r.yml:2: base_model: there is no directory models/bsae here; did you mean `models/base`?",
            "r.yml:5: tokenizer_source: there is no directory ./model/a here; did you mean `./models/a`?",
        ),
    ),
    "the URL of a model": Wrong(
        f"merge_method: linear\nmodels:\n{B}- {{model: 'https://huggingface.co/owner/name/tree/v2'}}\n",
        ("r.yml:4: models[1].model: https://huggingface.co/owner/name/tree/v2 is a URL: for the model of the Hub, "
         "write its id, `owner/name@v2`",),
    ),
    "the URL of another place": Wrong(
        "merge_method: linear\nmodels:\n- {model: 's3://bucket/model'}\n",
        ("r.yml:3: models[0].model: s3://bucket/model is a URL: download the model, and write its directory",),
    ),
    "a blank in a name": Wrong(
        f"merge_method: linear\nmodels:\n{B}- {{model: owner/my name}}\n",
        ("r.yml:4: models[1].model: owner/my name: there is no such directory or file: check the path\n",),
        4,
    ),
    "a GGUF file": Wrong(
        f"merge_method: linear\nmodels:\n{B}- {{model: models/gguf}}\n",
        ("r.yml:4: models[1].model: models/gguf: has 'q4.gguf', which mergeloom can't read: download the model's",),
        4,
    ),
    "a misspelt stage": Wrong(
        f"name: early\nmerge_method: linear\nmodels:\n{A}---\nmerge_method: linear\nmodels: [{{model: earlly}}]\n",
        ("r.yml:7: [1].models[0].model: earlly: there is no such directory", "did you mean the stage `early`?"),
    ),
    # several at once
    "five mistakes": Wrong(
        "merge_method: slerp\nbase_model: orig/base\ntokenizer: {pad_to_multiple_of: 0}\ndtype: bf16\nslices:\n"
        "- sources:\n"
        "  - {model: models/a, layer_range: [2, 0]}\n  - {modle: models/base, layer_range: [0, 2]}\n- sources:\n"
        "  - {model: models/a, layer_range: [0, 2]}\n  - {model: models/base, layer_range: [0, 2]}\n",
        (
            "r.yml:3: tokenizer.pad_to_multiple_of: expected a whole number of at least 1, got 0",
            "r.yml:4: dtype: unknown dtype 'bf16'; did you mean `bfloat16`?",
            "r.yml:7: slices[0].sources[0].layer_range: [2, 0] is reversed",
            "r.yml:8: slices[0].sources[1].modle: unknown key; did you mean `model`?",
            "r.yml:9: slices[1]: slerp needs the base model, orig/base, among the slice's sources: if models/base is",
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrong")
    prepare(path)
    return path


@pytest.mark.parametrize("wrong", [pytest.param(each, id=name) for name, each in WRONG.items()])
def test_what_is_wrong_and_what_to_write(
    wrong: Wrong, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(wrong, directory, monkeypatch, capsys)
