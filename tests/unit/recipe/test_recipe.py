"""Recipes: every form, and every error with its line and key path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.engine.recipe.load import load_recipe, parse_recipe
from mergeloom.engine.recipe.types import (
    ChatTemplate,
    Conditional,
    Gradient,
    ModelReference,
    Module,
    NonLayer,
    Recipe,
    Slice,
    Source,
    Stage,
    TokenizerSource,
    base_index,
    modules_of,
    slices_of,
    stage_inputs,
)
from mergeloom.engine.recipe.warnings import WarningKind
from mergeloom.errors import RecipeError
from mergeloom.io.safetensors.dtypes import BF16, F16, F32, F64
from mergeloom.methods.kernel.contract import REQUIRED, Absent, Base, Method, Parameter


def method(name: str, base: Base, minimum: int, maximum: int | None, *parameters: Parameter) -> Method:
    return Method(
        name=name,
        summary="",
        description="",
        paper=None,
        base=base,
        minimum=minimum,
        maximum=maximum,
        absent=Absent.PRESENT,
        parameters=parameters,
        bind=lambda inputs, **_: pytest.fail("never bound"),
    )


WEIGHT = Parameter("weight", float, REQUIRED, True, "")
NORMALIZE = Parameter("normalize", bool, True, False, "")
METHODS = {
    m.name: m
    for m in (
        method("passthrough", Base.NONE, 1, 1, Parameter("scale", float, 1.0, True, "")),
        method("linear", Base.NONE, 1, None, WEIGHT, NORMALIZE),
        method("slerp", Base.REQUIRED, 1, 1, Parameter("t", float, REQUIRED, False, "")),
        method("nuslerp", Base.OPTIONAL, 2, 2, WEIGHT),
        method("ties", Base.REQUIRED, 1, None, WEIGHT, Parameter("density", float, 1.0, True, ""), NORMALIZE),
        method("karcher", Base.NONE, 1, None, Parameter("max_iter", int, 10, False, "")),
    )
}
LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"
MODELS = "models: [{model: a}, {model: b}]\n"


def parse(text: str, strict: bool = False) -> Recipe:
    return parse_recipe(text, source=Path("r.yml"), strict=strict, methods=METHODS)


def refused(text: str, strict: bool = False) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, strict)
    return str(caught.value)


def ref(text: str) -> ModelReference:
    return ModelReference.parse(text)


class TestForms:
    def test_models(self) -> None:
        recipe = parse("""
merge_method: ties
base_model: base/model
models:
  - model: fine/one@v2
    parameters:
      density: [1, 0.7, "1e-1"]
      weight: 1.0
  - model: {path: ./fine+two, revision: main}
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
parameters: {normalize: on, int8_mask: true}
dtype: float16
out_dtype: torch.bfloat16
""")
        assert recipe.warnings == ()
        assert recipe.output == Stage(
            name=None,
            merge_method="ties",
            base_model=ref("base/model"),
            models=(
                Source(ModelReference("fine/one", "v2"), None, {"density": Gradient((1.0, 0.7, 0.1)), "weight": 1.0}),
                Source(
                    ModelReference("./fine+two", "main"),
                    None,
                    {"density": 0.33, "weight": (Conditional("mlp", 0.5), Conditional(None, 0.0))},
                ),
            ),
            parameters={"normalize": True},
            dtype=F16,
            out_dtype=BF16,
        )
        assert recipe.output.base_model is not None
        assert recipe.output.base_model.text == "base/model"
        assert ref("fine/one@v2").text == "fine/one@v2"

    def test_slices(self) -> None:
        recipe = parse("""
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 32]}
      - {model: b, layer_range: ["0", 32.0], parameters: {}}
    parameters: {t: {filter: "*", value: [0, 1]}}
    residual_weight: 0.1
  - sources:
      - {model: b, layer_range: [4, 8]}
      - {model: c, layer_range: [5, 9]}
    base_model: c
parameters: {t: 0.5}
dtype: float64
""")
        assert recipe.warnings == ()
        assert recipe.output.slices == (
            Slice(
                (Source(ref("a"), (0, 32)), Source(ref("b"), (0, 32))),
                None,
                {"t": (Conditional("*", Gradient((0.0, 1.0))),)},
            ),
            Slice((Source(ref("b"), (4, 8)), Source(ref("c"), (5, 9))), ref("c"), {}),
        )
        assert recipe.output.dtype is F64
        first, second = slices_of(recipe.output)
        assert base_index(recipe.output, first, METHODS["slerp"]) == 0
        assert base_index(recipe.output, second, METHODS["slerp"]) == 1
        assert base_index(recipe.output, second, METHODS["linear"]) is None

    def test_modules(self) -> None:
        recipe = parse("""
merge_method: linear
base_model: c
modules:
  text_decoder:
    slices: [{sources: [{model: a, layer_range: [0, 2]}]}]
    parameters: {weight: 2}
  vision:
    models: [{model: a}, {model: b}]
""")
        text, vision = modules_of(recipe.output)
        assert text == Module("text_decoder", (Slice((Source(ref("a"), (0, 2)),)),), None, {"weight": 2.0})
        whole = Slice((Source(ref("a"), None), Source(ref("b"), None), Source(ref("c"), None)))
        assert vision == Module("vision", (whole,))
        assert slices_of(recipe.output) == (*(text.slices or ()), whole)
        assert stage_inputs(recipe.output) == (ref("a"), ref("b"), ref("c"))

    def test_the_base_model_is_added_last_if_it_is_not_listed(self) -> None:
        (part,) = slices_of(parse(LINEAR + "base_model: c\n" + MODELS).output)
        assert [source.model.path for source in part.sources] == ["a", "b", "c"]
        (part,) = slices_of(parse(LINEAR + "base_model: a\n" + MODELS).output)
        assert [source.model.path for source in part.sources] == ["a", "b"]
        (part,) = slices_of(
            parse(LINEAR + "base_model: c\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]").output
        )
        assert [source.model.path for source in part.sources] == ["a"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a", ModelReference("a")),
            ("org/a@refs/pr/1", ModelReference("org/a", "refs/pr/1")),
            ("{path: a@b+c}", ModelReference("a@b+c")),
            ("{path: a, revision: b}", ModelReference("a", "b")),
            ("{model: a@b}", ModelReference("a", "b")),
            ("{model: {path: a, revision: b}, lora: null, override_architecture: X}", ModelReference("a", "b")),
        ],
    )
    def test_references(self, text: str, expected: ModelReference) -> None:
        recipe = parse(LINEAR + f"models: [{{model: {text}}}]\nfiles_from: {text}\nbase_model: {text}")
        assert recipe.warnings == ()
        assert recipe.output.files_from == recipe.output.base_model == expected
        assert stage_inputs(recipe.output) == (expected,)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("tokenizer_source: base", TokenizerSource(None)),
            ("tokenizer_source: x/y@1", TokenizerSource(ModelReference("x/y", "1"))),
            ("tokenizer_source: model:x/y", TokenizerSource(ref("x/y"))),
            ("tokenizer: {source: 'model:x/y@1'}", TokenizerSource(ModelReference("x/y", "1"))),
            ("tokenizer: {source: base, tokens: {}, pad_to_multiple_of: null}", TokenizerSource(None)),
            ("tokenizer: {source: {model: {path: x}}}", TokenizerSource(ref("x"))),
            ("tokenizer_source: null", None),
        ],
    )
    def test_tokenizers(self, text: str, expected: TokenizerSource | None) -> None:
        assert parse(LINEAR + MODELS + text).output.tokenizer == expected

    def test_chat_templates(self) -> None:
        for text, kind in (("auto", "auto"), ("chatml", "name"), ("{{ messages }}", "text"), ("{% if x %}", "text")):
            template = parse(LINEAR + MODELS + f"chat_template: '{text}'").output.chat_template
            assert template == ChatTemplate(kind, text)  # type: ignore[arg-type]

    def test_our_own_keys(self) -> None:
        stage = parse(LINEAR + MODELS + "name: x\nsave: yes\nallow_nonfinite: true\nfiles_from: z\n").output
        assert (stage.name, stage.save, stage.allow_nonfinite, stage.files_from) == ("x", True, True, ref("z"))

    @pytest.mark.parametrize("key", ["non_layer", "outside"])
    def test_non_layer_and_its_former_name(self, key: str) -> None:
        stage = parse(LINEAR + MODELS + key + ": {head: a, embeddings: {path: b+c}, norm: null}", strict=True).output
        assert stage.non_layer == NonLayer(ModelReference("b+c"), None, ref("a"))
        assert stage.non_layer.items() == (("embeddings", ModelReference("b+c")), ("head", ref("a")))
        assert stage.non_layer.place == (key,)
        assert (ref("a"), (key, "head")) in stage.references()
        assert stage_inputs(stage) == (ref("a"), ref("b"), ModelReference("b+c"))
        assert parse(LINEAR + MODELS).output.non_layer == NonLayer()
        assert parse(LINEAR + MODELS + f"{key}: ~").output.non_layer == NonLayer()

    def test_nulls_are_absent(self) -> None:
        stage = parse(LINEAR.replace("{weight: 1}", "null") + MODELS + "slices: ~\nbase_model: ~\ndtype: ~").output
        assert (stage.slices, stage.base_model, stage.dtype, stage.parameters) == (None, None, None, {})

    def test_anchors_share_settings(self) -> None:
        recipe = parse("""
shared: &shared {weight: 0.5}
merge_method: linear
models:
  - {model: a, parameters: *shared}
  - {model: b, parameters: {<<: *shared}}
""")
        assert recipe.output.models is not None
        assert [source.parameters for source in recipe.output.models] == [{"weight": 0.5}] * 2
        assert [str(warning) for warning in recipe.warnings] == [
            "r.yml:2: shared: unknown key, ignored; known: merge_method, base_model, models, slices, modules, "
            "parameters, dtype, out_dtype, tokenizer_source, tokenizer, chat_template, name, save, files_from, "
            "non_layer, allow_nonfinite",
        ]

    def test_data(self, tmp_path: Path) -> None:
        data = {"merge_method": "linear", "models": [{"model": tmp_path, "parameters": {"weight": (0, 1)}}]}
        recipe = load_recipe(data, methods=METHODS)
        assert recipe.source is None
        assert recipe.output.models == (Source(ModelReference(str(tmp_path)), None, {"weight": Gradient((0.0, 1.0))}),)
        assert parse(recipe.text).output == recipe.output
        assert load_recipe(recipe, methods=METHODS) is recipe
        with pytest.raises(RecipeError, match=r"^recipe: models\[0\]\.model: expected a model"):
            load_recipe({"merge_method": "linear", "models": [{"model": 3}]}, methods=METHODS)
        for wrong in (3, {1: 2}, b"x", [3], None):
            with pytest.raises(RecipeError):
                load_recipe(wrong, methods=METHODS)  # type: ignore[arg-type]

    def test_files(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yml"
        path.write_text(LINEAR + MODELS)
        for given_as in (path, str(path)):
            recipe = load_recipe(given_as, methods=METHODS)
            assert (recipe.source, recipe.text) == (path, LINEAR + MODELS)
        with pytest.raises(RecipeError, match="no such file"):
            load_recipe(tmp_path / "none.yml", methods=METHODS)
        with pytest.raises(RecipeError, match="parse_recipe"):
            load_recipe(LINEAR + MODELS, methods=METHODS)

    def test_places(self) -> None:
        recipe = parse("merge_method: linear\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 2]\n")
        source = slices_of(recipe.output)[0].sources[0]
        assert str(recipe.error(source.place, "x")) == "r.yml:4: slices[0].sources[0]: x"
        assert str(recipe.error((*source.place, "layer_range"), "x")) == "r.yml:5: slices[0].sources[0].layer_range: x"
        assert recipe.error((*source.place, "none"), "x").line == 4
        (part,) = slices_of(parse("merge_method: linear\nbase_model: c\n" + MODELS).output)
        assert part.sources[2].place == ("base_model",)


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
            (LINEAR + "models: [{model: a+b}]", "'a+b' is a model with a LoRA adapter, which is not supported"),
            (LINEAR + "models: [{model: {model: a, lora: b}}]", "models[0].model.lora: LoRA adapters are not supported"),
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
            (LINEAR + MODELS + "tokenizer_source: union", "tokenizer_source: a union of vocabularies is not supported yet"),
            (LINEAR + MODELS + "tokenizer: {}", "tokenizer: without `source` it means a union"),
            (LINEAR + MODELS + "tokenizer: base", "tokenizer: expected a mapping with `source`"),
            (LINEAR + MODELS + "tokenizer: {source: base, tokens: {x: {}}}", "tokenizer.tokens: choosing embeddings"),
            (
                LINEAR + MODELS + "tokenizer: {source: base, pad_to_multiple_of: 8}",
                "padding the vocabulary is not supported yet; remove `pad_to_multiple_of`",
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
            ("~", "`layer_range` is missing"),
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
            ("merge_method: ties\n" + MODELS, "r.yml:1: merge_method: ties needs a `base_model`"),
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
                "r.yml:4: slices[0]: all sources of a slice must have the same number of layers, got a [0, 2], b [0, 3]",
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
                "linear has no such parameter, ignored; its parameters: weight, normalize (`density` is a parameter of ties)",
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
        unknown_key, unknown_parameter = parse(LINEAR.replace("weight", "weigth") + MODELS + "chat_templat: auto").warnings
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
            "r.yml:4: models[0]: a is listed twice: the last entry is used, line 7: {'weight': 2}, instead of this one, "
            "line 4: {'weight': 1}"
        ]

    def test_a_model_twice_with_other_layers_counts_twice(self) -> None:
        text = LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [2, 4]}]}]"
        recipe = parse(text)
        assert recipe.warnings == ()
        assert len(slices_of(recipe.output)[0].sources) == 2


def stage(name: str | None, *models: str, more: str = "") -> str:
    head = f"name: {name}\n" if name is not None else ""
    return head + LINEAR + f"models: [{', '.join(f'{{model: {model}}}' for model in models)}]\n" + more


class TestStages:
    def test_order(self) -> None:
        recipe = parse("---\n".join((stage(None, "x", "y"), stage("y", "x", "b"), stage("z", "b"), stage("x", "z"))))
        assert [s.name for s in recipe.stages] == ["z", "x", "y", None]
        assert recipe.output.name is None
        assert recipe.stage("x") is recipe.stages[1]
        assert recipe.stage(ref("y")) is recipe.stages[2]
        assert recipe.stage(ref("y@main")) is None
        assert recipe.stage("b") is None
        assert recipe.warnings == ()

    def test_every_kind_of_use_counts(self) -> None:
        for use in (
            LINEAR + MODELS + "base_model: x",
            LINEAR + MODELS + "files_from: x",
            LINEAR + MODELS + "tokenizer_source: x",
            LINEAR + MODELS + "non_layer: {norm: x}",
            LINEAR + "slices: [{sources: [{model: x, layer_range: [0, 1]}]}]",
            LINEAR + "slices: [{base_model: x, sources: [{model: b, layer_range: [0, 1]}]}]",
            LINEAR + "modules: {m: {models: [{model: x}]}}",
        ):
            recipe = parse(f"{use}\n---\n{stage('x', 'a')}")
            assert [s.name for s in recipe.stages] == ["x", None]
            assert recipe.warnings == ()

    def test_lines_and_paths(self) -> None:
        text = "---\n".join((stage("x", "a"), stage(None, "x", "x@y@z")))
        assert refused(text).startswith("r.yml:8: [1].models[1].model: 'x@y@z' has more than one @")
        text = "---\n".join((stage("x", "a", more="foo: 1\n"), stage(None, "x")))
        assert str(parse(text).warnings[0]).startswith("r.yml:5: x.foo: unknown key")
        recipe = parse(text)
        assert str(recipe.error(slices_of(recipe.output)[0].sources[0].place, "m")) == "r.yml:9: [1].models[0]: m"

    def test_all_named(self) -> None:
        assert parse("---\n".join((stage("y", "x"), stage("x", "a")))).output.name == "y"
        assert parse("---\n".join((stage("y", "a", more="save: true\n"), stage("x", "a")))).output.name == "x"
        assert "no stage uses 'y', 'x'" in refused("---\n".join((stage("y", "a"), stage("x", "a"))))

    def test_an_unused_one(self) -> None:
        (warning,) = parse("---\n".join((stage("y", "a"), stage(None, "b")))).warnings
        assert warning.kind is WarningKind.UNUSED_STAGE
        assert str(warning) == "r.yml:1: y: no stage uses it and it isn't saved, so it is not computed"
        assert parse("---\n".join((stage("y", "a", more="save: true\n"), stage(None, "b")))).warnings == ()

    @pytest.mark.parametrize(
        ("stages", "message"),
        [
            ((stage("x", "y"), stage("y", "z"), stage("z", "x"), stage(None, "x")), "the stages use each other: "),
            ((stage("x", "x"),), "r.yml:1: name: the stages use each other: x -> x"),
            ((stage(None, "a"), stage(None, "b")), "r.yml:5: [1]: a second stage without a `name`"),
            ((stage("x", "a"), stage("x", "b")), "r.yml:6: x: a second stage named 'x'"),
            ((stage("../x", "a"),), "r.yml:1: name: invalid stage name '../x'"),
            ((stage("a@b", "a"),), "invalid stage name 'a@b'"),
            ((stage("3", "a"),), "name: expected the stage's name, got 3 (put it in quotes)"),
        ],
    )
    def test_mistakes(self, stages: tuple[str, ...], message: str) -> None:
        assert message in refused("---\n".join(stages))

    def test_the_cycle_is_shown(self) -> None:
        found = refused("---\n".join((stage("x", "y"), stage("y", "z"), stage("z", "x"), stage(None, "x"))))
        assert any(cycle in found for cycle in ("x -> y -> z -> x", "y -> z -> x -> y", "z -> x -> y -> z"))

    def test_as_data(self) -> None:
        documents = [yaml.safe_load(stage("x", "a")), yaml.safe_load(stage(None, "x"))]
        recipe = load_recipe(documents, methods=METHODS)
        assert [s.name for s in recipe.stages] == ["x", None]
        assert parse(recipe.text).stages == recipe.stages


def test_reading_a_recipe_imports_neither_torch_nor_networkx() -> None:
    code = (
        "import sys, mergeloom.engine.recipe.load as r\n"
        "from mergeloom.methods.kernel.contract import Base\n"
        "try: r.parse_recipe('merge_method: x\\nmodels: [{model: a}]', methods={})\n"
        "except Exception as error: print(error)\n"
        "sys.exit(bool({'torch', 'numpy', 'networkx'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (
        0,
        "recipe:1: merge_method: unknown merge method 'x'; `mergeloom methods` lists all methods",
    ), done.stderr


WORDS = st.sampled_from(
    [
        *("merge_method", "models", "slices", "modules", "sources", "model", "layer_range", "parameters", "base_model"),
        *("weight", "density", "t", "normalize", "filter", "value", "dtype", "tokenizer", "tokenizer_source", "source"),
        *("name", "path", "revision", "linear", "slerp", "ties", "a", "b@c", "a+b", "bfloat16", "union", "auto", ""),
    ]
)
LEAVES = WORDS | st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=6)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=6))


@settings(deadline=None, max_examples=300)
@given(TREES, st.booleans())
def test_any_data_is_a_recipe_or_a_recipe_error(data: Any, strict: bool) -> None:
    try:
        recipe = load_recipe(data if isinstance(data, dict) else [data], strict=strict, methods=METHODS)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A sound recipe with one value put in the place of another."""
    documents = list(yaml.safe_load_all(GOOD))
    for _ in range(draw(st.integers(1, 3))):
        node = draw(st.sampled_from(documents))
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], (dict, list)) and draw(st.booleans()):
                node = node[key]
                continue
            action = draw(st.sampled_from(("replace", "delete", "rename")))
            if action == "delete":
                del node[key]
            elif action == "rename" and isinstance(node, dict):
                node[draw(WORDS)] = node.pop(key)
            else:
                node[key] = draw(TREES)
            break
    return yaml.safe_dump_all(documents)


GOOD = """
name: first
merge_method: ties
base_model: a
models:
- {model: b, parameters: {weight: 1, density: [0, 1]}}
- {model: {model: {path: c, revision: d}}, parameters: {weight: [{filter: x, value: 1}, {value: 2}]}}
parameters: {normalize: true}
tokenizer: {source: base}
---
merge_method: slerp
base_model: first
slices:
- sources: [{model: first, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  parameters: {t: 0.5}
- sources: [{model: b, layer_range: [1, 3]}, {model: c, layer_range: [0, 2]}]
  base_model: c
parameters: {t: {filter: mlp, value: [0, 1]}}
dtype: bfloat16
out_dtype: float32
"""


def test_the_sound_recipe_is_sound() -> None:
    recipe = parse(GOOD, strict=True)
    assert recipe.warnings == ()
    assert recipe.output.out_dtype is F32


@settings(deadline=None, max_examples=300)
@given(damaged(), st.booleans())
def test_a_damaged_recipe_is_a_recipe_or_a_recipe_error(text: str, strict: bool) -> None:
    try:
        recipe = parse(text, strict)
    except RecipeError as error:
        assert error.line is not None or "is empty" in str(error)
        return
    for each in recipe.stages:
        assert slices_of(each)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(GOOD)), st.integers(0, 12), st.text(alphabet="ab:-[]{}&*<\n 1'\"|@#", max_size=8))
def test_damaged_text_is_a_recipe_or_a_recipe_error(start: int, length: int, text: str) -> None:
    try:
        recipe = parse(GOOD[:start] + text + GOOD[start + length :])
    except RecipeError:
        return
    assert recipe.stages
