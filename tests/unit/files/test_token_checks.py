"""The special tokens that the files of an output state agree, and no token lies beyond the rows of its embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.model.warnings import ModelWarning, ModelWarningKind
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.models.tokenizers import update_json, write_vocabulary

CPU = Options(device="cpu", threads=1)
STRICT = Options(device="cpu", threads=1, strict=True)
WORDS = ["<unk>", "<s>", "</s>", *(f"word{row}" for row in range(3, 58))]
ADDED = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<pad>"]
"""Rows 58 to 63."""
Make = Callable[..., Path]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(name, config, generation, words, added, **tokenizer)``: a model with 64 rows, bos 1 and eos 2."""

    def make(
        name: str,
        config: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
        words: Sequence[str] = WORDS,
        added: Sequence[str] = ADDED,
        **special: str,
    ) -> Path:
        model = tiny_llama()
        directory = write_checkpoint(
            tmp_path / name, model, fill=sum(name.encode()), config=model.config | (config or {})
        )
        if generation is not None:
            update_json(directory / "generation_config.json", **generation)
        return write_vocabulary(directory, words, added, **special)

    return make


def linear(*models: Path, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": entries, **more}


def warnings_of(recipe: Any) -> list[ModelWarning]:
    found = [finding for finding in plan(recipe, CPU).findings if isinstance(finding, ModelWarning)]
    assert all(finding.kind is ModelWarningKind.TOKENS for finding in found)
    return found


# ------------------------------------------------------------------------------------------------ the output's files


@pytest.mark.parametrize("role", ["eos", "bos", "pad"])
def test_files_that_disagree_about_a_token(role: str, make: Make) -> None:
    key = f"{role}_token_id"
    model = make("model", {key: 2}, {key: 59}, **{f"{role}_token": "<|eot_id|>"})
    (found,) = warnings_of(linear(model))
    assert found.names == (key,)
    assert found.problem == (
        f"the output's files disagree about {key}: 59 in generation_config.json, 2 in config.json, "
        "60 in the tokenizer ('<|eot_id|>')"
    )
    with pytest.raises(CheckpointError, match=f"strict mode treats as errors:\n.*disagree about {key}"):
        plan(linear(model), STRICT)


@pytest.mark.parametrize(
    ("config", "generation", "special"),
    [
        ({"eos_token_id": 60}, {"eos_token_id": [62, 60]}, {"eos_token": "<|eot_id|>"}),  # Llama 3
        ({"eos_token_id": [60, 62]}, {"eos_token_id": [62, 60]}, {"eos_token": "<|endoftext|>"}),
        ({"eos_token_id": None}, {"eos_token_id": [2, 59]}, {"eos_token": {"content": "</s>", "special": True}}),
        ({"eos_token_id": 2, "pad_token_id": -1}, {"eos_token_id": 2}, {"eos_token": "</s>", "pad_token": "<pad>"}),
        ({"bos_token_id": 1}, None, {"bos_token": None}),  # Qwen's tokenizers have no bos
        ({"eos_token_id": 2}, {}, {"eos_token": "not in the vocabulary"}),
    ],
)
def test_files_that_agree(config: Any, generation: Any, special: Any, make: Make) -> None:
    assert plan(linear(make("model", config, generation, **special)), STRICT).warnings == ()


def test_generation_config_follows_the_tokenizer(tmp_path: Path, make: Make) -> None:
    base = make("base", {"eos_token_id": None}, {"eos_token_id": 2}, eos_token="</s>")
    chat = make("chat", {"eos_token_id": None}, {"eos_token_id": [59, 2]}, eos_token="<|im_end|>")
    merge(linear(base, chat, tokenizer_source=str(chat)), tmp_path / "out", STRICT)
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (chat / "generation_config.json").read_bytes()


# ------------------------------------------------------------------------------------------------ the inputs


@pytest.mark.parametrize("role", ["eos", "bos", "pad"])
def test_models_that_differ_in_a_token(role: str, make: Make) -> None:
    key = f"{role}_token_id"
    a, b, c = make("a", {key: 2}), make("b", {key: 1}, {key: [59, 60]}), make("c", {key: 2})
    (found,) = warnings_of(linear(a, b, c))
    assert found.problem == f"{key} differs between the models: 2 in {a}, {c}; 59 or 60 in {b}"
    assert found.names == (key,)


def test_models_whose_end_tokens_contain_each_other(make: Make) -> None:
    base = make("base", {"eos_token_id": 62}, {"eos_token_id": 62}, eos_token="<|endoftext|>")
    chat = make("chat", {"eos_token_id": 59}, {"eos_token_id": [59, 62]}, eos_token="<|im_end|>")
    silent = make("silent", {"eos_token_id": None, "bos_token_id": None})
    assert plan(linear(chat, base, silent), STRICT).warnings == ()
    (found,) = warnings_of(linear(base, chat, silent))  # the output would stop at <|endoftext|> only
    assert found.problem == f"eos_token_id differs between the models: 62 in {base}, 59 or 62 in {chat}"
    assert found.advice == (
        "generation may not stop, or stop too early, since the output uses 62: set `tokenizer_source` to the model "
        "whose tokenizer and generation_config.json are right"
    )


def llama(make: Make) -> tuple[Path, Path]:
    """A model and its fine-tune for chat, whose files state the end tokens as Llama 3's do."""
    base = make("base", {"eos_token_id": 62}, {"eos_token_id": 62}, eos_token="<|endoftext|>")
    chat = make("chat", {"eos_token_id": 60}, {"eos_token_id": [62, 60]}, eos_token="<|eot_id|>", chat_template=LLAMA)
    return base, chat


def test_a_base_that_lacks_the_end_token_of_its_fine_tune(tmp_path: Path, make: Make) -> None:
    base, chat = llama(make)
    recipe = linear(base, chat, base_model=str(base))
    (found,) = warnings_of(recipe)
    assert f"62 in {base}, 60 or 62 in {chat}" in found.problem
    assert found.names == ("eos_token_id",)
    (found,) = warnings_of(recipe | {"tokenizer_source": "union"})  # does not choose a model
    assert f"62 in {base}, 60 or 62 in {chat}" in found.problem
    for more in ({"tokenizer_source": str(chat)}, {"tokenizer_source": "base"}, {"files_from": str(chat)}):
        assert plan(recipe | more, STRICT).warnings == ()
    merge(recipe | {"tokenizer_source": str(chat)}, tmp_path / "out", STRICT)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [62, 60]


def test_a_missing_end_of_documents(make: Make) -> None:
    """Qwen's models for chat list <|endoftext|> in addition to the token that ends their answers."""
    tune = make("tune", {"eos_token_id": 59}, eos_token="<|im_end|>")
    chat = make("chat", {"eos_token_id": 59}, {"eos_token_id": [59, 62]}, eos_token="<|im_end|>")
    assert plan(linear(tune, chat), STRICT).warnings == ()
    update_json(chat / "generation_config.json", eos_token_id=[59, 62, 60])  # and <|eot_id|>
    assert f"59 in {tune}, 59 or 60 or 62 in {chat}" in warnings_of(linear(tune, chat))[0].problem


def test_gemmas_end_of_turn(make: Make) -> None:
    base = make("base", {}, {"eos_token_id": 2}, eos_token="</s>")
    chat = make("chat", {"eos_token_id": [2, 61]}, {"eos_token_id": [2, 61]}, eos_token="</s>", chat_template=GEMMA)
    assert [found.names for found in warnings_of(linear(base, chat))] == [("eos_token_id",)]
    assert plan(linear(chat, base), STRICT).warnings == ()
    assert plan(linear(base, chat, tokenizer_source=str(chat)), STRICT).warnings == ()


@pytest.mark.parametrize("tokenizer_source", ["base", "tune"])
@pytest.mark.parametrize("role", ["eos", "bos", "pad"])
def test_a_recipe_that_chooses_the_tokenizer_chooses_its_tokens(tokenizer_source: str, role: str, make: Make) -> None:
    key = f"{role}_token_id"
    models = {"base": make("base", {key: 2}), "tune": make("tune", {key: 1}, {key: [1, 2]})}
    recipe = linear(*models.values(), tokenizer_source=str(models[tokenizer_source]))
    assert plan(recipe, STRICT).warnings == ()


def test_config_json_follows_the_tokenizer(tmp_path: Path, make: Make) -> None:
    """Without it, the warning about the base's end token would be followed by one about the output's config.json."""
    base = make("base", {"eos_token_id": 2, "text_config": {"eos_token_id": 2}}, {"eos_token_id": 2}, eos_token="</s>")
    chat = make("chat", {"eos_token_id": 59, "pad_token_id": 63}, {"eos_token_id": 59}, eos_token="<|im_end|>")
    recipe = linear(base, chat, base_model=str(base))
    assert [found.names for found in warnings_of(recipe)] == [("eos_token_id",)]
    merge(recipe | {"tokenizer_source": str(chat)}, tmp_path / "out", STRICT)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")] == [59, 1, 63]
    assert config["text_config"] == {"eos_token_id": 59}
    for text in ("union", "base", str(base)):
        merge(recipe | {"tokenizer_source": text}, tmp_path / "kept", CPU)
        config = json.loads((tmp_path / "kept" / "config.json").read_text())
        assert config["eos_token_id"] == 2
        assert "pad_token_id" not in config
        shutil.rmtree(tmp_path / "kept")


def test_a_fine_tune_that_states_only_the_end_token_of_its_template(make: Make) -> None:
    _, chat = llama(make)
    tune = make("tune", {"eos_token_id": 60}, eos_token="<|eot_id|>", chat_template=LLAMA)
    assert plan(linear(tune, chat), STRICT).warnings == ()
    assert plan(linear(chat, tune), STRICT).warnings == ()


def test_a_model_whose_tokenizer_alone_states_its_end_token(make: Make) -> None:
    a, b = make("a", {"eos_token_id": 2}), make("b", {"eos_token_id": None}, eos_token="<end_of_turn>")
    (found,) = warnings_of(linear(a, b))
    assert f"eos_token_id differs between the models: 2 in {a}, 61 in {b}" in found.problem


def test_fine_tunes_as_they_are_published(make: Make) -> None:
    published = {"transformers_version": "4.40.0", "torch_dtype": "bfloat16", "use_cache": True}
    trained = {"transformers_version": "4.57.1", "torch_dtype": "float32", "use_cache": False, "_name_or_path": "/x"}
    a = make("a", published, {"eos_token_id": 2, "temperature": 0.6}, eos_token="</s>", bos_token="<s>")
    b = make("b", trained, {"eos_token_id": [2, 59], "do_sample": True}, eos_token="</s>", padding_side="left")
    for recipe in (linear(b, a), linear(a, b, tokenizer_source="union", base_model=str(b))):
        assert plan(recipe, STRICT).warnings == ()
    assert [found.names for found in warnings_of(linear(a, b))] == [("eos_token_id",)]  # the output would lack 59
    update_json(b / "tokenizer_config.json", chat_template="{{ m }}{{ eos_token }}")  # it ends messages with </s>
    assert plan(linear(a, b), STRICT).warnings == ()


# ------------------------------------------------------------------------------------------------ the chat template

GEMMA = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
LLAMA = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
)
QWEN = CHATML + "{% if tools %}<tool_call></tool_call><think></think>{% endif %}"


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, 59), (GEMMA, 61), (LLAMA, 60), (QWEN, 59), ("{{ m }}[|endofturn|]", None)]
)
def test_a_template_whose_end_token_does_not_stop_generation(template: str, end: int | None, make: Make) -> None:
    model = make("model", {}, {"eos_token_id": 2}, chat_template=template)
    (found,) = warnings_of(linear(model))
    assert "which is not an end token of the output: eos_token_id is 2 in generation_config.json" in found.problem
    assert len(found.names) == 1
    assert found.names[0] in template
    if end is not None:
        update_json(model / "generation_config.json", eos_token_id=[2, end])
        assert plan(linear(model), STRICT).warnings == ()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}<|end|>",
        "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>",  # GLM-4
        "{% for m in messages %}[INST] {{ m.content }}</s>{% endfor %}",
    ],
)
def test_templates_that_fit(template: str, make: Make) -> None:
    assert plan(linear(make("model", eos_token="</s>", chat_template=template)), STRICT).warnings == ()


def test_a_template_from_a_file_or_the_recipe(make: Make) -> None:
    model = make("model")
    assert [found.names for found in warnings_of(linear(model, chat_template="chatml"))] == [("<|im_end|>",)]
    assert [found.names for found in warnings_of(linear(model, chat_template=LLAMA))] == [("<|eot_id|>",)]
    assert warnings_of(linear(model, chat_template="mistral")) == []
    (model / "chat_template.jinja").write_text(GEMMA)
    assert [found.names for found in warnings_of(linear(model))] == [("<end_of_turn>",)]
    stages = [linear(model) | {"name": "first"}, linear(Path("first"), chat_template="mistral")]
    assert warnings_of(stages) == []  # the first stage's files are not written
    stages[0]["save"] = True
    assert [found.names for found in warnings_of(stages)] == [("<end_of_turn>",)]


# ------------------------------------------------------------------------------------------------ ids without a row


def test_added_tokens_beyond_the_rows(make: Make) -> None:
    model, other = make("model", added=[*ADDED, "<x>", "<y>"]), make("other", added=[*ADDED, "<x>", "<y>"])
    for recipe in (linear(model, other), linear(model, other, tokenizer_source="base"), linear(model, tokenizer={})):
        (found,) = warnings_of(recipe)
        assert found.problem == (
            f"the tokenizer of {model} has tokens beyond the 64 rows of the output's embeddings: '<x>' (64), '<y>' (65)"
        )
        assert "resize_token_embeddings" in found.advice
        assert found.names == ("<x>", "<y>")


@pytest.mark.parametrize("token", ["<image_soft_token>", "<|video_pad|>", "<Audio>"])
def test_a_token_of_another_input_beyond_the_rows(token: str, make: Make) -> None:
    """Gemma 3's models for text have 262,144 rows and the token <image_soft_token> 262144."""
    a, b = make("a", added=[*ADDED, token]), make("b", added=[*ADDED, token])
    assert plan(linear(a, b), STRICT).warnings == ()
    assert plan(linear(a, b, tokenizer_source=str(b)), STRICT).warnings == ()
    model = tiny_llama(vocabulary=66)
    with_row = write_checkpoint(make("c", model.config, added=[*ADDED, token]), model, fill=3)
    with pytest.raises(CheckpointError, match=r"c has tokens beyond the 64 rows .*\(64\); take the tokenizer from"):
        plan(linear(make("d"), tokenizer_source=str(with_row)), CPU)  # the merge loses the row


def test_other_tokens_beyond_the_rows(make: Make) -> None:
    model = make("model", words=[f"word{row}" for row in range(71)], added=())
    (found,) = warnings_of(linear(model))
    assert "'word64' (64), 'word65' (65), 'word66' (66), 'word67' (67), 'word68' (68) and 2 more" in found.problem
    assert len(found.names) == 7
    fits = make("fits", words=[f"word{row}" for row in range(64)], added=())
    assert plan(linear(fits), STRICT).warnings == ()


def larger(make: Make, name: str) -> Path:
    """A model with 66 rows, and a tokenizer that uses them all."""
    model = tiny_llama(vocabulary=66)
    directory = make(name, model.config, added=[*ADDED, "<x>", "<y>"])
    return write_checkpoint(directory, model, fill=3)


def test_tokens_that_the_merge_leaves_without_a_row(make: Make) -> None:
    small, large = make("small"), larger(make, "large")
    for more in ({"tokenizer_source": str(large)}, {"files_from": str(large)}):
        recipe = linear(small, allow_vocabulary_mismatch=False, **more)
        with pytest.raises(
            CheckpointError, match=r"large has tokens beyond the 64 rows .*: '<x>' \(64\), '<y>' \(65\)"
        ):
            plan(recipe, CPU)
        *_, found = plan(recipe | {"allow_vocabulary_mismatch": True}, CPU).findings
        assert "beyond the 64 rows" in str(found)
        assert str(found).endswith("; take the tokenizer from a model whose embeddings are merged")
    assert plan(linear(large), STRICT).warnings == ()


@pytest.mark.parametrize("key", ["pad_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_stated_ids_beyond_the_rows(key: str, file: str, make: Make) -> None:
    model = make("model", {"eos_token_id": None})
    update_json(model / file, **{key: 64, "image_token_id": 70, "sep_token_id": 63, "mask_token_id": -1})
    (found,) = warnings_of(linear(model))
    assert found.problem == f"{file} of {model} names tokens beyond the 64 rows of the output's embeddings: {key} 64"
    assert found.names == (key,)


def test_stated_ids_of_a_nested_section_and_in_lists(make: Make) -> None:
    model = make("model", {"text_config": {"pad_token_id": 99}, "vision_config": {"pad_token_id": 99}})
    update_json(model / "generation_config.json", eos_token_id=[2, 64, 65])
    assert [found.problem.rpartition(": ")[2] for found in warnings_of(linear(model))] == [
        "pad_token_id 99",
        "eos_token_id 64 or 65",
    ]


def test_stated_ids_that_the_merge_leaves_without_a_row(make: Make) -> None:
    small, large = make("small"), larger(make, "large")
    write_vocabulary(large, WORDS, ADDED)
    update_json(large / "config.json", pad_token_id=65)
    with pytest.raises(CheckpointError, match=r"config\.json of .*large names tokens beyond .*: pad_token_id 65; take"):
        plan(linear(small, files_from=str(large)), CPU)
    update_json(large / "config.json", vocab_size=64)
    (found,) = warnings_of(linear(small, files_from=str(large)))
    assert "correct config.json" in found.advice


# ------------------------------------------------------------------------------------------------ odd files


@pytest.mark.parametrize("value", [True, "2", 1.5, [None, "x"], {"a": 1}, [], -1])
def test_values_that_are_not_ids_state_nothing(value: Any, make: Make) -> None:
    model = make("model", {"eos_token_id": value, "pad_token_id": value}, {"eos_token_id": value}, eos_token="</s>")
    update_json(model / "tokenizer_config.json", pad_token=value, bos_token={"content": value})
    assert plan(linear(model), STRICT).warnings == ()


def test_settings_that_are_not_mappings(make: Make) -> None:
    model = make("model")
    for name in ("generation_config.json", "special_tokens_map.json"):
        (model / name).write_text("[1]")
    assert plan(linear(model), STRICT).warnings == ()
