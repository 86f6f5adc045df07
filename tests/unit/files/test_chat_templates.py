"""Chat templates: the built-in ones make the prompts of their formats, and templates are found wherever they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.files.chat_templates import BUILT_IN, find_template, syntax_error
from mergeloom.engine.files.tokenizer_output import changed_tokenizer_files
from mergeloom.engine.recipe.entries.chat_template import CHAT_TEMPLATES
from mergeloom.errors import CheckpointError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]
TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"

PROMPTS = {
    "alpaca": (
        "<s>{}\n\n### Instruction:\nHello\n\n### Response:\nHi!</s>\n\n### Instruction:\nBye\n\n### Response:\n",
        ("Be brief.", TASK),
    ),
    "chatml": (
        "{}<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n",
        ("<|im_start|>system\nBe brief.<|im_end|>\n", ""),
    ),
    "exaone": (
        "[|system|]{}[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi![|endofturn|]\n[|user|]Bye\n[|assistant|]",
        ("Be brief.", ""),
    ),
    "llama3": (
        "<s>{}"
        + HEADER.format("user")
        + "Hello<|eot_id|>"
        + HEADER.format("assistant")
        + "Hi!<|eot_id|>"
        + HEADER.format("user")
        + "Bye<|eot_id|>"
        + HEADER.format("assistant"),
        (HEADER.format("system") + "Be brief.<|eot_id|>", ""),
    ),
    "mistral": ("<s> [INST] {}Hello [/INST] Hi!</s> [INST] Bye [/INST]", ("Be brief.\n\n", "")),
}
"""What each format's description makes of the chat: with, and without, the system prompt."""


def rendered(template: str, messages: list[dict[str, str]], **more: Any) -> str:
    """A prompt, as transformers renders it."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    arguments: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, **more}
    prompts, _ = utils.render_jinja_template([messages], chat_template=template, **arguments)
    return str(prompts[0])


def test_a_recipe_can_name_the_built_in_ones() -> None:
    assert set(CHAT_TEMPLATES) == set(BUILT_IN) == set(PROMPTS)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name: str) -> None:
    template, tokens = BUILT_IN[name]
    prompt, (told, untold) = PROMPTS[name]
    assert syntax_error(template) is None
    assert rendered(template, CHAT) == prompt.format(told)
    assert rendered(template, CHAT[1:]) == prompt.format(untold)
    assert all(token in template or token in rendered(template, CHAT) for token in tokens)
    whole = rendered(template, CHAT, add_generation_prompt=False)
    assert prompt.format(told).startswith(whole)
    assert rendered(template, [])  # an empty chat is valid


def test_templates_are_found_where_they_stand(tmp_path: Path) -> None:
    def write(name: str, content: object) -> None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    assert find_template(tmp_path) is None
    write("chat_template.json", {"chat_template": "processor"})
    assert find_template(tmp_path) == "processor"
    write("tokenizer_config.json", {"chat_template": None})
    assert find_template(tmp_path) == "processor"
    write("tokenizer_config.json", {"chat_template": "one"})
    assert find_template(tmp_path) == "one"
    several = {"tool_use": "tools", "default": "usual"}
    write("tokenizer_config.json", {"chat_template": several})
    assert find_template(tmp_path) == "usual"
    write(
        "tokenizer_config.json", {"chat_template": [{"name": name, "template": text} for name, text in several.items()]}
    )
    assert find_template(tmp_path) == "usual"
    write("chat_template.jinja", "file")
    assert find_template(tmp_path) == "file"
    write("tokenizer_config.json", "{")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="not valid JSON"):
        find_template(tmp_path)


def test_a_template_goes_wherever_it_is_looked_for(tmp_path: Path) -> None:
    assert changed_tokenizer_files(tmp_path, (), "text") == {"chat_template.jinja": b"text"}
    config = {"unk_token": "très", "chat_template": [{"name": "default", "template": "old"}], "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    files = changed_tokenizer_files(tmp_path, (), "text")
    assert list(json.loads(files["tokenizer_config.json"]).items()) == list(
        (config | {"chat_template": "text"}).items()
    )
    assert files["chat_template.jinja"] == b"text"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages }}", None),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}", None),
        ("{% generation %}{{ messages[0] }}{% endgeneration %}", None),
        ("{{ raise_exception('no') }}{{ strftime_now('%d') }}{{ tools | tojson(indent=4) }}", None),
        ("a\n{% for m in messages %}", "line 2"),
        ("{{ messages", "line 1"),
    ],
)
def test_mistakes_in_a_text(template: str, problem: str | None) -> None:
    found = syntax_error(template)
    assert found is None if problem is None else found is not None and found.startswith(problem)
