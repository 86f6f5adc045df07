"""Errors and warnings of recipes, each with its line and key path."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.recipe.types import (
    slices_of,
)
from mergeloom.engine.recipe.warnings import WarningKind
from tests.unit.recipe.parsing import LINEAR, MODELS, parse, refused


class TestMistakes:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "r.yml: the recipe is empty"),
            ("- a", "r.yml:1: expected a recipe: a mapping with `merge_method` and `models` or `slices`, got"),
            (MODELS, "r.yml:1: `merge_method` is missing"),
            ("merge_methd: linear\n" + MODELS, "r.yml:1: merge_methd: unknown key; did you mean `merge_method`?"),
            ("merge_method: tise\n" + MODELS, "merge_method: unknown merge method 'tise'; did you mean `ties`?"),
            ("merge_method: Linear\n" + MODELS, "did you mean `linear`?"),
            ("merge_method: xyz\n" + MODELS, "`mergeloom methods` lists all methods"),
            ("merge_method: 3\n" + MODELS, "expected the name of a merge method, got 3"),
            (LINEAR, "r.yml:1: missing key: one of `models`, `slices`, `modules` is required"),
            (LINEAR + "model: []", "r.yml:3: model: unknown key; did you mean `models`?"),
            (LINEAR + "silces: []", "r.yml:3: silces: unknown key; did you mean `slices`?"),
            (LINEAR + MODELS + "slices: [1]", "r.yml:4: slices: `models` and `slices` are mutually exclusive"),
            (LINEAR + "models: []", "models: expected a list of models, got an empty list"),
            (LINEAR + "models: {a: 1}", "models: expected a list of models, got a mapping"),
            (LINEAR + "models: [a]", "models[0]: write `- model: a` to list a model"),
            (LINEAR + "models: [{modle: a}]", "models[0].modle: unknown key; did you mean `model`?"),
            (LINEAR + "models: [{}]", "models[0]: `model` is missing"),
            (LINEAR + "models: [{model: 3}]", "expected a model: a directory or a Hub id, got 3 (put it"),
            (LINEAR + "models: [{model: a+}]", "'a+' has no adapter after the +: write `model+adapter`"),
            (LINEAR + "models: [{model: +b}]", "'+b' has no model before the +: write `model+adapter`"),
            (LINEAR + "models: [{model: a+b@}]", "'b@' has no revision after the @"),
            (LINEAR + "models: [{model: a, lora: b}]", "models[0].lora: unknown key; for a model with a LoRA adapter"),
            (
                LINEAR + "models: [{model: {model: a, lora: b+c}}]",
                "models[0].model.lora: b+c is a model with an adapter; expected an adapter alone",
            ),
            (
                LINEAR + "models: [{model: {model: a, lora: {rank: 3}}}]",
                "lora: expected a model, got a mapping without",
            ),
            (LINEAR + "models: [{model: a@b@c}]", "'a@b@c' has more than one @"),
            (LINEAR + "models: [{model: '@b'}]", "'@b' does not name a model"),
            (LINEAR + "models: [{model: 'a@'}]", "'a@' has no revision"),
            (LINEAR + "models: [{model: {path: a, revision: 1.0}}]", "expected a branch, tag or commit, got 1.0"),
            (LINEAR + "models: [{model: {revision: a}}]", "a mapping without `path`"),
            (LINEAR + "models: [{model: {path: ''}}]", "`path` and `revision` can't be empty"),
            (LINEAR + MODELS + "dtype: bf16", "r.yml:4: dtype: unknown dtype 'bf16'; did you mean `bfloat16`?"),
            (LINEAR + MODELS + "out_dtype: int8", "out_dtype: unknown dtype 'int8'; use one of bfloat16, float16"),
            (LINEAR + MODELS + "save: 1", "save: expected true or false, got 1"),
            (LINEAR + MODELS + "experts: []", "experts: this is a file for mergekit-moe, which"),
            ("base_model: a\ngate_mode: hidden", "gate_mode: this is a file for mergekit-moe, which"),
            (
                LINEAR + MODELS + "parameters: [1]",
                "parameters: expected a mapping of parameters by name, got the",
            ),
            (LINEAR + MODELS + "allow_vocabulary_mismatch: 1", "allow_vocabulary_mismatch: expected true or false"),
            (LINEAR + MODELS + "tokenizer: base", "tokenizer: expected a mapping with `source`"),
            (
                LINEAR + MODELS + "tokenizer: {tokens: {x: {source: {kind: zeros}}}}",
                "tokenizer.tokens.x.source.kind: expected a model, `{kind: zero}`, or `{kind: model_token",
            ),
            (
                LINEAR + MODELS + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
                "tokenizer.tokens.x.source: a model_token needs one of `token` and `token_id`",
            ),
            (
                LINEAR + MODELS + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: -1}}}}",
                "token_id: expected a whole number of at least 0, got -1",
            ),
            (LINEAR + MODELS + "tokenizer: {tokens: {x: {force: 3}}}", "tokens.x.force: expected true or false"),
            (
                LINEAR + MODELS + "tokenizer: {source: base, pad_to_multiple_of: 0}",
                "tokenizer.pad_to_multiple_of: expected a whole number of at least 1, got 0",
            ),
            (
                LINEAR + MODELS + "tokenizer: {source: base, pad_to_multiple_of: 1000000000}",
                "tokenizer.pad_to_multiple_of: expected a whole number of at most 1,048,576, got 1,000,000,000",
            ),
            (LINEAR + MODELS + "tokenizer: {source: base}\ntokenizer_source: base", "are mutually exclusive"),
            (LINEAR + MODELS + "chat_template: chatlm", "unknown chat template 'chatlm'; did you mean `chatml`?"),
            (LINEAR + MODELS + "chat_template: {a: b}", "chat_template: expected auto, one of alpaca"),
            (LINEAR + "modules: {}", "modules: expected a mapping of modules by name, got an empty mapping"),
            (LINEAR + "modules: {x: {}}", "modules.x: missing key: one of `models`, `slices` is required"),
            (LINEAR + "modules: {x: {slice: []}}", "modules.x.slice: unknown key; did you mean `slices`?"),
            (LINEAR + "slices: [{source: []}]", "slices[0].source: unknown key; did you mean `sources`?"),
            (LINEAR + "slices: [{sources: []}]", "slices[0].sources: expected a list of models, each with its"),
            (LINEAR + "slices: [{sources: [{model: a}]}]", "slices[0].sources[0]: `layer_range` is missing"),
        ],
    )
    def test_of_form(self, text: str, message: str) -> None:
        assert message in refused(text)

    def test_a_wrong_row_is_one_error(self) -> None:
        source = "{kind: model_token, model: a, token_id: -1}"
        message = refused(LINEAR + MODELS + f"tokenizer: {{tokens: {{x: {{source: {source}}}}}}}")
        assert "needs one of `token` and `token_id`" not in message

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("[2, 2]", "[2, 2] is empty"),
            ("[3, 2]", "[3, 2] is reversed"),
            ("[-1, 2]", "[-1, 2] starts before layer 0"),
            ("[1]", "expected [first layer, layer after the last], got the list [1]"),
            ("[1, 2, 3]", "expected [first layer, layer after the last]"),
            ("5", "got 5"),
            ("[0, true]", "expected [first layer"),
            ("[[0], 1]", "expected [first layer"),
            ("[0, 1.5]", "expected a whole number, got 1.5"),
            ("[a, b]", "expected a whole number, got 'a'"),
            ("~", "`layer_range` is empty (null): write `layer_range: [first layer, layer after the last]`"),
        ],
    )
    def test_of_layer_ranges(self, value: str, message: str) -> None:
        found = refused(f"merge_method: linear\nslices:\n- sources:\n  - model: a\n    layer_range: {value}\n")
        assert message in found
        assert found.startswith(("r.yml:5: slices[0].sources[0].layer_range", "r.yml:4: slices[0].sources[0]: "))

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("abc", "weight: linear, model a: weight must be a finite number, got 'abc'"),
            (".nan", "weight must be a finite number, got nan"),
            ("'inf'", "weight must be a finite number, got 'inf'"),
            ("~", "weight must be a finite number, got nothing"),
            ("[]", "weight must be a finite number, got an empty list"),
            ("[1, x]", "weight[1]: linear, model a: weight must be a finite number, got 'x'"),
            ("[[1]]", "weight[0]: linear, model a: weight must be a finite number, got the list [1]"),
            ("{filter: x}", "weight: `value` is missing"),
            ("{filter: 3, value: 1}", "weight.filter: expected a substring of tensor names, got 3"),
            ("{value: {value: 1}}", "weight.value: linear, model a: weight must be a finite number, got a mapping"),
            ("[{value: 1}, 2]", "weight[1]: conditions ({filter, value}) and plain values can't be mixed"),
            ("[1, {value: 2}]", "weight[0]: conditions ({filter, value}) and plain values can't be mixed"),
            ("{value: []}", "weight.value: linear, model a: weight must be a finite number, got an empty list"),
        ],
    )
    def test_of_values(self, value: str, message: str) -> None:
        found = refused(f"merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: {value}\n")
        assert found.startswith("r.yml:5: models[0].parameters.weight")
        assert message in found

    def test_of_types(self) -> None:
        assert "normalize: linear: normalize must be true or false, got 0.5" in refused(
            LINEAR.replace("weight: 1", "normalize: 0.5") + MODELS
        )
        karcher = "merge_method: karcher\nparameters: {max_iter: %s}\n" + MODELS
        assert "max_iter: karcher: max_iter must be a whole number, got 1.5" in refused(karcher % 1.5)
        assert parse(karcher % "5.0").output.parameters == {"max_iter": 5}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "merge_method: ties\n" + MODELS,
                "r.yml:1: merge_method: ties needs a `base_model`, such as `base_model: a`",
            ),
            ("merge_method: ties\nmodels: [{model: a}]", "merge_method: ties needs a `base_model` in addition to a"),
            ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", "takes 1 or more models besides the base, got"),
            (
                "merge_method: slerp\nbase_model: q\n" + MODELS,
                "slerp takes 1 model besides the base, got 2: a, b",
            ),
            ("merge_method: nuslerp\nmodels: [{model: a}]", "models: nuslerp takes 2 models, got 1: a"),
            ("merge_method: passthrough\n" + MODELS, "models: passthrough takes 1 model, got 2: a, b"),
            (
                "merge_method: passthrough\nbase_model: q\nmodels: [{model: a}]",
                "got 2: a, q (a `base_model` that isn't listed under `models` is added to them)",
            ),
            (
                "merge_method: slerp\nbase_model: q\nslices:\n- sources:\n  - {model: a, layer_range: [0, 1]}\n"
                "  - {model: b, layer_range: [0, 1]}",
                "r.yml:4: slices[0]: slerp needs the base model, q, among the slice's sources",
            ),
            (
                "merge_method: nuslerp\nslices:\n- base_model: q\n  sources:\n  - {model: a, layer_range: [0, 1]}\n"
                "  - {model: b, layer_range: [0, 1]}",
                "r.yml:3: slices[0]: nuslerp needs the base model, q, among the slice's sources",
            ),
            (
                "merge_method: ties\nbase_model: a\nslices:\n- sources:\n  - {model: a, layer_range: [0, 1]}\n"
                "  - {model: a, layer_range: [1, 2]}",
                "slices[0]: the base model, a, is among the sources more than once",
            ),
            (
                LINEAR
                + "slices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n  - {model: b, layer_range: [0, 3]}",
                "r.yml:4: slices[0]: all sources of a slice must have the same number of layers, got a [0, 2], "
                "b [0, 3]",
            ),
        ],
    )
    def test_of_inputs(self, text: str, message: str) -> None:
        assert message in refused(text)


class TestWarnings:
    @pytest.mark.parametrize(
        ("text", "warning"),
        [
            (
                LINEAR + MODELS + "chat_templat: auto",
                "r.yml:4: chat_templat: unknown key, ignored; did you mean `chat_temp",
            ),
            (LINEAR + MODELS + "foo: 1", "r.yml:4: foo: unknown key, ignored; known: merge_method,"),
            (LINEAR + MODELS + "weight: 1", "r.yml:4: weight: unknown key, ignored; write it under `parameters`"),
            (
                LINEAR + "models:\n- model: a\n  weight: 1",
                "r.yml:5: models[0].weight: unknown key, ignored; write it under",
            ),
            (
                LINEAR + "models:\n- model: a\n  layer_range: [0, 1]",
                "r.yml:5: models[0].layer_range: unknown key, ignored; `models` lists complete models: use",
            ),
            (
                "merge_method: linear\nparameters:\n  weigth: 1\n" + MODELS,
                "r.yml:3: parameters.weigth: linear has no such parameter, ignored; did you mean `weight`?",
            ),
            (
                "merge_method: linear\nparameters: {density: 1}\n" + MODELS,
                "linear has no such parameter, ignored; its parameters: weight, normalize (`density` is a parameter of "
                "ties)",
            ),
            (
                "merge_method: linear\nmodels:\n- model: a\n  parameters: {normalize: false}",
                "r.yml:4: models[0].parameters.normalize: it has no effect on a single model: set it in",
            ),
            (
                "merge_method: linear\nparameters: {weight: {pattern: x, value: 1}}\n" + MODELS,
                "parameters.weight.pattern: unknown key, ignored; did you mean `filter`?",
            ),
        ],
    )
    def test_ignored_entries_are_errors_if_strict(self, text: str, warning: str) -> None:
        (issued,) = parse(text).warnings
        assert warning in str(issued)
        assert refused(text, strict=True) == str(issued).replace(", ignored;", ";") == str(issued.as_error())

    def test_warnings_are_data(self) -> None:
        unknown_key, unknown_parameter = parse(
            LINEAR.replace("weight", "weigth") + MODELS + "chat_templat: auto"
        ).warnings
        if unknown_key.kind is not WarningKind.UNKNOWN_KEY:
            unknown_key, unknown_parameter = unknown_parameter, unknown_key
        assert (unknown_key.kind, unknown_key.suggestion) == (WarningKind.UNKNOWN_KEY, "chat_template")
        assert (unknown_key.source, unknown_key.line, unknown_key.place) == (Path("r.yml"), 4, ("chat_templat",))
        assert unknown_parameter.kind is WarningKind.UNKNOWN_PARAMETER
        assert (unknown_parameter.suggestion, unknown_parameter.problem) == ("weight", "linear has no such parameter")
        assert unknown_parameter.located_problem == "r.yml:2: parameters.weigth: linear has no such parameter"

    def test_other_warnings_are_warnings_even_if_strict(self) -> None:
        text = "merge_method: linear\nparameters: {weight: [{value: 1}, {value: 2}]}\n"
        text += "models: [{model: a}]\nmodels: [{model: b}]"
        duplicate, unreachable = parse(text, strict=True).warnings
        assert (duplicate.kind, unreachable.kind) == (WarningKind.DUPLICATE_KEY, WarningKind.UNREACHABLE)
        assert str(duplicate) == "r.yml:4: models: duplicate key on lines 3 and 4: the last one is used"
        assert str(unreachable).startswith("r.yml:2: parameters.weight[1]: it is never reached")

    def test_keys_that_mergekit_ignores_are_skipped(self) -> None:
        text = "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}], residual_weight: 0.5}]\n"
        assert parse(text + "parameters: {weight: 1, int8_mask: true}", strict=True).warnings == ()

    def test_of_a_model_listed_twice_the_last_entry_is_used(self) -> None:
        recipe = parse("""
merge_method: linear
models:
- model: a
  parameters: {weight: 1}
- model: b
- model: a
  parameters: {weight: 2}
- model: a@main
""")
        assert recipe.output.models is not None
        assert [(s.model.text, s.parameters) for s in recipe.output.models] == [
            ("b", {}),
            ("a", {"weight": 2.0}),
            ("a@main", {}),
        ]
        assert [str(warning) for warning in recipe.warnings] == [
            "r.yml:4: models[0]: a is listed twice: the last entry is used, line 7: {'weight': 2}, instead of this "
            "one, line 4: {'weight': 1}"
        ]

    def test_an_adapter_that_is_listed_twice_is_added_twice(self) -> None:
        recipe = parse("merge_method: linear\nmodels:\n- {model: base+a+b+a, parameters: {weight: 1}}\n")
        assert recipe.output.models is not None
        (source,) = recipe.output.models
        assert [adapter.text for adapter in source.model.adapters] == ["a", "b", "a"]
        assert [str(warning) for warning in recipe.warnings] == [
            "r.yml:3: models[0].model: a is listed 2 times: what it changes is added as often"
        ]

    def test_a_model_twice_with_other_layers_counts_twice(self) -> None:
        text = LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]}]"
        recipe = parse(text)
        assert recipe.warnings == ()
        assert len(slices_of(recipe.output)[0].sources) == 2
