"""The published form of a recipe: what the output's files say about its inputs, without paths of this machine.

A Hub id stays as it is. Of a local directory only the last component remains, or as many as distinguish it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

# Matches an absolute path with at least one directory, but not the rest of a URL or a closing tag.
_ABSOLUTE = r"(?<![\w:/<.~$%-])~?/(?:[\w.@+-]+/)+(?P<last>[\w.@+-]*)"


def published_names(paths: Iterable[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Return the published name of each local path: its last component, or ``model`` if it has none.

    Where last components are equal, the names have as many more of them as it takes to distinguish the paths:
    ``x/tune`` and ``y/tune``. Paths with the same components, such as ``tune`` and ``../tune``, become ``tune`` and
    ``tune#2``. Spellings of one path, such as ``tune`` and ``./tune``, share a name.

    Args:
        paths: directories and files that a recipe names as models, in its order.
        taken: names with another meaning in the recipe: Hub ids and stages.
    """
    keys = {path: os.path.normpath(os.path.expanduser(path)) for path in paths}  # noqa: PTH111  never raises
    components = {key: _components(key) or ["model"] for key in keys.values()}
    lengths = dict.fromkeys(components, 1)

    def tails() -> dict[str, str]:
        return {key: "/".join(components[key][-length:]) for key, length in lengths.items()}

    while True:
        counts = Counter([*tails().values(), *taken])
        short = [key for key, tail in tails().items() if counts[tail] > 1 and lengths[key] < len(components[key])]
        if not short:
            break
        for key in short:
            lengths[key] += 1
    last = tails()
    names: dict[str, str] = {}
    used = set(taken)
    # a path of one component keeps its name: as a word, it may occur in the recipe with another meaning
    for key in sorted(components, key=lambda key: key != last[key]):
        numbered = (last[key] if number == 1 else f"{last[key]}#{number}" for number in itertools.count(1))
        names[key] = next(name for name in numbered if name not in used)
        used.add(names[key])
    return {path: names[key] for path, key in keys.items()}


def published_recipe(recipe: str, names: Mapping[str, str]) -> str:
    """Replace each local path in a recipe by its published name, and any other absolute path by its last component.

    Args:
        recipe: text of the recipe.
        names: published name of each directory and file that the recipe names as a model, by its path.
    """
    known = {path.rstrip("/"): name for path, name in names.items() if path.strip("/")}
    paths = "|".join(re.escape(path) for path in sorted(known, key=lambda path: (-len(path), path)))
    # one pass, since a published name can be another model's path
    pattern = rf"(?<![\w./~-])(?P<path>{paths})/?(?![\w./-])|{_ABSOLUTE}" if paths else _ABSOLUTE

    def published(match: re.Match[str]) -> str:
        path = match.groupdict().get("path")
        if path is not None:
            return known[path]
        return match["last"] or (_components(match[0]) or [""])[-1]

    return re.sub(pattern, published, recipe)


def _components(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".", "..", "~")]
