"""`stack`: windows cover the layers, passes compose exactly, and the recipe makes what the summary says."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergeloom.cli.app import cli
from mergeloom.engine.model.self_merge import StackSummary, Window, compose, stack_recipe, stack_windows
from mergeloom.engine.recipe.load import parse_recipe
from mergeloom.engine.recipe.types import ModelReference
from mergeloom.engine.run.planning import plan
from mergeloom.errors import UsageError
from mergeloom.io.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergeloom.io.tensors.dtypes import BF16
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.methods import merge_methods
from tests.conftest import MakeModel
from tests.support import models

PUBLISHED_681B = ((0, 42), (21, 63), (42, 84), (63, 105), (84, 126))
PUBLISHED_1T = ((0, 105), (52, 157), (104, 209))


def headers(model: models.Model) -> Checkpoint:
    """A checkpoint of these shapes, without files: stacking needs no more."""
    file = Path("model.safetensors")
    tensors = {name: TensorRef(file, 0, 0, BF16, shape) for name, shape in model.tensors.items()}
    return Checkpoint(Path("model"), tensors, model.config, {}, (file,), ())


def layers_of(slices: tuple[Window, ...]) -> list[int]:
    return [layer for first, end in slices for layer in range(first, end)]


def slices_in(text: str) -> tuple[Window, ...]:
    """The slices of a recipe, as the recipe reader has them. It warns of nothing."""
    recipe = parse_recipe(text, strict=True, methods=merge_methods())
    assert not recipe.warnings
    return tuple(source.layer_range or (0, 0) for part in recipe.output.slices or () for source in part.sources)


# ------------------------------------------------------------------------------------------------ windows


def test_the_published_windows() -> None:
    assert stack_windows(126, 42, 21) == PUBLISHED_681B
    assert stack_windows(210, 105, 52) == PUBLISHED_1T
    assert stack_windows(210, 105) == PUBLISHED_1T
    assert stack_windows(80, 20) == tuple((first, first + 20) for first in range(0, 70, 10))


def test_exact_lets_the_last_window_reach_to_the_last_layer() -> None:
    assert stack_windows(210, 105, 52, exact=True) == ((0, 105), (52, 157), (104, 210))
    assert stack_windows(126, 42, 21, exact=True) == PUBLISHED_681B


@st.composite
def sizes(draw: st.DrawFn, most: int = 200) -> tuple[int, int, int]:
    """Layers, a window that fits them, a step that fits the window."""
    layers = draw(st.integers(1, most))
    window = draw(st.integers(1, layers))
    return layers, window, draw(st.integers(1, window))


@given(sizes(), st.booleans())
def test_windows_cover_the_layers(size: tuple[int, int, int], exact: bool) -> None:
    layers, window, step = size
    windows = stack_windows(layers, window, step, exact=exact)
    assert [first for first, _ in windows] == list(range(0, layers - window + 1, step))
    assert all(end - first == window for first, end in windows[:-1])
    assert all(start <= end for (_, end), (start, _) in pairwise(windows)), "no gap between two windows"
    end = windows[-1][1]
    if exact:
        assert end == layers
    else:
        assert sum(end - first for first, end in windows) == window * ((layers - window) // step + 1)
        assert 0 <= layers - end < step, "one more window would not fit"
    assert set(layers_of(windows)) == set(range(end))


@given(sizes())
def test_without_a_step_it_is_half_a_window(size: tuple[int, int, int]) -> None:
    layers, window, _ = size
    assert stack_windows(layers, window) == stack_windows(layers, window, max(1, window // 2))


@pytest.mark.parametrize(
    ("layers", "window", "step", "message"),
    [
        (32, 33, 1, "window 33 is invalid for 32 layers"),
        (32, 0, 1, "window 0 is invalid"),
        (32, 8, 9, "step 9 is invalid for window 8: use 1 to 8; a larger step would omit layers"),
        (32, 8, 0, "step 0 is invalid"),
    ],
)
def test_invalid_numbers(layers: int, window: int, step: int, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        stack_windows(layers, window, step)


# ------------------------------------------------------------------------------------------------ passes


@given(sizes(40), st.data())
def test_passes_compose(size: tuple[int, int, int], data: st.DataObject) -> None:
    slices = stack_windows(*size)
    layers = layers_of(slices)
    assume(len(layers) < 2000)
    window = data.draw(st.integers(1, len(layers)))
    windows = stack_windows(len(layers), window, data.draw(st.integers(max(1, window // 4), window)))
    composed = compose(windows, slices)
    assert layers_of(composed) == [layers[place] for place in layers_of(windows)]
    assert all(end != start for (_, end), (start, _) in pairwise(composed)), "runs that meet are one slice"


def test_one_pass_is_its_windows() -> None:
    assert compose(PUBLISHED_681B, ((0, 126),)) == PUBLISHED_681B


# ------------------------------------------------------------------------------------------------ recipes


def test_the_681b() -> None:
    model = "meta-llama/Meta-Llama-3.1-405B-Instruct"
    text, summary = stack_recipe(model, headers(models.llama_3_1_405b()), window=42, step=21, dtype="bfloat16")
    assert (summary.layers, summary.parameters) == (210, 673_620_508_672)
    assert slices_in(text) == summary.slices == PUBLISHED_681B
    assert not summary.warnings
    assert "210 layers, 673,620,508,672 parameters" in text
    recipe = parse_recipe(text, methods=merge_methods()).output
    assert (recipe.merge_method, recipe.dtype) == ("passthrough", BF16)
    assert {reference.text for reference, _ in recipe.references()} == {model}


def test_the_1t_straight_from_the_405b() -> None:
    text, summary = stack_recipe("405B", headers(models.llama_3_1_405b()), window=(42, 105), step=(21, 52), repeat=2)
    assert (summary.layers, summary.parameters) == (315, 1_008_329_408_512)
    assert [one.windows for one in summary.rounds] == [PUBLISHED_681B, PUBLISHED_1T]
    through = layers_of(PUBLISHED_681B)
    assert layers_of(slices_in(text)) == [through[place] for place in layers_of(PUBLISHED_1T)]
    first, second = summary.warnings
    assert "layer 209 of the 210 that pass 1 makes is unused" in first
    assert second == "layer 125 of 405B is in no slice"
    assert first in text


def test_the_1t_exactly() -> None:
    _, summary = stack_recipe("405B", headers(models.llama_3_1_405b()), window=(42, 105), step=(21, 52), exact=True)
    assert summary.layers == 316
    assert not summary.warnings
    assert set(layers_of(summary.slices)) == set(range(126))


def test_the_120b() -> None:
    _, summary = stack_recipe("70B", headers(models.llama_3_70b()), window=20)
    assert (summary.layers, summary.parameters) == (140, 121_892_970_496)


def test_layers_that_one_pass_leaves_unused_are_named() -> None:
    _, summary = stack_recipe("m", headers(models.tiny_llama(layers=10)), window=4, step=4)
    (warning,) = summary.warnings
    assert warning.startswith("layers 8 to 9 of m are unused")


def test_one_window_counts_for_all_passes() -> None:
    model = headers(models.tiny_llama(layers=8))
    _, once = stack_recipe("m", model, window=4, repeat=2)
    _, twice = stack_recipe("m", model, window=(4, 4), step=(2, 2))
    assert once == twice
    assert [one.before for one in once.rounds] == [8, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (4, 4), "repeat": 3}, "got 2 windows for 3 passes"),
        ({"window": 4, "step": (2, 2, 2), "repeat": 2}, "got 3 steps for 2 passes"),
        ({"window": (), "step": 1}, "stacking needs a window"),
        ({"window": 4, "repeat": 0}, "at least one pass"),
        ({"window": 4, "step": 1, "repeat": 40}, "the maximum is 100,000"),
        ({"window": 4, "dtype": "bf16"}, "unknown dtype 'bf16': use one of bfloat16"),
    ],
)
def test_options_that_do_not_fit_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        stack_recipe("m", headers(models.tiny_llama(layers=8)), **options)  # type: ignore[arg-type]


def test_models_that_have_not_one_stack_of_layers() -> None:
    shapes: dict[str, models.Shape] = {
        f"model.{side}.layers.{i}.fc.weight": (2, 2) for side in ("encoder", "decoder") for i in range(2)
    }
    config = {"encoder_layers": 2, "decoder_layers": 2}
    with pytest.raises(UsageError, match="m has 2 stacks of layers instead of one"):
        stack_recipe("m", headers(models.Model(shapes, config)), window=1)
    with pytest.raises(UsageError, match="m has no layers"):
        stack_recipe("m", headers(models.Model({"weight": (2, 2)}, {})), window=1)


@pytest.mark.parametrize(
    "reference",
    [
        ModelReference("dir/with @ and + in it"),
        ModelReference("a+b", "main"),
        ModelReference("org/model", "v1.0"),
        ModelReference("{odd: [name, # here"),
        ModelReference("1e5"),
        ModelReference("on"),
        ModelReference("two\nlines: &x *y"),
        ModelReference("modèle/日本"),
    ],
    ids=repr,
)
def test_every_name_survives(reference: ModelReference) -> None:
    text, _ = stack_recipe(reference, headers(models.tiny_llama(layers=8)), window=4)
    recipe = parse_recipe(text, strict=True, methods=merge_methods())
    assert {found for found, _ in recipe.output.references()} == {reference}


@settings(max_examples=25, deadline=None)
@given(sizes(7), st.integers(1, 2), st.booleans())
def test_the_summary_is_what_the_plan_says(size: tuple[int, int, int], repeat: int, exact: bool) -> None:
    layers, window, step = size
    path = models_of_all_sizes[layers]
    text, summary = stack_recipe(str(path), open_checkpoint(path), window=window, step=step, repeat=repeat, exact=exact)
    planned = plan(parse_recipe(text, methods=merge_methods()))
    output = planned.to_dict()["output"]
    assert (output["layers"], output["parameters"]) == (summary.layers, summary.parameters)
    assert list(planned.built.stacks[0].sources) == layers_of(summary.slices)


models_of_all_sizes: dict[int, Path] = {}


@pytest.fixture(scope="session", autouse=True)
def _models_of_all_sizes(tmp_path_factory: pytest.TempPathFactory) -> None:
    for layers in range(1, 8):
        directory = tmp_path_factory.mktemp("stacking") / "model"
        shapes = models.tiny_llama(layers=layers, tied=layers % 2 == 0)
        models_of_all_sizes[layers] = models.write_checkpoint(directory, shapes, fill=None)


def test_a_prediction_head_beyond_the_layers_is_counted_once(make_model: MakeModel) -> None:
    path = make_model("deepseek", models.deepseek_v3(layers=4, experts=2, hidden=112), fill=None)
    text, summary = stack_recipe(str(path), open_checkpoint(path), window=2, step=1)
    output = plan(parse_recipe(text, methods=merge_methods())).to_dict()["output"]
    assert (output["layers"], output["parameters"]) == (6, summary.parameters)


# ------------------------------------------------------------------------------------------------ the command


def run(*arguments: object) -> tuple[str, str]:
    """Stdout and stderr of ``mergeloom stack``."""
    ended = CliRunner().invoke(cli, ["stack", *map(str, arguments)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.stdout, ended.stderr


def test_the_command_writes_the_recipe_to_stdout_and_says_what_it_makes(make_model: MakeModel) -> None:
    path = make_model("llama", models.tiny_llama(layers=7), fill=None)
    text, said = run(path, "--window", 3, "--step", 2, "--repeat", 2, "--dtype", "float16")
    expected: tuple[str, StackSummary] = stack_recipe(
        str(path), open_checkpoint(path), window=3, step=2, repeat=2, dtype="float16"
    )
    assert text == expected[0]
    assert "7 layers -> 9, in 3 windows" in said
    assert f"output: 12 layers, {expected[1].parameters:,}" in said
    assert "warning: " not in said


def test_the_command_warns(make_model: MakeModel) -> None:
    path = make_model("llama", models.tiny_llama(layers=7), fill=None)
    assert "warning: layer 6" in run(path, "--window", 4, "--step", 2)[1]
    assert "warning" not in run(path, "--window", 4, "--step", 2, "--exact")[1]


def test_the_command_takes_a_window_and_a_step_for_each_pass(make_model: MakeModel) -> None:
    path = make_model("llama+odd@name", models.tiny_llama(layers=6), fill=None)
    text, said = run(path, "--window", 2, "--window", 5, "--step", 1, "--step", 5)
    assert "6 layers -> 10, in 5 windows" in said
    assert "10 layers -> 10, in 2 windows" in said
    assert slices_in(text) == stack_windows(6, 2, 1)


def test_a_model_that_is_none() -> None:
    with pytest.raises(UsageError, match="has no adapter after the"):
        run("base+", "--window", 2)
