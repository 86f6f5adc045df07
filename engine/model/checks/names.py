"""Compares the tensor names of two models that were saved by different code, and shows how to rename them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from ....io.checkpoint.checkpoint import Checkpoint
from ..roles import is_buffer, is_optional

_SPELLINGS = ((".gamma", ".weight"), (".beta", ".bias"))
"""Endings of TensorFlow's layer norms, and PyTorch's."""
_DEPTH = 3
_CANDIDATES = 8
_SAMPLE = 4096
_RULES = 6
_LARGE_SHARE = 0.3  # a prefix that is worth trying begins at least this share of a model's names


@dataclass(frozen=True, slots=True)
class Renaming:
    """A change of one model's tensor names after which more of them equal another model's.

    Args:
        rules: prefixes and their replacements, the longest prefix first; the first prefix that a name has is replaced.
            A prefix whose replacement is itself protects its names from the rules after it.
        spellings: whether ``gamma`` and ``beta`` become ``weight`` and ``bias``.
        matches: number of names that are equal afterwards.
        total: number of names of the model to rename.
    """

    rules: tuple[tuple[str, str], ...]
    spellings: bool
    matches: int
    total: int

    def __str__(self) -> str:
        """The change in words."""
        parts = []
        for old, new in self.rules:
            if old and new and old != new:
                parts.append(f"with prefix {new!r} instead of {old!r}")
            elif old and not new:
                parts.append(f"without prefix {old!r}")
            elif new and not old:
                parts.append(f"with prefix {new!r}" + (" for all others" if len(self.rules) > 1 else ""))
        if self.spellings:
            parts.append("with `weight` and `bias` instead of `gamma` and `beta`")
        return " and ".join(parts)

    def __call__(self, name: str) -> str:
        """The new name of a tensor."""
        return _replace_prefix(self.rules, respell(name) if self.spellings else name)

    @property
    def entry(self) -> str | None:
        """The line of a recipe that renames the tensors in the model's entry; None if prefixes aren't enough."""
        return None if self.spellings else rename_entry(self.rules)

    @property
    def cost(self) -> tuple[int, int, int]:
        """Orders renamings with equally many matches, the simplest first: removing a prefix is simpler than adding."""
        added, removed = (sum(len(rule[side]) for rule in self.rules) for side in (1, 0))
        return len(self.rules), added, removed

    @property
    def expression(self) -> str:
        """Python code that renames `name`."""
        code = "name"
        if len(self.rules) == 1 and not self.rules[0][1]:
            code += f".removeprefix({self.rules[0][0]!r})"
        elif len(self.rules) == 1 and not self.rules[0][0]:
            code = f"{self.rules[0][1]!r} + name"
        elif self.rules:  # a name without any of the prefixes stays as it is
            rules = f"for old, new in {list(self.rules)!r} if name.startswith(old)"
            code = f"next((new + name[len(old):] {rules}), name)"
        for old, new in _SPELLINGS if self.spellings else ():
            code = f're.sub(r"\\{old}$", "{new}", {code})'
        return code


def find_renaming(names: Collection[str], others: Collection[str]) -> Renaming | None:
    """The renaming of `names` with which most of them are among `others`; None if none helps much."""
    wanted = set(others)
    best: tuple[int, tuple[tuple[str, str], ...], bool] = sum(name in wanted for name in names), (), False
    failing = min(len(names), len(wanted)) - best[0]
    needed = best[0] + max(1, -(-failing // 2))
    for spellings in (False, True):
        respelled = [respell(name) for name in names] if spellings else list(names)
        rules = _find_rules(respelled, wanted)
        renamed = {_replace_prefix(rules, name) for name in respelled}
        matches = len(renamed & wanted)
        if len(renamed) == len(names) and matches > best[0]:  # otherwise, two tensors would get the same name
            best = matches, rules, spellings
    matches, rules, spellings = best
    return Renaming(rules, spellings, matches, len(names)) if matches >= needed else None


def _find_rules(names: Sequence[str], wanted: Set[str]) -> tuple[tuple[str, str], ...]:
    """The replacements of prefixes after which most of the names are wanted."""
    present = set(names)
    targets = {name: name for name in names if name in wanted}
    missing = [name for name in wanted if name not in present]
    rest = [name for name in names if name not in wanted]
    found: list[tuple[str, str]] = []
    while rest and missing and len(found) < _RULES:
        # only the first rule may replace one prefix by another: for few names, such as cls.dense.weight and
        # pooler.dense.weight, equal endings don't show that the tensors are the same
        rule = _best_rule(rest, missing, replace=not found)
        if rule is None:
            break
        found.append(rule)
        open_names = set(missing)
        for name in rest:
            target = rule[1] + name[len(rule[0]) :]
            if name.startswith(rule[0]) and target in open_names:
                targets[name] = target
        reached = set(targets.values())
        rest = [name for name in rest if name not in targets]
        missing = [name for name in missing if name not in reached]
    return _separate(found, targets)


def _best_rule(names: Sequence[str], wanted: Sequence[str], *, replace: bool) -> tuple[str, str] | None:
    """The prefix to replace and its replacement with which most names are wanted; None if no name is."""
    sample = names[:: 1 + len(names) // _SAMPLE]
    targets, additions = set(wanted), _prefixes(wanted)
    best: tuple[int, str, str] = 0, "", ""
    for removed in _prefixes(sample):
        rests = [name[len(removed) :] for name in sample if name.startswith(removed)]
        for added in additions if replace or not removed else ("",):
            matches = sum(added + rest in targets for rest in rests)
            if matches > best[0]:
                best = matches, removed, added
    return best[1:] if best[0] else None


def _separate(found: Sequence[tuple[str, str]], targets: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Order rules by length, and add rules for names that a rule for other names would change.

    Args:
        found: prefixes and replacements.
        targets: the names that should be changed or kept, with their new names.
    """

    def ordered() -> tuple[tuple[str, str], ...]:
        return tuple(sorted(rules.items(), key=lambda rule: -len(rule[0])))

    rules = dict(reversed(found))
    for _ in range(_RULES):
        current = ordered()
        wrong = next((name for name, target in targets.items() if _replace_prefix(current, name) != target), None)
        if wrong is None:
            break
        target = targets[wrong]
        for end in (index + 1 for index, character in enumerate(wrong) if character == "."):
            prefix, rest = wrong[:end], wrong[end:]
            if prefix in rules or not target.endswith(rest):
                continue
            added = target.removesuffix(rest)
            if all(added + n[end:] == t for n, t in targets.items() if n.startswith(prefix)):
                rules[prefix] = added
                break
        else:
            break
    return ordered()


def _replace_prefix(rules: Iterable[tuple[str, str]], name: str) -> str:
    """Apply the first rule whose prefix the name has."""
    for old, new in rules:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def find_leftovers(names: Iterable[str], others: Collection[str]) -> list[str]:
    """The names that aren't among `others` and that a merge can't do without, with the rest of their modules.

    A head, a bias or a buffer may be missing from a model, but is of no use if other tensors of its module are missing.
    """
    left = [name for name in names if name not in others]
    modules = {name.partition(".")[0] for name in left if not is_optional(name) and not is_buffer(name)}
    return [name for name in left if name.partition(".")[0] in modules]


def shortest_prefixes(names: Iterable[str], kept: Iterable[str]) -> tuple[str, ...]:
    """Dotted prefixes, or complete names, that all of `names` begin with and none of `kept`."""
    taken: set[str] = set()
    for name in kept:
        taken.update(name[: index + 1] for index, character in enumerate(name) if character == ".")
    found: dict[str, None] = {}
    for name in names:
        ends = (index + 1 for index, character in enumerate(name) if character == ".")
        found[next((name[:end] for end in ends if name[:end] not in taken), name)] = None
    return tuple(found)


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


def rename_entry(pairs: Iterable[tuple[str, str]]) -> str:
    """The line of a recipe that renames tensors in the model's entry.

    Args:
        pairs: prefixes and their replacements, the longest prefix first.
    """
    return f"rename: {json.dumps([list(pair) for pair in pairs])}"  # YAML, too


def rename_script(checkpoint: Checkpoint, expression: str, drop: Sequence[str] = ()) -> str:
    """Python code that copies a model with other tensor names.

    Args:
        checkpoint: the model.
        expression: Python code that computes the new name from `name`.
        drop: prefixes of the names of tensors to leave out.
    """
    if checkpoint.standalone:
        return _rename_file_script(checkpoint, expression, drop)
    source, download = directory_of(checkpoint), ""
    if hasattr(checkpoint, "repository"):
        folder = source.rpartition("/")[2]
        source, download = folder, f"    # first: hf download {source} --local-dir {folder}\n"
    target = source + ("-reduced" if expression == "name" else "-renamed")
    unless = " if not name.startswith(drop)" if drop else ""
    return (
        f"{download}"
        "    import json, re, shutil\n"
        "    from pathlib import Path\n"
        "    from safetensors.torch import load_file, save_file\n"
        f"    source, target = {source!r}, {target!r}\n"
        f"    rename = lambda name: {expression}\n"
        + (f"    drop = {tuple(drop)!r}\n" if drop else "")
        + "    shutil.copytree(source, target)\n"
        '    for file in Path(source).glob("*.safetensors"):\n'
        f"        tensors = {{rename(name): tensor for name, tensor in load_file(file).items(){unless}}}\n"
        '        save_file(tensors, Path(target, file.name), {"format": "pt"})\n'
        '    for file in Path(target).glob("*.safetensors.index.json"):\n'
        "        index = json.loads(file.read_text())\n"
        '        names = index["weight_map"].items()\n'
        f'        index["weight_map"] = {{rename(name): shard for name, shard in names{unless}}}\n'
        "        file.write_text(json.dumps(index))"
    )


def _rename_file_script(checkpoint: Checkpoint, expression: str, drop: Sequence[str]) -> str:
    """Python code that copies a file that stands alone with other tensor names; see `rename_script`."""
    source = checkpoint.path
    target = source.with_name(f"{source.stem}-{'reduced' if expression == 'name' else 'renamed'}.safetensors")
    unless = " if not name.startswith(drop)" if drop else ""
    return (
        "    import re\n"
        "    from safetensors import safe_open\n"
        "    from safetensors.torch import load_file, save_file\n"
        f"    source, target = {str(source)!r}, {str(target)!r}\n"
        f"    rename = lambda name: {expression}\n"
        + (f"    drop = {tuple(drop)!r}\n" if drop else "")
        + '    with safe_open(source, "pt") as file:\n'
        "        metadata = file.metadata()\n"
        f"    tensors = {{rename(name): tensor for name, tensor in load_file(source).items(){unless}}}\n"
        "    save_file(tensors, target, metadata)"
    )
