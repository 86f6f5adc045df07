"""Gives the tensors of a checkpoint other names, as `rename` in a recipe says, before anything else looks at them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ....io.checkpoint.checkpoint import Checkpoint
from ....io.tensors.table import TensorTable
from ....io.units import listed
from ...recipe.entries.rename import Rename
from ...recipe.misplaced import nearest
from ...recipe.types import ModelReference, Recipe

C = TypeVar("C", bound=Checkpoint)
_DEPTH = 3


def renamed(recipe: Recipe, reference: ModelReference, rename: Rename, checkpoint: C) -> C:
    """Return the checkpoint with the names that `rename` gives to its tensors; `stored` has the old ones.

    Raises:
        RecipeError: a prefix matches no name, a new name is not valid, two tensors get the same name, or config.json
            refers to quantized modules by their old names.
    """
    tensors, model = checkpoint.tensors, reference.text
    names: dict[str, str] = {}
    used: Counter[int] = Counter()
    for name in tensors:
        number, new = _rename(name, rename.pairs)
        used[number] += 1
        other = names.setdefault(new, name)
        if other is not name:
            raise recipe.error(
                rename.place,
                f"{model} would have two tensors named {new}: {other} and {name}; change the pairs so every tensor "
                "gets a name of its own",
            )
        if not new or new.startswith(".") or new.endswith("."):
            raise recipe.error(
                rename.place, f"{name} of {model} would become {new!r}, which is not a name: prefixes end with a dot"
            )
    for number, (old, _) in enumerate(rename.pairs):
        if not used[number]:
            raise recipe.error((*rename.place, number), _unmatched(model, old, tensors))
    if stated := next(_stated_modules(checkpoint.config or {}, rename.pairs), None):
        raise recipe.error(
            rename.place,
            f"config.json of {model} refers to {stated} by this name in its description of quantized tensors: the "
            "tensors of a quantized model can't be renamed; use a copy whose config.json has the new names",
        )
    return with_names(checkpoint, names)


def with_names(checkpoint: C, names: Mapping[str, str]) -> C:
    """Return a checkpoint with other names for its tensors.

    Args:
        checkpoint: the checkpoint.
        names: its names by the new ones, in the order of its tensors.
    """
    tensors, views = checkpoint.tensors, checkpoint.views
    table = (
        tensors.renamed(names) if isinstance(tensors, TensorTable) else dict(zip(names, tensors.values(), strict=True))
    )
    return replace(
        checkpoint,
        tensors=table,
        views={new: views[name] for new, name in names.items() if name in views},
        stored={new: name for new, name in names.items() if new != name},
    )


def _rename(name: str, pairs: Sequence[tuple[str, str]]) -> tuple[int, str]:
    """The number of the first pair whose prefix a name has, and its new name; -1 and the name without one."""
    for number, (old, new) in enumerate(pairs):
        if name.startswith(old):
            return number, new + name[len(old) :]
    return -1, name


def _unmatched(model: str, old: str, names: Iterable[str]) -> str:
    """Describe a prefix that no name has, with the one that resembles it, or else with the most frequent ones."""
    if any(name.startswith(old) for name in names):  # all of them have the prefix of an earlier pair, too
        return f"the pairs before it rename all tensors of {model} with {old!r}: remove it"
    problem = f"no tensor of {model} begins with {old!r}"
    counts: Counter[str] = Counter()
    for name in names:
        ends = [index + 1 for index, character in enumerate(name) if character == "."][:_DEPTH]
        counts.update(name[:end] for end in ends if not name[:end].rstrip(".").rpartition(".")[2].isdigit())
    close = nearest(old, counts)
    if close is not None:
        return f"{problem}; did you mean {close!r}?"
    frequent = [repr(prefix) for prefix, _ in counts.most_common(3)]
    return f"{problem}; the most frequent prefixes: {listed(frequent)}" if frequent else problem


def _stated_modules(config: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The names in the description of quantized tensors that `pairs` change, in any list there."""
    todo: list[object] = [config.get(key) for key in ("quantization_config", "compression_config")]
    while todo:
        value = todo.pop()
        if isinstance(value, str) and _rename(f"{value}.", pairs)[1] != f"{value}.":  # a module, without the dot
            yield value
        elif isinstance(value, Mapping):
            todo += [each for each in value.values() if isinstance(each, (list, Mapping))]
        elif isinstance(value, list):
            todo += value
