"""Compares the tensor names of two models that were saved by different code, and shows how to rename them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ....io.safetensors.checkpoint import Checkpoint

_SPELLINGS = ((".gamma", ".weight"), (".beta", ".bias"))
"""Endings of TensorFlow's layer norms, and PyTorch's."""
_DEPTH = 3
_CANDIDATES = 8
_SAMPLE = 4096
_LARGE_SHARE = 0.3  # a prefix that is worth trying begins at least this share of a model's names


@dataclass(frozen=True, slots=True)
class Renaming:
    """A change of one model's tensor names after which more of them equal another model's.

    Args:
        prefix: prefix to remove.
        added: prefix to add instead, or empty.
        spellings: whether ``gamma`` and ``beta`` become ``weight`` and ``bias``.
        matches: number of names that are equal afterwards.
        total: number of names of the model to rename.
    """

    prefix: str
    added: str
    spellings: bool
    matches: int
    total: int

    def __str__(self) -> str:
        """The change in words."""
        parts = []
        if self.prefix and self.added:
            parts.append(f"with prefix {self.added!r} instead of {self.prefix!r}")
        elif self.prefix:
            parts.append(f"without prefix {self.prefix!r}")
        elif self.added:
            parts.append(f"with prefix {self.added!r}")
        if self.spellings:
            parts.append("with `weight` and `bias` instead of `gamma` and `beta`")
        return " and ".join(parts)

    @property
    def expression(self) -> str:
        """Python code that renames `name`."""
        code = "name"
        if self.prefix:
            code += f".removeprefix({self.prefix!r})"
        for old, new in _SPELLINGS if self.spellings else ():
            code = f're.sub(r"\\{old}$", "{new}", {code})'
        return f"{self.added!r} + {code}" if self.added else code


def find_renaming(names: Collection[str], others: Collection[str]) -> Renaming | None:
    """The renaming of `names` with which most of them are among `others`; None if none helps much."""
    wanted = set(others)
    equal = sum(name in wanted for name in names)
    sample = list(names)[:: 1 + len(names) // _SAMPLE]
    best: tuple[int, str, str, bool] = sum(name in wanted for name in sample), "", "", False
    additions = _prefixes(others)
    for spellings in (False, True):
        respelled = [respell(name) for name in sample] if spellings else sample
        for removed in _prefixes(respelled):
            rests = [name[len(removed) :] for name in respelled if name.startswith(removed)]
            for added in additions:
                matches = sum(added + rest in wanted for rest in rests)
                if matches > best[0]:
                    best = matches, removed, added, spellings
    _, removed, added, spellings = best
    respelled = [respell(name) for name in names] if spellings else list(names)
    matches = sum(added + name[len(removed) :] in wanted for name in respelled if name.startswith(removed))
    failing = min(len(names), len(wanted)) - equal
    if matches <= equal or 2 * (matches - equal) < failing:
        return None
    return Renaming(removed, added, spellings, matches, len(names))


def respell(name: str) -> str:
    """A name with PyTorch's spelling of a layer norm's parameters."""
    for old, new in _SPELLINGS:
        if name.endswith(old):
            return name[: -len(old)] + new
    return name


def _prefixes(names: Iterable[str]) -> list[str]:
    """The dotted prefixes with which a large share of the names begin, the shortest first; the first is empty."""
    counts: Counter[str] = Counter()
    total = 0
    for name in names:
        total += 1
        end = 0
        for _ in range(_DEPTH):
            end = name.find(".", end) + 1
            if not end:
                break
            counts[name[:end]] += 1
    large = [prefix for prefix, count in counts.items() if count >= _LARGE_SHARE * total]
    return ["", *sorted(large, key=lambda prefix: (len(prefix), prefix))[:_CANDIDATES]]


def directory_of(checkpoint: Checkpoint) -> str:
    """The directory of a checkpoint, or its repository on the Hub."""
    if hasattr(checkpoint, "repository"):
        return str(checkpoint.repository.repo)
    path = checkpoint.path
    return str(path.parent if path.suffix in (".safetensors", ".json") else path)


def rename_script(checkpoint: Checkpoint, expression: str) -> str:
    """Python code that copies a model with other tensor names.

    Args:
        checkpoint: the model.
        expression: Python code that computes the new name from `name`.
    """
    source, download = directory_of(checkpoint), ""
    if hasattr(checkpoint, "repository"):
        folder = source.rpartition("/")[2]
        source, download = folder, f"    # first: hf download {source} --local-dir {folder}\n"
    return (
        f"{download}"
        "    import json, re, shutil\n"
        "    from pathlib import Path\n"
        "    from safetensors.torch import load_file, save_file\n"
        f"    source, target = {source!r}, {source + '-renamed'!r}\n"
        f"    rename = lambda name: {expression}\n"
        "    shutil.copytree(source, target)\n"
        '    for file in Path(source).glob("*.safetensors"):\n'
        "        tensors = {rename(name): tensor for name, tensor in load_file(file).items()}\n"
        '        save_file(tensors, Path(target, file.name), {"format": "pt"})\n'
        '    for file in Path(target).glob("*.safetensors.index.json"):\n'
        "        index = json.loads(file.read_text())\n"
        '        index["weight_map"] = {rename(name): shard for name, shard in index["weight_map"].items()}\n'
        "        file.write_text(json.dumps(index))"
    )
