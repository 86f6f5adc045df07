"""The list of modules that are not quantized in config.json, and how loaders match its entries with modules.

- transformers (``should_convert_module`` in quantizers/quantizers_utils.py): an entry is the beginning of a name up to
  the end of a component, as a regular expression too, or the end of a name.
- compressed-tensors (``match_name`` in utils/match.py): the complete name, or ``re:`` and a regular expression that
  matches its beginning.
- ModelOpt (``exclude_modules``): the complete name, with ``*`` for any characters.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ..checks.formats import quantization_config
from ..logical import LogicalTensor
from ..values.columns import Another

KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
"""Names of the list: transformers', vLLM's, compressed-tensors' and ModelOpt's."""
SPECIAL = re.compile(r"[\\^$*+?{}\[\]|()]")
"""Characters that make an entry a pattern."""
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


class SkipList:
    """Entries of one list, indexed so most names are compared with few of them.

    Args:
        key: key of the list in config.json.
        entries: the entries.
        method: ``quant_method``, which decides how entries are matched.
    """

    def __init__(self, key: str, entries: Iterable[str], method: str) -> None:
        self.key = key
        self._names: dict[str, str] = {}  # complete names, or their beginnings
        self._ends: dict[str, list[str]] = {}  # entries that can be the end of a name, by their last component
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        self._beginnings = method not in ("compressed-tensors", "modelopt")
        for entry in filter(None, entries):
            if method == "modelopt":
                self._add(fnmatch.translate(entry) if "*" in entry else None, entry)
            elif method == "compressed-tensors":
                self._add(entry.removeprefix("re:") if entry.startswith("re:") else None, entry)
            else:
                self._ends.setdefault(entry.rpartition(".")[2], []).append(entry)
                self._add(f"(?:{entry}){_BOUNDARY}" if SPECIAL.search(entry) else None, entry)

    def _add(self, pattern: str | None, entry: str) -> None:
        """Index an entry as a pattern, or as a name; one that is not a valid pattern matches nothing."""
        if pattern is None:
            self._names[entry.removesuffix(".")] = entry
            return
        try:
            self._patterns.append((re.compile(pattern), entry))
        except re.error:
            return

    def entry_of(self, module: str) -> str | None:
        """Return the entry that matches a module, or None."""
        beginning = module
        while beginning:
            if beginning in self._names:
                return self._names[beginning]
            beginning = beginning.rpartition(".")[0] if self._beginnings else ""
        last = module.rpartition(".")[2]
        for end, entries in self._ends.items():
            if last.endswith(end):
                found = next((entry for entry in entries if module.endswith(entry)), None)
                if found is not None:
                    return found
        return next((entry for pattern, entry in self._patterns if pattern.match(module)), None)


def skip_lists(config: Mapping[str, Any] | None) -> list[SkipList]:
    """Return the lists in config.json of the modules that are not quantized.

    A description can have several: transformers reads `modules_to_not_convert` first, and vLLM `ignored_layers`.
    """
    described = quantization_config(config)
    if described is None:
        return []
    key, section = described
    method = str(section.get("quant_method") or "").lower()
    found = ((name, section.get(name)) for name in KEYS)
    return [
        SkipList(f"{key}.{name}", (each for each in entries if isinstance(each, str)), method)
        for name, entries in found
        if isinstance(entries, list) and entries
    ]


def unlisted(checkpoint: Checkpoint, values: Iterable[LogicalTensor | Another]) -> Iterator[LogicalTensor | Another]:
    """Yield the values of a checkpoint, none of which may be quantized and in a module that is listed as not quantized.

    Loaders would read its codes as values.

    Raises:
        CheckpointError: one is.
    """
    lists = skip_lists(checkpoint.config)
    for value in values:
        like = value.like if isinstance(value, Another) else value
        for listed in lists if like.quantized else ():
            entry = listed.entry_of(value.name.removesuffix(".weight"))
            if entry is not None:
                raise _contradiction(checkpoint, value, f"{listed.key}: {entry!r}")
        yield value


def _contradiction(checkpoint: Checkpoint, value: LogicalTensor | Another, listed: str) -> CheckpointError:
    """The error for a quantized value in a module that is listed as not quantized."""
    names = value.parts if isinstance(value, Another) else [part.name for part in value.parts]
    like = value.like if isinstance(value, Another) else value
    refs = [part.as_stored for part in like.parts]
    parts = " and ".join(
        f"{name} ({ref.dtype.name} of shape {list(ref.shape)})" for name, ref in zip(names, refs, strict=False)
    )
    return CheckpointError(
        f"{checkpoint.path}: {value.name} is stored quantized, as {parts}, but config.json lists its module as not "
        f"quantized ({listed}): loaders would read its codes as values. Remove the entry from config.json, or download "
        "the model again"
    )
