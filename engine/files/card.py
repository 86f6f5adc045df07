"""The model card: the output's README.md, with metadata for the Hub and the recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...io.wording import big_number
from ...version import __version__

_ADDRESS = "https://huggingface.co"
# Matches an absolute path with at least one directory, but not the rest of a URL or a closing tag.
_ABSOLUTE = re.compile(r"(?<![\w:/<.~$%-])~?/(?:[\w.@+-]+/)+([\w.@+-]*)")


@dataclass(frozen=True, slots=True)
class CardModel:
    """An input model of the merge.

    Args:
        path: Hub id or directory, as written in the recipe.
        local: whether `path` is a directory, of which only the last component is shown.
        revision: branch, tag or commit of the Hub repository, or None.
    """

    path: str
    local: bool = False
    revision: str | None = None

    @property
    def name(self) -> str:
        """The displayed name: the Hub id, or the last component of the directory."""
        if not self.local:
            return self.path
        return _last_component(self.path) or "model"


def model_card(
    *,
    name: str,
    methods: Sequence[str],
    models: Sequence[CardModel],
    recipe: str,
    layers: int,
    parameters: int,
    dtype: str,
    base_model: CardModel | None = None,
    license_name: str | None = None,
    library_name: str = "transformers",
) -> str:
    """The text of README.md. It depends only on the arguments and contains no dates and no local paths.

    Args:
        name: title, such as the name of the output directory.
        methods: merge methods in the order of the stages.
        models: input models in recipe order, without duplicates.
        recipe: recipe as written by the user; local paths in it are shortened to their last component.
        layers: number of layers in the output; 0 to omit the row.
        parameters: number of elements in all output tensors.
        dtype: torch name of the output dtype, or several names separated by commas.
        base_model: base model, or None.
        license_name: Hub identifier of the license that all models have, or None if it is not known.
        library_name: library that loads the output.
    """
    import yaml

    shown = list(dict.fromkeys(model.name for model in (*([base_model] if base_model else []), *models)))
    metadata: dict[str, object] = {"base_model": shown} if shown else {}
    metadata |= {"base_model_relation": "merge", "library_name": library_name, "tags": ["mergeloom", "merge"]}
    if license_name is not None:
        metadata["license"] = license_name
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    plural = "method" if len(set(methods)) == 1 else "methods"
    method_names = " and ".join(f"`{method}`" for method in dict.fromkeys(methods))
    base = f", with {_link(base_model)} as the base model" if base_model else ""
    rows = [("Layers", f"{layers:,}")] if layers else []
    rows += [("Parameters", big_number(parameters)), ("dtype", dtype)]
    text = _without_paths(recipe, [*models, *([base_model] if base_model else [])]).strip("\n")
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`{3,}", text)), 0)
    parts = [
        f"---\n{front}---",
        f"# {' '.join(name.split())}",
        f"A merge of pretrained models, made with mergeloom {__version__} by the merge {plural} {method_names}{base}.",
        "## Models merged",
        "\n".join(f"- {_link(model)}" for model in dict.fromkeys(models)),
        "## Numbers",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]),
        "## Recipe",
        f"{fence}yaml\n{text}\n{fence}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _link(model: CardModel) -> str:
    """A model in Markdown: a link to the Hub or the name of a directory."""
    if model.local:
        return f"`{model.name}`"
    at = f" at `{model.revision}`" if model.revision else ""
    return f"[{model.path}]({_ADDRESS}/{model.path}){at}"


def _without_paths(recipe: str, models: Sequence[CardModel]) -> str:
    """Shorten each local directory and any other absolute path in the recipe to its last component."""
    for model in sorted({m for m in models if m.local and m.path.strip("/")}, key=lambda m: (-len(m.path), m.path)):
        pattern = rf"(?<![\w./~-]){re.escape(model.path.rstrip('/'))}/?(?![\w./-])"
        recipe = re.sub(pattern, model.name.replace("\\", r"\\"), recipe)
    return _ABSOLUTE.sub(lambda match: match[1] or _last_component(match[0]), recipe)


def _last_component(path: str) -> str:
    components = [part for part in path.split("/") if part not in ("", ".", "..", "~")]
    return components[-1] if components else ""
