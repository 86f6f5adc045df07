"""Misspelt paths are distinguished from Hub ids."""

from __future__ import annotations

from pathlib import Path

import pytest

import mergeloom
from mergeloom.engine.model import open as model_open
from mergeloom.engine.model.open import open_named
from mergeloom.engine.model.paths import ignored_revisions, path_problem
from mergeloom.engine.recipe.load import load_recipe
from mergeloom.engine.recipe.types import ModelReference
from mergeloom.errors import (
    CheckpointError,
    EnvironmentFailure,
    HubUnreachable,
    MergeloomError,
    ModelNotFound,
    RecipeError,
    UsageError,
)
from mergeloom.methods import merge_methods
from tests.support import models


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with empty directories of models."""
    for name in ("models/llama-3-8b", "models/base", "models/v@2", "Qwen/Qwen2.5-7B", "org/expert-a", "my_model"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("directory")
class TestMisspelt:
    @pytest.mark.parametrize(
        ("text", "near"),
        [
            ("modles/base", "models/base"),
            ("models/bsae", "models/base"),
            ("model/base", "models/base"),
            ("Models/Base", "models/base"),
            ("models/lama-3-8b", "models/llama-3-8b"),
            ("my-model", "my_model"),
            ("./modles/base", "./models/base"),
            ("models/bass/", "models/base"),
            ("../{}/models/bas", "../{}/models/base"),
            ("./models/vv@2", "./models/v@2"),
        ],
    )
    def test_the_nearest_name_is_suggested(self, directory: Path, text: str, near: str) -> None:
        problem = path_problem(ModelReference.parse(text.format(directory.name)))
        assert problem is not None
        assert f"did you mean `{near.format(directory.name)}`?" in problem

    @pytest.mark.parametrize(
        "text",
        [
            "models/base",
            "models/llama-3-70b",
            "models/llama-3-8b-instruct",
            "Qwen/Qwen2.5-14B",
            "Qwen/Qwen3-7B",
            "org/expert-b",
            "org/llama",
            "meta-llama/Llama-3.1-8B",
            "modles/base@main",
            "gpt2",
        ],
    )
    def test_other_names_may_be_hub_ids(self, text: str) -> None:
        assert path_problem(ModelReference.parse(text)) is None

    @pytest.mark.parametrize("text", ["None", "null", "undefined"])
    def test_placeholders_do_not_name_models(self, text: str) -> None:
        assert path_problem(ModelReference(text)) == (f"{text!r} does not name a model: write a directory or a Hub id")

    def test_a_directory_has_no_revisions(self) -> None:
        assert path_problem(ModelReference("models/base", "v2")) is None
        models = [{"model": "models/base@v2"}, {"model": "models/base@main"}, {"model": "models/base"}]
        recipe = load_recipe({"merge_method": "linear", "models": models}, methods=merge_methods())
        (warning,) = ignored_revisions(recipe)
        assert str(warning).startswith(
            "recipe: models[0]: models/base is a directory here and has no revisions: @v2 is ignored; remove @v2"
        )

    def test_revisions_of_a_model_and_of_its_adapter_are_reported_once(self) -> None:
        models = [{"model": {"model": {"path": "models/base", "revision": "v2"}, "lora": {"path": "models/merged"}}}]
        recipe = load_recipe({"merge_method": "passthrough", "models": models}, methods=merge_methods())
        (warning,) = ignored_revisions(recipe)
        assert "models/base is a directory here" in str(warning)

    def test_on_the_command_line(self) -> None:
        with pytest.raises(UsageError, match="did you mean `models/base`"):
            open_named("modles/base")

    def test_on_the_command_line_a_name_that_is_not_on_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UsageError, match=r"^org/expert-b: .*; did you mean the directory `org/expert-a`\?$"):
            open_named("org/expert-b")
        with pytest.raises(ModelNotFound, match=r"^org/zzz: .*; org contains expert-a$"):
            open_named("org/zzz")
        with pytest.raises(ModelNotFound, match=r"^org/expert-b@v1: .*; org contains expert-a$"):
            open_named("org/expert-b@v1")


def test_a_model_in_the_hub_cache_is_not_misspelt(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
    assert path_problem(ModelReference("modles/base")) is not None
    folder = directory / "cache" / "models--modles--base"
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    assert path_problem(ModelReference("modles/base")) is None


class TestRecipes:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    @staticmethod
    def recipe(directory: Path, *names: str) -> Path:
        lines = [f"- {{model: {name}, parameters: {{weight: 1}}}}\n" for name in names]
        (directory / "r.yml").write_text("merge_method: linear\nmodels:\n" + "".join(lines))
        return directory / "r.yml"

    def test_all_misspelt_paths_are_reported_before_any_model_is_opened(self, directory: Path) -> None:
        with pytest.raises(RecipeError) as caught:
            mergeloom.plan(self.recipe(directory, "modles/base", "models/base", "models/bsae"))
        assert [mistake.line for mistake in (caught.value, *caught.value.more)] == [3, 5]
        assert caught.value.path == ("models", 0, "model")

    def test_a_similar_name_is_suggested_if_the_hub_has_no_such_model(self, directory: Path) -> None:
        with pytest.raises(RecipeError, match="did you mean the directory `org/expert-a`") as caught:
            mergeloom.plan(self.recipe(directory, "org/expert-b"))
        assert caught.value.line == 3

    def test_a_missing_model_has_its_line_and_its_siblings(self, directory: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            mergeloom.plan(self.recipe(directory, "models/zzzzz"))
        assert str(caught.value).startswith(f"{directory}/r.yml:3: models[0].model: models/zzzzz: there is no such")
        assert str(caught.value).endswith("; models contains base, llama-3-8b, v@2")

    def test_a_broken_link_is_not_suggested_for_itself(self, directory: Path) -> None:
        (directory / "models" / "linked").symlink_to("gone")
        with pytest.raises(ModelNotFound) as caught:
            mergeloom.plan(self.recipe(directory, "./models/linked"))
        assert str(caught.value).startswith(
            f"{directory}/r.yml:3: models[0].model: models/linked: is a broken link: download the model again"
        )
        assert "did you mean" not in str(caught.value)

    @pytest.mark.parametrize("kind", [ModelNotFound, HubUnreachable])
    def test_what_is_missing_is_known_by_the_type_of_the_error(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, kind: type[MergeloomError]
    ) -> None:
        error: MergeloomError = kind("it isn't anywhere")

        def fail(reference: ModelReference) -> None:
            raise error

        monkeypatch.setattr(model_open, "open_model", fail)
        with pytest.raises(kind) as caught:
            mergeloom.plan(self.recipe(directory, "org/other"))
        assert str(caught.value) == f"{directory}/r.yml:3: models[0].model: it isn't anywhere; org contains expert-a"
        located = {CheckpointError: f"{directory}/r.yml:3: models[0].model: ", EnvironmentFailure: ""}
        for unrelated, location in located.items():
            error = unrelated("the Hub says: there is no such directory")
            with pytest.raises(unrelated) as caught:
                mergeloom.plan(self.recipe(directory, "org/other"))
            assert str(caught.value) == f"{location}the Hub says: there is no such directory"

    @pytest.mark.parametrize("name", ["models/v@2", "models/one+two"])
    def test_a_directory_with_an_at_sign_or_plus_in_its_name_is_a_path(self, directory: Path, name: str) -> None:
        models.write_checkpoint(directory / name, models.tiny_llama())
        plan = mergeloom.plan(self.recipe(directory, name))
        assert [model.name for model in plan.built.models] == [name]
