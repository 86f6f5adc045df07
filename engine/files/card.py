"""The model card: README.md of the output, with the metadata that the Hub knows and the recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...io.units import big_number
from ...version import __version__

_ADDRESS = "https://huggingface.co"
# An absolute path with at least one directory in it; not what follows a URL's colon or a closing tag's bracket.
_ABSOLUTE = re.compile(r"(?<![\w:/<.~$%-])~?/(?:[\w.@+-]+/)+([\w.@+-]*)")


@dataclass(frozen=True, slots=True)
class CardModel:
    """A model that went into the merge.

    Args:
        path: a Hub id or a directory, as the recipe has it.
        local: whether it is a directory. Only its last component is shown.
        revision: a branch, tag or commit of the Hub's repository, or None.
    """

    path: str
    local: bool = False
    revision: str | None = None

    @property
    def name(self) -> str:
        """What is shown: the id, or the directory's name."""
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
    """The text of a README.md. The same arguments give the same text: no date, and no path of this machine.

    Args:
        name: the title, such as the output directory's name.
        methods: the merge methods, in the order of the stages.
        models: the models that went in, each once, in the recipe's order.
        recipe: the recipe as the user wrote it; local paths in it are cut to their last component.
        layers: how many layers the output has; 0 where it has none, and then none are shown.
        parameters: how many elements its tensors have.
        dtype: torch's name of its dtype, or several with commas.
        base_model: the base model, or None.
        license_name: the Hub's identifier of the licence; None where it isn't known that all models have it.
        library_name: the library that loads the output.
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
    """A model in Markdown: a link to the Hub, or a directory's name."""
    if model.local:
        return f"`{model.name}`"
    at = f" at `{model.revision}`" if model.revision else ""
    return f"[{model.path}]({_ADDRESS}/{model.path}){at}"


def _without_paths(recipe: str, models: Sequence[CardModel]) -> str:
    """The recipe with every local directory, and any other absolute path, cut to its last component."""
    for model in sorted({m for m in models if m.local and m.path.strip("/")}, key=lambda m: (-len(m.path), m.path)):
        pattern = rf"(?<![\w./~-]){re.escape(model.path.rstrip('/'))}/?(?![\w./-])"
        recipe = re.sub(pattern, model.name.replace("\\", r"\\"), recipe)
    return _ABSOLUTE.sub(lambda match: match[1] or _last_component(match[0]), recipe)


def _last_component(path: str) -> str:
    components = [part for part in path.split("/") if part not in ("", ".", "..", "~")]
    return components[-1] if components else ""
