"""The published form of a recipe: what the output's files say about its inputs, without paths of this machine.

A Hub id stays as it is. Of a local directory only the last component remains.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

# Matches an absolute path with at least one directory, but not the rest of a URL or a closing tag.
_ABSOLUTE = re.compile(r"(?<![\w:/<.~$%-])~?/(?:[\w.@+-]+/)+([\w.@+-]*)")


def published_name(path: str) -> str:
    """The published name of a local directory or file: its last component, or ``model`` if it has none."""
    return _last_component(path) or "model"


def published_names(names: Iterable[str], is_local: Callable[[str], bool]) -> list[str]:
    """The published names of models, each a different one: the second ``tune`` becomes ``tune#2``, and so on.

    Args:
        names: models as a recipe names them.
        is_local: whether a name is a local path rather than a Hub id.
    """
    counts: Counter[str] = Counter()
    published = []
    for name in names:
        short = published_name(name) if is_local(name) else name
        counts[short] += 1
        published.append(short if counts[short] == 1 else f"{short}#{counts[short]}")
    return published


def published_recipe(recipe: str, local: Iterable[str]) -> str:
    """Shorten each local path, and any other absolute path, in a recipe to its last component.

    Args:
        recipe: text of the recipe.
        local: directories and files that the recipe names as models.
    """
    for path in sorted({path for path in local if path.strip("/")}, key=lambda path: (-len(path), path)):
        pattern = rf"(?<![\w./~-]){re.escape(path.rstrip('/'))}/?(?![\w./-])"
        recipe = re.sub(pattern, published_name(path).replace("\\", r"\\"), recipe)
    return _ABSOLUTE.sub(lambda match: match[1] or _last_component(match[0]), recipe)


def _last_component(path: str) -> str:
    components = [part for part in path.split("/") if part not in ("", ".", "..", "~")]
    return components[-1] if components else ""
