"""Matches the names in an adapter, which are those at the time of training, with the names in a checkpoint.

transformers names modules differently in its versions, and other than some checkpoints do. So a name that the
checkpoint lacks is the one with which it has the longest ending in common, if there is only one. Numbers of layers are
never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "language_model."),
    ("model.language_model.", "model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("lm_head.", "embed_out."),
)
_INNER = ((".mlp.gate.", ".block_sparse_moe.gate."), (".mlp.router.", ".block_sparse_moe.gate."))
"""Pairs of names of the same module in transformers 4 and 5 and in checkpoints (``conversion_mapping.py``)."""
_LEAST = 2
"""Components that two names must have in common at their end, at least: a module and its parameter."""


class TensorNames:
    """The names of a checkpoint's tensors.

    Args:
        names: all names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names if isinstance(names, (set, frozenset, dict)) else dict.fromkeys(names)
        self._endings: dict[str, list[str]] = {}

    def candidates(self, name: str) -> list[str]:
        """Return the tensors that a name may stand for: one if it is clear, and none if no name resembles it."""
        if name in self._names:
            return [name]
        others = [name, *_other_names(name)]
        if exact := [other for other in others if other in self._names]:
            return exact[:1]
        if not self._endings:
            for each in self._names:
                for ending in _endings(each):
                    self._endings.setdefault(ending, []).append(each)
        for other in others:
            for ending in _endings(other):
                if found := self._endings.get(ending):
                    return found
        return []


def _endings(name: str) -> Iterator[str]:
    """The endings of a name by which it can be recognized, the longest first."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    most = numbers[0] - 1 if numbers else len(parts) - _LEAST
    for start in range(max(most, 0) + 1):
        yield ".".join(parts[start:])


def _other_names(name: str) -> Iterator[str]:
    """Names that the same tensor has in other versions."""
    for one, other in _PREFIXES:
        for old, new in ((one, other), (other, one)):
            if name.startswith(old):
                yield new + name[len(old) :]
    for one, other in _INNER:
        for old, new in ((one, other), (other, one)):
            if old in name:
                yield name.replace(old, new)
