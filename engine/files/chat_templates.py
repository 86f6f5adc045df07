"""Chat templates: the built-in ones, which one a model has, and putting one into a tokenizer's files.

A template is a Jinja text that turns a list of messages into a prompt, as transformers renders it: with ``messages``,
``add_generation_prompt`` and the special tokens (``bos_token``, ``eos_token``) at hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...io.small_files import read_json, read_small

FILE = "chat_template.jinja"
"""Where transformers looks first. Older versions only know the key `chat_template` of tokenizer_config.json."""
CONFIG = "tokenizer_config.json"
REPLACED = re.compile(r"chat_template\.(?:jinja|json)|(?:additional_)?chat_templates/.*")
"""The files of a tokenizer that another template takes the place of."""

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
"""The templates that a recipe can name, and the tokens that each needs in the vocabulary.

Written from the formats' own descriptions: Stanford Alpaca's README, OpenAI's ChatML, the model cards of EXAONE 3 and
Llama 3, and Mistral's page on tokenizers (V1: the system prompt goes before the next instruction)."""


def find_template(directory: Path) -> str | None:
    """The chat template of the tokenizer in a model's directory; of several the default one. None where it has none.

    Raises:
        CheckpointError: where a file that may hold it can't be read.
    """
    file = directory / FILE
    if file.is_file():
        return read_small(file).decode(errors="replace")
    for name in (CONFIG, "chat_template.json"):
        content = read_json(directory / name)
        found = _default(content.get("chat_template")) if isinstance(content, dict) else None
        if found is not None:
            return found
    return None


def _default(found: Any) -> str | None:
    """The template among what a tokenizer_config.json has: a text, or several by name or as a list with names."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) and found.strip() else None


def with_template(directory: Path, template: str) -> dict[str, bytes]:
    """The files of a tokenizer that another template changes, by name: chat_template.jinja, and the configuration.

    The template stands in both: versions of transformers differ in which they read.
    """
    files = {FILE: template.encode()}
    config = read_json(directory / CONFIG)
    if isinstance(config, dict):
        changed = {**config, "chat_template": template}
        files[CONFIG] = (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode(errors="surrogatepass")
    return files


def syntax_error(template: str) -> str | None:
    """What is wrong with a Jinja text, and in which line; None where nothing is, or there is no Jinja to ask."""
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.nodes import Node
        from jinja2.parser import Parser
    except ImportError:
        return None

    class Generation(Extension):
        """transformers' own ``{% generation %}``, which marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja's own extensions have it

        def parse(self, parser: Parser) -> Node | list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=False).parse(template)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None
