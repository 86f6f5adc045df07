"""Chat templates: the built-in ones, finding the template of a model, and inserting one into tokenizer files.

A chat template is a Jinja template that transformers renders to a prompt, with the variables ``messages``,
``add_generation_prompt`` and the special tokens (``bos_token``, ``eos_token``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...io.small_files import read_json, read_small

FILE = "chat_template.jinja"
"""The file that transformers reads first. Older versions only read `chat_template` in tokenizer_config.json."""
CONFIG = "tokenizer_config.json"
REPLACED = re.compile(r"chat_template\.(?:jinja|json)|(?:additional_)?chat_templates/.*")
"""The tokenizer files that another template replaces."""

_ALPACA = """\
{%- set preamble = 'Below is an instruction that describes a task. Write a response that appropriately completes the \
request.' %}
{%- if messages and messages[0].role == 'system' %}{% set preamble = messages[0].content %}{% endif %}
{{- bos_token }}{{ preamble }}{{ '\\n\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'assistant' %}
        {{- '### Response:\\n' ~ message.content ~ eos_token ~ '\\n\\n' }}
    {%- else %}
        {{- '### Instruction:\\n' ~ message.content ~ '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}
"""

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

_EXAONE = """\
{%- if messages and messages[0].role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}
{%- for message in messages %}
    {{- '[|' ~ message.role ~ '|]' ~ message.content }}
    {%- if message.role != 'user' %}{{ '[|endofturn|]' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

_MISTRAL = """\
{%- set told = namespace(text='') %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set told.text = message.content ~ '\\n\\n' %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- else %}
        {{- ' [INST] ' ~ told.text ~ message.content ~ ' [/INST]' }}
        {%- set told.text = '' %}
    {%- endif %}
{%- endfor %}
"""

BUILT_IN: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "alpaca": (_ALPACA, ()),
    "chatml": (_CHATML, ("<|im_start|>", "<|im_end|>")),
    "exaone": (_EXAONE, ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]")),
    "llama3": (_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": (_MISTRAL, ()),
}
"""The templates that a recipe can name, and the tokens that each requires in the vocabulary.

They follow the descriptions of the formats: Stanford Alpaca's README, OpenAI's ChatML, the model cards of EXAONE 3 and
Llama 3, and Mistral's documentation of tokenizers (V1: the system prompt precedes the next instruction)."""


def find_template(directory: Path) -> str | None:
    """The chat template of the tokenizer in a model directory, the default one if there are several, or None.

    Raises:
        CheckpointError: a tokenizer file cannot be read.
    """
    file = directory / FILE
    if file.is_file():
        return read_small(file).decode(errors="replace")
    for name in (CONFIG, "chat_template.json"):
        content = read_json(directory / name)
        template = _default(content.get("chat_template")) if isinstance(content, dict) else None
        if template is not None:
            return template
    return None


def _default(value: Any) -> str | None:
    """The default template in `chat_template`, which is a string, a mapping of names or a list of named templates."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) and value.strip() else None


def syntax_error(template: str) -> str | None:
    """The syntax error of a Jinja template with its line; None if it is valid or if jinja2 is not installed."""
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.nodes import Node
        from jinja2.parser import Parser
    except ImportError:
        return None

    class Generation(Extension):
        """The ``{% generation %}`` tag of transformers, which marks the assistant's messages."""

        tags = {"generation"}  # noqa: RUF012  # as in Jinja's own extensions

        def parse(self, parser: Parser) -> Node | list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=False).parse(template)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None
