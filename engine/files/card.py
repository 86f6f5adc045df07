"""The model card: the output's README.md, with metadata for the Hub and the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from ...io.units import big_number

_ADDRESS = "https://huggingface.co"
_SPECIAL = re.compile(r"[\\`*\[\]<>|~&$]|(?<!\w)_|_(?!\w)")
"""Characters with a meaning in Markdown; an underscore within a word has none."""


@dataclass(frozen=True, slots=True)
class CardModel:
    """An input model of the merge.

    Args:
        path: Hub id or directory, as written in the recipe.
        local: name to show for a directory; None if `path` is a Hub id.
        revision: branch, tag or commit of the Hub repository, or None.
        license_name: Hub identifier of its license, or None if it is not known.
    """

    path: str
    local: str | None = None
    revision: str | None = None
    license_name: str | None = None

    @property
    def name(self) -> str:
        """The displayed name: the Hub id, or the published name of the directory."""
        return self.path if self.local is None else self.local


@dataclass(frozen=True, slots=True)
class CardMethod:
    """A merge method of the recipe.

    Args:
        name: name in the recipe.
        paper: URL of the publication, or None.
    """

    name: str
    paper: str | None = None


def model_card(
    *,
    name: str,
    methods: Sequence[CardMethod],
    models: Sequence[CardModel],
    recipe: str,
    command: str,
    versions: Mapping[str, str],
    layers: int,
    parameters: int,
    dtype: str,
    base_model: CardModel | None = None,
    library_name: str | None = "transformers",
) -> str:
    """The text of README.md. It depends only on the arguments and contains no dates.

    Args:
        name: title, such as the name of the output directory.
        methods: merge methods in the order of the stages.
        models: input models in recipe order, without duplicates.
        recipe: recipe in the form to show.
        command: command that repeats the merge with the recipe in ``mergekit_config.yml``.
        versions: version of each program by its name, mergeloom's first.
        layers: number of layers in the output; 0 to omit the row.
        parameters: number of elements in all output tensors.
        dtype: torch name of the output dtype, or several names separated by commas.
        base_model: base model, or None.
        library_name: library that loads the output, or None.
    """
    import yaml

    inputs = list(dict.fromkeys((*([base_model] if base_model else []), *models)))
    front = yaml.safe_dump(_metadata(inputs, library_name), sort_keys=False, allow_unicode=True, width=1000)
    distinct = list(dict.fromkeys(methods))
    plural = "method" if len(distinct) == 1 else "methods"
    base = f", with {_link(base_model)} as the base model" if base_model else ""
    rows = [("Layers", f"{layers:,}")] if layers else []
    rows += [("Parameters", big_number(parameters)), ("dtype", dtype), ("License", _licenses(inputs))]
    rows += [(program, version) for program, version in versions.items()]
    is_local = any(model.local is not None for model in inputs)
    places = " and the local models under the names that it uses" if is_local else ""
    parts = [
        f"---\n{front}---",
        f"# {_escaped(name)}",
        "A merge of pretrained models, made with mergeloom "
        f"{next(iter(versions.values()))} by the merge {plural} {' and '.join(map(_method, distinct))}{base}.",
        "## Models merged",
        "\n".join(f"- {_link(model)}" for model in dict.fromkeys(models)),
        "## Details",
        "\n".join(["| | |", "|---|---|", *(f"| {_escaped(key)} | {_escaped(value)} |" for key, value in rows)]),
        "## Recipe",
        _fenced(recipe.strip("\n"), "yaml"),
        f"To repeat the merge, with this recipe in `mergekit_config.yml`{places}:",
        _fenced(command, "bash"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(inputs: Sequence[CardModel], library_name: str | None) -> dict[str, object]:
    """The front matter that the Hub reads. Only Hub ids are base models there."""
    parents = list(dict.fromkeys(model.path for model in inputs if model.local is None))
    metadata: dict[str, object] = {"base_model": parents, "base_model_relation": "merge"} if parents else {}
    metadata |= {} if library_name is None else {"library_name": library_name}
    metadata["tags"] = ["merge", "mergeloom"]
    known = {model.license_name for model in inputs if model.license_name}
    if len(known) == 1 and all(model.license_name for model in inputs):
        metadata["license"] = known.pop()
    elif known:
        metadata["license"] = "other"
    return metadata


def _licenses(inputs: Sequence[CardModel]) -> str:
    """The license that all models share, or else the list of their licenses."""
    names = {model.license_name for model in inputs}
    if len(names) == 1:
        return names.pop() or "not stated by the models"
    return ", ".join(f"{model.name}: {model.license_name or 'not stated'}" for model in inputs)


def _method(method: CardMethod) -> str:
    return f"{_code(method.name)} ([paper]({method.paper}))" if method.paper else _code(method.name)


def _link(model: CardModel) -> str:
    """A model in Markdown: a link to the Hub or the name of a directory."""
    if model.local is not None:
        return _code(model.local)
    at = f" at {_code(model.revision)}" if model.revision else ""
    return f"[{_escaped(model.path)}]({_ADDRESS}/{quote(model.path)}){at}"


def _one_line(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _escaped(text: str) -> str:
    """Text from a name, in one line, without a meaning in Markdown or HTML."""
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", _one_line(text))


def _code(text: str) -> str:
    """A code span, delimited by more backticks than the text has in a row."""
    text = _one_line(text)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _fenced(text: str, language: str) -> str:
    """A code block, delimited by more backticks than the text has in a row."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`{3,}", text)), 0)
    return f"{fence}{language}\n{text}\n{fence}"
