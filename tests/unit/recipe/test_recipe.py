"""Recipes: every form of every key, and recipes with several stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mergeloom.engine.recipe.entries.output_dtype import OutputDtype
from mergeloom.engine.recipe.load import load_recipe
from mergeloom.engine.recipe.types import (
    ChatTemplate,
    Conditional,
    Gradient,
    ModelReference,
    Module,
    NonLayer,
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
from mergeloom.io.tensors.dtypes import BF16, F16, F64
from tests.unit.recipe.parsing import LINEAR, METHODS, MODELS, parse, ref, refused


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
            out_dtype=OutputDtype.of(BF16),
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
            ("tokenizer_source: union", TokenizerSource(None, union=True)),
            ("tokenizer: {source: union}", TokenizerSource(None, union=True)),
            ("tokenizer: {source: null, tokens: {}}", TokenizerSource(None, union=True)),
            ("tokenizer: {}", TokenizerSource(None, union=True)),
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
        assert recipe.warnings == ()

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
        "from mergeloom.methods.kernel.spec import Base\n"
        "try: r.parse_recipe('merge_method: x\\nmodels: [{model: a}]', methods={})\n"
        "except Exception as error: print(error)\n"
        "sys.exit(bool({'torch', 'numpy', 'networkx'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (
        0,
        "recipe:1: merge_method: unknown merge method 'x'; `mergeloom methods` lists all methods",
    ), done.stderr
