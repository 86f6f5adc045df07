"""Config, tokenizer and chat template come from where the recipe says, through all stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.files.chat_templates import BUILT_IN
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, RecipeError
from mergeloom.report.plan import plan_text
from tests.support.models import Model, tiny_llama, write_checkpoint, write_tokenizer
from tests.support.outputs import config_of, digests, read_model, same_tensors

CPU = Options(device="cpu", threads=1)
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(name, model, template=, words=, **config)``: a model with a tokenizer."""

    def make(
        name: str, model: Model | None = None, *, template: str | None = None, words: int = 32, **config: Any
    ) -> Path:
        model = model or tiny_llama()
        seed = sum(name.encode())
        directory = write_checkpoint(tmp_path / name, model, fill=seed, config=model.config | config)
        write_tokenizer(directory, words)
        for file in ("tokenizer_config.json", "generation_config.json"):
            content = json.loads((directory / file).read_text()) | {"of": name}
            if template is not None and file == "tokenizer_config.json":
                content["chat_template"] = template
            (directory / file).write_text(json.dumps(content))
        (directory / "LICENSE").write_text(name)
        return directory

    return make


def stack(model: Path | str, *ranges: tuple[int, int], **more: Any) -> dict[str, Any]:
    """A passthrough recipe."""
    slices = [{"sources": [{"model": str(model), "layer_range": list(part)}]} for part in ranges]
    return {"merge_method": "passthrough", "slices": slices, **more}


def linear(*models: Path, **more: Any) -> dict[str, Any]:
    """A mean."""
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": entries, **more}


def owner(out: Path, file: str) -> str:
    """Whose file it is."""
    return str(json.loads((out / file).read_text())["of"])


# ------------------------------------------------------------------------------------------------ files_from


def test_files_come_from_the_model_that_is_named(tmp_path: Path, make: Make) -> None:
    base, instruct = make("base"), make("instruct", template="{{ chat }}", rope_theta=7.0)
    merge(stack(base, (0, 3), (1, 4), files_from=str(instruct), dtype="float16"), tmp_path / "out", CPU)
    out = tmp_path / "out"
    changes = {"num_hidden_layers": 6, "torch_dtype": "float16"}
    assert config_of(out) == config_of(instruct) | changes
    for pattern in ("tokenizer*", "generation_config.json", "LICENSE", "special_tokens_map.json"):
        assert digests(out, pattern) == digests(instruct, pattern) != {}


def test_its_weights_are_not_needed(tmp_path: Path, make: Make) -> None:
    base, instruct = make("base"), make("instruct", rope_theta=7.0)
    (instruct / "model.safetensors").unlink()
    planned = plan(stack(base, (0, 4), files_from=str(instruct)), CPU)
    assert planned.files.config_from == str(instruct)
    assert [model.name for model in planned.built.models] == [str(base)]
    merge(planned, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(instruct)


def test_what_follows_the_tensors_all_the_same(tmp_path: Path, make: Make) -> None:
    kinds = ["full_attention", "sliding_attention", "chunked_attention", "linear_attention"]
    base = make("base", tiny_llama(tied=True), layer_types=kinds)
    named = make("named", tiny_llama(tied=False), vocab_size=96, layer_types=kinds[::-1])
    planned = plan(stack(base, (0, 3), (1, 4), files_from=str(named)), CPU)
    assert [w for w in planned.warnings if "vocab_size is 64 as in the merged models, not 96" in w]
    merge(planned, tmp_path / "out")
    found = config_of(tmp_path / "out")
    assert found["vocab_size"] == 64
    assert found["tie_word_embeddings"] is True  # no head is written
    assert found["layer_types"] == [*kinds[::-1][:3], *kinds[::-1][1:]]


def test_a_config_that_has_the_outputs_layers_already(tmp_path: Path, make: Make) -> None:
    kinds = [f"kind_{layer}" for layer in range(6)]
    base, named = make("base"), make("named", tiny_llama(layers=6), layer_types=kinds)
    merge(stack(base, (0, 3), (1, 4), files_from=str(named)), tmp_path / "out", CPU)
    assert config_of(tmp_path / "out") == config_of(named)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "has hidden_size 64 in its config.json, but the merged models have 32"),
        ({"num_key_value_heads": 4}, "has num_key_value_heads 4 in its config.json, but the merged models have 2"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: dict[str, Any], message: str, make: Make) -> None:
    base, named = make("base"), make("named", **config)
    with pytest.raises(RecipeError, match=f"files_from: .*{message}"):
        plan(stack(base, (0, 4), files_from=str(named)), CPU)


def test_a_named_model_without_config_is_refused(make: Make) -> None:
    base, named = make("base"), make("named")
    (named / "config.json").unlink()
    with pytest.raises(RecipeError, match=r"files_from: .*named has no config\.json"):
        plan(stack(base, (0, 4), files_from=str(named)), CPU)
    with pytest.raises(CheckpointError, match="there is no such directory"):
        plan(stack(base, (0, 4), files_from="./gone"), CPU)


def test_what_is_odd_about_it_is_said(make: Make) -> None:
    base, named = make("base"), make("named", words=40, model_type="mistral")
    warnings = " ".join(plan(stack(base, (0, 4), files_from=str(named)), CPU).warnings)
    assert "its model_type is mistral, but the merged models have llama" in warnings
    assert f"the vocabularies of {named} and {base} differ in 8 of 40 rows" in warnings
    assert "token 'word32' has row 32 in" in warnings
    assert not plan(stack(base, (0, 4), files_from=str(make("same"))), CPU).warnings


# ------------------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_a_tokenizer_of_the_base_or_a_model(key: str, tmp_path: Path, make: Make) -> None:
    a, b, c = (make(name) for name in "abc")
    texts = {"base": b, str(c): c, f"model:{c}": c}
    for number, (text, expected) in enumerate(texts.items()):
        recipe = linear(a, b, base_model=str(b), **{key: text if key == "tokenizer_source" else {"source": text}})
        merge(recipe, out := tmp_path / str(number), CPU)
        assert owner(out, "tokenizer_config.json") == expected.name
        assert owner(out, "generation_config.json") == expected.name
    merge(linear(a, b, base_model=str(b)), tmp_path / "plain", CPU)
    assert same_tensors(read_model(tmp_path / "plain"), read_model(tmp_path / "0"))  # rows beyond the vocabulary, too
    assert read_model(tmp_path / "0")["model.embed_tokens.weight"].shape == (64, 32)


def test_without_a_base_it_is_the_first_models(tmp_path: Path, make: Make) -> None:
    a, b = make("a"), make("b")
    merge(linear(b, a, tokenizer_source="base"), tmp_path / "out", CPU)
    assert owner(tmp_path / "out", "tokenizer_config.json") == "b"


def test_the_tokenizer_wins_over_files_from(tmp_path: Path, make: Make) -> None:
    a, b, c = (make(name) for name in "abc")
    merge(linear(a, b, tokenizer_source=str(b), files_from=str(c)), tmp_path / "out", CPU)
    assert owner(tmp_path / "out", "tokenizer_config.json") == "b"
    assert owner(tmp_path / "out", "generation_config.json") == "b"
    assert owner(tmp_path / "out", "tokenizer_config.json") == "b"
    assert (tmp_path / "out" / "LICENSE").read_text() == "c"
    (b / "generation_config.json").unlink()
    merge(linear(a, b, tokenizer_source=str(b), files_from=str(c)), tmp_path / "without", CPU)
    assert owner(tmp_path / "without", "generation_config.json") == "c"
    sections = plan_text(plan(linear(a, b, tokenizer_source=str(b), files_from=str(c)), CPU))
    assert f"config from     {c}" in sections
    assert f"tokenizer from  {b}" in sections


def test_vocabularies_that_differ_a_little_are_a_warning(make: Make) -> None:
    a, b, c = make("a"), make("b"), make("c", words=33)
    plain = plan(linear(a, b, c), CPU).warnings
    (warning,) = plain
    assert f"the vocabularies of {a} and {c} differ in 1 of 33 rows" in warning
    assert f"token 'word32' has no row in {a} and row 32 in {c}" in warning
    assert "set `allow_vocabulary_mismatch: true`" in warning
    assert plan(linear(a, b, c, tokenizer_source="base"), CPU).warnings == ()
    (zeros,) = plan(linear(a, b, tokenizer_source=str(c)), CPU).warnings  # c is not merged
    assert "no model has an embedding for 'word32': zeros are used" in zeros


def test_vocabularies_that_are_unrelated_are_refused(make: Make) -> None:
    a, b, c = make("a"), make("b"), make("c", words=64)
    with pytest.raises(CheckpointError, match="are unrelated: 32 of 64 rows differ.*`tokenizer_source: union`"):
        plan(linear(a, b, c), CPU)
    for more in ({"tokenizer_source": "base"}, {"tokenizer_source": str(c)}):
        assert plan(linear(a, b, c, **more), CPU).warnings == ()


def test_vocabularies_are_compared_and_not_files(make: Make) -> None:
    a, b = make("a"), make("b")
    content = json.loads((b / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (b / "tokenizer.json").write_text(json.dumps(content))
    plan(linear(a, b, tokenizer_source="base"), CPU)
    content["added_tokens"] = [{"id": 5, "content": "word6", "special": True}]
    (b / "tokenizer.json").write_text(json.dumps(content))
    (warning,) = plan(linear(a, b), CPU).warnings
    assert "token 'word6' has row 6 in" in warning
    assert plan(linear(a, b, tokenizer_source="base"), CPU).warnings == ()


def test_models_whose_embeddings_are_not_used_may_have_any(make: Make) -> None:
    a, b, c = make("a"), make("b", words=40), make("c")
    slices = [{"sources": [{"model": str(m), "layer_range": [i, i + 1]}]} for i, m in enumerate((a, b, c))]
    recipe = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "base"}
    assert plan(recipe, CPU).warnings == ()
    planned = plan(recipe | {"slices": slices[:2]}, CPU)  # the head of b, in the vocabulary of a
    assert planned.warnings == ()
    assert planned.built.vocabulary is not None


def test_a_model_without_a_tokenizer(make: Make) -> None:
    a, b = make("a"), make("b")
    (b / "tokenizer.json").unlink()
    for more in ({}, {"tokenizer_source": "base"}):
        (warning,) = plan(linear(a, b, **more), CPU).warnings
        assert f"{b} has no tokenizer files" in warning
    with pytest.raises(CheckpointError, match="b has no tokenizer files, .* Take the tokenizer from a model that has"):
        plan(linear(a, b, tokenizer_source=str(b)), CPU)


def test_an_embedding_that_no_model_has_is_an_error(make: Make) -> None:
    a = make("a")
    for source, problem in (
        ("other", "other is not a model of this merge that has embeddings"),
        ({"kind": "model_token", "model": str(a), "token": "x"}, f"{a} has no token 'x' with an embedding"),
        ({"kind": "model_token", "model": str(a), "token_id": 99}, f"row 99 is beyond the 64 rows of {a}"),
    ):
        tokenizer = {"source": "base", "tokens": {"word1": {"source": source}}}
        with pytest.raises(RecipeError, match=rf"tokenizer\.tokens\.word1: {problem}: write a model that has it, or"):
            plan(linear(a, tokenizer=tokenizer), CPU)


# ------------------------------------------------------------------------------------------------ chat templates


def templates(out: Path) -> tuple[str | None, str | None]:
    """The template in a file of its own, and that of tokenizer_config.json."""
    file = out / "chat_template.jinja"
    return (
        file.read_text() if file.exists() else None,
        json.loads((out / "tokenizer_config.json").read_text()).get("chat_template"),
    )


def test_a_chat_template_by_name_and_as_text(tmp_path: Path, make: Make) -> None:
    transformers = pytest.importorskip("transformers")
    model = make("model", template="{{ old }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ old }}")
    for number, (text, expected) in enumerate(
        {"mistral": BUILT_IN["mistral"][0], "{{ 'x' }}\n": "{{ 'x' }}\n"}.items()
    ):
        merge(linear(model, chat_template=text), out := tmp_path / str(number), CPU)
        assert templates(out) == (expected, expected)
        assert owner(out, "tokenizer_config.json") == "model"
        assert not (out / "additional_chat_templates").exists()
        assert transformers.AutoTokenizer.from_pretrained(out).chat_template == expected
    merge(linear(model), tmp_path / "plain", CPU)
    assert templates(tmp_path / "plain") == (None, "{{ old }}")
    assert (tmp_path / "plain" / "additional_chat_templates" / "tools.jinja").exists()


def test_the_commonest_template_is_taken(tmp_path: Path, make: Make) -> None:
    a, b, c, d = (make(name, template=text) for name, text in zip("abcd", ("A", "B", "B\n", None), strict=True))
    merge(linear(a, b, c, d, chat_template="auto"), tmp_path / "most", CPU)
    assert templates(tmp_path / "most") == ("B", "B")
    merge(linear(d, a, b, chat_template="auto"), tmp_path / "tie", CPU)
    assert templates(tmp_path / "tie") == ("A", "A")
    merge(linear(b, a, c, chat_template="auto"), tmp_path / "own", CPU)
    assert templates(tmp_path / "own") == (None, "B")  # it has it already: the file is as it was
    planned = plan(linear(d, chat_template="auto"), CPU)
    assert "none of the models has a chat template" in " ".join(planned.warnings)


def test_what_is_odd_about_a_template_is_said(make: Make) -> None:
    model = make("model")
    (warning,) = plan(linear(model, chat_template="chatml"), CPU).warnings
    assert "needs the tokens <|im_start|>, <|im_end|>, which are not in the vocabulary of" in warning
    with pytest.raises(RecipeError, match="chat_template: invalid Jinja template: line 1"):
        plan(linear(model, chat_template="{{ messages"), CPU)
    for file in model.glob("*token*.json"):
        file.unlink()
    (warning,) = plan(linear(model, chat_template="chatml"), CPU).warnings
    assert "has no tokenizer files: no chat template is written" in warning


# ------------------------------------------------------------------------------------------------ stages


def through_disk(tmp_path: Path, first: dict[str, Any], second: Callable[[str], dict[str, Any]]) -> tuple[Path, Path]:
    """Two stages as one recipe, and one after the other."""
    merge([first | {"name": "middle"}, second("middle")], tmp_path / "once", CPU)  # type: ignore[arg-type]
    merge(first, tmp_path / "middle", CPU)
    merge(second(str(tmp_path / "middle")), tmp_path / "twice", CPU)
    return tmp_path / "once", tmp_path / "twice"


@pytest.mark.parametrize("number", range(6))
def test_a_stages_files_are_those_that_it_would_have_on_disk(number: int, tmp_path: Path, make: Make) -> None:
    kinds = [f"kind_{layer}" for layer in range(4)]
    a, b = make("a", layer_types=kinds), make("b", rope_theta=7.0, template="B", layer_types=kinds[::-1])
    plain, files = {"dtype": "bfloat16"}, {"files_from": str(b)}
    first, second = [
        (plain, plain),
        (files, plain),
        (plain, files),
        ({"chat_template": "{{ c }}"}, {"dtype": "float16"}),
        ({"tokenizer_source": str(b)}, {"chat_template": "auto"}),
        ({"chat_template": "{{ c }}", **files}, {"tokenizer_source": "base", "files_from": str(a)}),
    ][number]
    once, twice = through_disk(
        tmp_path, stack(a, (0, 3), (1, 4), **first), lambda middle: stack(middle, (0, 4), (2, 6), **second)
    )
    theirs = digests(twice)
    assert {name: found for name, found in digests(once).items() if found != theirs.get(name)}.keys() <= {
        "README.md",
        "mergekit_config.yml",
        "mergeloom.json",
        *(["config.json"] if number in (2, 5) else []),
    }
    if number in (2, 5):  # through disk nobody knows any more which layers of the named model they were
        kinds = json.loads((once / "config.json").read_text())["layer_types"]
        assert kinds == [config_of(b if number == 2 else a)["layer_types"][n] for n in (0, 1, 2, 1, 2, 1, 2, 3)]


def test_files_from_a_stage(tmp_path: Path, make: Make) -> None:
    a, b = make("a"), make("b", rope_theta=7.0)
    first = linear(a, b, base_model=str(b), chat_template="{{ c }}") | {"name": "middle"}
    merge([first, stack(a, (0, 2), files_from="middle")], tmp_path / "out", CPU)  # type: ignore[arg-type]
    out = tmp_path / "out"
    assert config_of(out)["rope_theta"] == 7.0
    assert config_of(out)["num_hidden_layers"] == 2
    assert templates(out) == ("{{ c }}", "{{ c }}")
    assert owner(out, "generation_config.json") == "b"
