"""Mistakes are reported together, with the warnings that explain them, and anchors are accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.engine.recipe.warnings import WarningKind
from mergeloom.errors import RecipeError
from tests.unit.recipe.parsing import LINEAR, MODELS, parse, parse_built_in, parse_error, refused


def lines_of(text: str, *, strict: bool = False) -> list[str]:
    """The lines of the error for a recipe."""
    return refused(text, strict).splitlines()


class TestTogether:
    def test_in_line_order_with_what_is_not_supported_last(self) -> None:
        text = "experts: []\n---\nmerge_method: ties\nbase_model: x\nslices:\n- sources:\n"
        text += "  - {model: a, layer_range: [0, 1]}\n  - {model: b, layer_range: [0, 1]}\ndtype: bf16\nsave: 1\n"
        assert [line.partition(": ")[2].partition(": ")[0] for line in lines_of(text)] == [
            "[1].slices[0]",
            "[1].dtype",
            "[1].save",
            "[0].experts",
        ]

    def test_a_wrong_method_does_not_hide_other_mistakes(self) -> None:
        found = lines_of("merge_method: lineer\nmodels: [{model: a, parameters: {density: x}}, {modle: b}]\ndtype: f\n")
        assert [line.split(" ")[1] for line in found] == ["merge_method:", "models[1].modle:", "dtype:"]

    def test_every_source_of_every_slice(self) -> None:
        text = "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        text += "- sources:\n  - {model: a, layer_range: [1, 0]}\n  - {model: a+, layer_range: [x, 1]}\n"
        text += "- source: []\n- sources: []\n"
        assert [line.split(" ")[1] for line in lines_of(text)] == [
            "slices[0].sources[0].layer_range:",
            "slices[0].sources[1].model:",
            "slices[0].sources[1].layer_range[0]:",
            "slices[1].source:",
            "slices[2].sources:",
        ]

    def test_a_mistake_causes_no_others(self) -> None:
        """What depends on an entry that can't be read is not checked."""
        assert len(lines_of("merge_method: slerp\nbase_model: 3\nparameters: {t: 1}\n" + MODELS)) == 1
        assert len(lines_of("merge_method: slerp\nbase_model: a\nmodels: [{modle: b}, {model: c}]")) == 1
        assert len(lines_of("merge_method: ties\nbase_model: a\nmodles: [{model: b}]")) == 1
        assert len(lines_of("merge_method: slerp\nparameters: {t: 1}\n" + MODELS)) == 1

    def test_stages(self) -> None:
        text = f"name: x\n{LINEAR}{MODELS}dtype: y\n---\nname: x\n{LINEAR}{MODELS}save: 2\n"
        assert [line.split(" ")[1] for line in lines_of(text)] == ["x.dtype:", "x.save:"]

    def test_common_advice_is_given_once(self) -> None:
        models = "models:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 2}}\n"
        text = f"merge_method: karcher\n{models}"
        problem = "parameters.weight: karcher has no such parameter"
        advice = "; its parameters: max_iter (`weight` is a parameter of "
        first, second = map(str, parse(text).warnings)
        assert f"models[0].{problem}, ignored{advice}" in first
        assert second.endswith(f"models[1].{problem}, ignored")
        first, second = lines_of(text, strict=True)
        assert f"models[0].{problem}{advice}" in first
        assert second.endswith(f"models[1].{problem}")

    def test_advice_on_names_is_given_once(self) -> None:
        first, second = lines_of(LINEAR + "models: [{model: a@b@c}, {model: d@e@f}]\n")
        assert "'a@b@c' has more than one @: write `id@revision` (for a directory with @ in its name, write" in first
        assert second.endswith(
            "'d@e@f' has more than one @: write `id@revision` (for a directory with @ in its name, write `{path: ...}`)"
        )

    def test_values_for_models_cause_no_other_warnings(self) -> None:
        values = "[{model: a, value: 1}, {model: b, value: 2}]"
        found = parse(f"merge_method: linear\n{MODELS}parameters: {{weight: {values}}}\n").warnings
        assert [warning.place[-1] for warning in found] == ["model", "model"]

    def test_strict_reports_all_unknown_keys(self) -> None:
        found = lines_of(LINEAR + MODELS + "foo: 1\nbar: 2\ndtype: x\n", strict=True)
        assert [line.split(" ")[1] for line in found] == ["foo:", "bar:", "dtype:"]

    def test_sources_with_unreadable_layers_are_not_duplicates(self) -> None:
        sources = "  - {model: a, layer_range: [0, 0]}\n  - {model: a, layer_range: [3, 3]}\n"
        error = parse_error(f"merge_method: linear\nslices:\n- sources:\n{sources}")
        assert (error.line, len(error.more), error.warnings) == (4, 1, ())


class TestWarningsOfErrors:
    def test_an_error_has_the_warnings_before_it(self) -> None:
        error = parse_error("merge_method: linear\nmodels: [{model: a, wieght: 1}]\nfoo: 1\ndtype: x\n")
        assert [warning.split(":")[2] for warning in error.warnings] == [" foo", " models[0].wieght"]
        assert not any(warning in str(error) for warning in error.warnings)

    def test_they_are_added_in_front_without_repetition(self) -> None:
        error = RecipeError("x")
        error.add_warnings(["b", "c"])
        error.add_warnings(["a", "b"])
        assert error.warnings == ("a", "b", "c")
        assert RecipeError("y").warnings == ()


class TestAnchors:
    @pytest.mark.parametrize(
        "text",
        [
            "w: &w 0.5\nmerge_method: linear\nparameters: {weight: *w}\n" + MODELS,
            "common: &c {parameters: {weight: 1}}\nmerge_method: linear\nmodels: [{model: a, <<: *c}]\n",
            "all:\n  one:\n  - &m {model: a}\n" + LINEAR + "models: [*m]\n",
            "merge_method: linear\nparameters: {_w: &w [0, 1], weight: *w}\n" + MODELS,
        ],
    )
    def test_a_key_that_holds_an_anchor_for_use_elsewhere_is_no_mistake(self, text: str) -> None:
        assert parse(text, strict=True).warnings == ()

    @pytest.mark.parametrize("value", ["&w 0.5", "[&w 1, *w]", "{x: &w 1, y: *w}"])
    def test_an_anchor_that_nothing_else_uses_does_not_matter(self, value: str) -> None:
        (warning,) = parse(f"foo: {value}\n" + LINEAR + MODELS).warnings
        assert (warning.kind, warning.place) == (WarningKind.UNKNOWN_KEY, ("foo",))

    def test_anchors_of_another_stage_do_not_matter(self) -> None:
        stage = LINEAR + MODELS
        text = f"name: one\nfoo: &w 1\nbar: *w\n{stage}---\nfoo: 1\nmerge_method: linear\nmodels: [{{model: one}}]\n"
        places = [warning.place for warning in parse(text + "parameters: {weight: 1}\n").warnings]
        assert places == [("one", "bar"), (1, "foo")]


class TestUnknownParameters:
    @pytest.mark.parametrize(
        ("method", "parameter", "advice"),
        [
            (
                "sce",
                "weight",
                "its parameters: select_topk, weight_eps, divisor_eps (`weight` is a parameter of linear",
            ),
            (
                "sce",
                "weigth",
                "`weight` is a parameter of linear, breadcrumbs, breadcrumbs_ties, ...; its parameters: sel",
            ),
            ("multislerp", "normalize", "did you mean `normalize_weights`?"),
            ("ties", "densty", "did you mean `density`?"),
            (
                "linear",
                "epsilon",
                "its parameters: weight, normalize (`epsilon` is a parameter of ",
            ),
        ],
    )
    def test_a_parameter_of_the_same_role_is_suggested(self, method: str, parameter: str, advice: str) -> None:
        text = f"merge_method: {method}\nbase_model: a\nparameters: {{{parameter}: 1}}\nmodels: [{{model: b}}]\n"
        (warning,) = parse_built_in(text).warnings
        assert warning.advice.startswith(advice)


class TestWhatHasNoEffect:
    RECIPE = "merge_method: {method}\nbase_model: a\nmodels: [{{model: b, parameters: {{{settings}}}}}]\n"

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
    def test_a_method_that_drops_nothing(self, method: str) -> None:
        (warning,) = parse_built_in(self.RECIPE.format(method=method, settings="weight: 1")).warnings
        assert (warning.kind, warning.place) == (WarningKind.NO_EFFECT, ("merge_method",))
        assert warning.problem == f"{method} drops nothing: `density` is 1 by default"
        assert parse_built_in(self.RECIPE.format(method=method, settings="weight: 1, density: 0.5")).warnings == ()

    @pytest.mark.parametrize("method", ["ties", "task_arithmetic", "breadcrumbs"])
    def test_other_methods_do_without_density(self, method: str) -> None:
        assert parse_built_in(self.RECIPE.format(method=method, settings="weight: 1")).warnings == ()

    @pytest.mark.parametrize(
        ("method", "settings", "model"),
        [
            ("ties", "weight: 0.3", "b"),
            ("ties", "weight: [0.2, 1]", "b"),
            ("ties", "weight: [{filter: mlp, value: 0.5}, {value: 1}]", "b"),
            ("dare_ties", "weight: 0.3, density: 0.5", None),
            ("ties", "weight: 1", None),
            ("ties", "weight: [0, 1]", None),
            ("task_arithmetic", "weight: 0.3", None),
        ],
    )
    def test_a_lone_weight_that_cancels(self, method: str, settings: str, model: str | None) -> None:
        warnings = parse_built_in(self.RECIPE.format(method=method, settings=settings)).warnings
        found = [each.problem for each in warnings if "the weight of" in each.problem]
        text = f"the weight of {model}, the only model, has no effect: {method} divides by the sum of the weights"
        assert found == ([text] if model else [])

    def test_a_lone_weight_is_scaled_where_normalize_says_so(self) -> None:
        recipe = (
            "merge_method: ties\nbase_model: a\nparameters: {{normalize: {}, weight: 0.3}}\nmodels: [{{model: b}}]\n"
        )
        assert parse_built_in(recipe.format("false")).warnings == ()
        (warning,) = parse_built_in(recipe.format("true")).warnings
        assert (warning.kind, warning.place) == (WarningKind.NO_EFFECT, ("merge_method",))
        linear = "merge_method: linear\nmodels: [{model: b, parameters: {weight: 0.5}}]\n"
        assert "the only model, has no effect: linear divides" in parse_built_in(linear).warnings[0].problem


def test_a_negative_end_names_the_number_of_layers_of_a_local_model(llamas: dict[str, Path]) -> None:
    text = "merge_method: passthrough\nslices:\n- sources:\n  - {{model: {}, layer_range: [0, -1]}}\n"
    path = llamas["a"]
    assert refused(text.format(path)).endswith(f"; for all 4 layers of {path}, write [0, 4]")
    assert refused(text.format("owner/name")).endswith("; for all layers of a model with 32 layers, write [0, 32]")
