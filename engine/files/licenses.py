"""Finds the license of a model in the metadata of its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import MergeloomError
from ...io.small_files import read_small

_MAX_BYTES = 4 << 20


def license_of(directory: Path) -> str | None:
    """The Hub identifier of a model's license; None if its README.md is missing, or states none.

    For ``license: other`` with a ``license_name``, that name is returned.
    """
    file = directory / "README.md"
    try:
        text = read_small(file, _MAX_BYTES).decode() if file.is_file() else ""
    except (MergeloomError, UnicodeDecodeError):
        return None  # a card that cannot be read states no license; the merge does not need it
    metadata = _front_matter(text)
    name = metadata.get("license")
    if name == "other":
        name = metadata.get("license_name", name)
    return name.strip() if isinstance(name, str) and name.strip() else None


def _front_matter(text: str) -> Mapping[str, Any]:
    """The metadata at the start of a model card; empty if there is none or it is not valid YAML."""
    import yaml

    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in map(str.strip, lines[1:]):
        return {}
    end = [line.strip() for line in lines[1:]].index("---") + 1
    try:
        content = yaml.safe_load("\n".join(lines[1:end]))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
