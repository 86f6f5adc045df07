"""Finds the stacks of layers of a checkpoint from its tensor names and config.json.

A stack is a list of layers: `model.layers.12.mlp.up_proj.weight` is the tensor `mlp.up_proj.weight` in layer 12 of the
stack `model.layers`. Only the outermost number counts, since inner ones number experts and the like. Architectures are
not known by name: the main stack is the one whose number of layers config.json states.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import CheckpointError
from .roles import is_after_layers, is_language, is_side_module, is_vision

_SIDE_KEYS = ("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers", "layers", "num_blocks")
COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers", "depth", *_SIDE_KEYS)
"""The keys of config.json that state the number of layers, the most frequent first."""

LENGTH_KEYS = ("layers_block_type", "layer_types", "hybrid_override_pattern", "block_configs")
"""Keys of lists or strings with one entry per layer, used if no number of layers is stated."""

_LAYERS = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|encoder_layers|decoder_layers)$")
_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,5})(?=\.|$)")


class AmbiguousLayers(CheckpointError):
    """The layers of a model can't be identified, but nothing contradicts config.json: merges by name are possible."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of layers.

    Args:
        prefix: prefix of the tensor names before the layer's number, such as ``model.layers``.
        count: number of layers, which are numbered from 0 to count - 1.
        extras: numbers beyond the count, such as 61 for the prediction head that DeepSeek-V3 stores as a layer.
        config_path: keys that lead to the config with the count; () for the top of config.json.
        config_key: key of the count in that config; None if no number is stated.
    """

    prefix: str
    count: int
    extras: tuple[int, ...] = ()
    config_path: tuple[str, ...] = ()
    config_key: str | None = None


@dataclass(frozen=True, slots=True)
class LayerName:
    """A parsed tensor name, ``stack.index.rest``; `extra` is true for a layer beyond the count."""

    stack: str
    index: int
    rest: str
    extra: bool


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The layers of one checkpoint.

    Args:
        stacks: every numbered list outside of layers, including a vision encoder's; the main ones first.
        mains: the stacks that a recipe slices: one, or encoder and decoder, or none for a model without layers.
    """

    stacks: tuple[Stack, ...]
    mains: tuple[Stack, ...]
    _parts: tuple[tuple[Stack, str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", _parts(self.stacks, self.mains))

    @property
    def main(self) -> Stack:
        """The main stack; the encoder's in an encoder-decoder model, and an empty one for a model without layers."""
        return self.mains[0] if self.mains else Stack("", 0)

    @property
    def parts(self) -> tuple[tuple[Stack, str], ...]:
        """The stacks that `module` finds, each with the shortest prefix that no other stack has."""
        return self._parts

    def split(self, name: str) -> LayerName | None:
        """Parse a tensor name; None for a tensor outside the main stacks. Extra layers are inside."""
        for stack in self.mains:
            prefix = stack.prefix
            start = len(prefix)
            if name.startswith(prefix) and (match := _NUMBER.match(name, start)):
                index = int(match[1])
                return LayerName(prefix, index, sys.intern(name[match.end() + 1 :]), index >= stack.count)
        return None

    def is_after(self, name: str) -> bool:
        """Whether a tensor outside the layers comes after them (see `roles.is_after_layers`)."""
        return is_after_layers(name, in_side_module=is_side_module(self.main.prefix))

    def module(self, key: str) -> Stack | None:
        """The stack that a recipe's ``modules:`` refers to as `key`, or None.

        `key` is a stack's prefix, a dotted prefix of that prefix that no other stack starts with, one of its components
        (``encoder``, ``decoder``, ``language_model``), or mergekit's ``text_decoder``, ``default``, ``vision_tower``.
        """
        for stack, beginning in self._parts:
            if key in (stack.prefix, beginning):
                return stack
        matches = [stack for stack, _ in self._parts if key in stack.prefix.split(".")]
        if not matches and len(self.mains) == 1 and key in ("text_decoder", "default", "language_model"):
            matches = [self.main]
        if not matches and is_vision(key):
            matches = [stack for stack, _ in self._parts if is_vision(stack.prefix)]
        return matches[0] if len(matches) == 1 else None

    def owner(self, name: str) -> Stack | None:
        """The stack whose part of the model contains a tensor, inside or outside the layers.

        All other tensors belong to the main stack; in an encoder-decoder model, to none (T5's ``shared.weight``).
        """
        for stack, beginning in self._parts:
            if _under(name, beginning):
                return stack
        return self.mains[0] if len(self.mains) == 1 else None

    def side_lists(self, stack: Stack) -> tuple[Stack, ...]:
        """The numbered lists outside a main stack that have as many entries as it has layers, or one fewer.

        Inkling 2 stores queries of its residual connections in such lists, ``attn_res.mlp_queries.3``. Other lists of
        layers are not among them: they belong to another encoder or decoder.
        """
        return tuple(
            other
            for other in self.stacks
            if other not in self.mains
            and stack.count > 2
            and other.count in (stack.count, stack.count - 1)
            and not other.extras
            and not _LAYERS.search(other.prefix)
            and not is_side_module(other.prefix)
        )

    def on(self, stack: Stack) -> LayerMap:
        """The same layers with `stack` as the only main stack, for a module of a recipe."""
        return replace(self, mains=(stack,))


def _parts(stacks: Iterable[Stack], mains: tuple[Stack, ...]) -> tuple[tuple[Stack, str], ...]:
    """Stacks of actual layers, each with the shortest dotted part of its prefix that no other stack starts with."""
    real = [stack for stack in stacks if stack in mains or (stack.count > 1 and _LAYERS.search(stack.prefix))]
    parts = []
    for stack in real:
        components = stack.prefix.split(".")
        beginnings = [".".join(components[: length + 1]) for length in range(len(components))]
        others = [other.prefix for other in real if other is not stack]
        own = (b for b in beginnings if not any(_under(other, b) for other in others))
        parts.append((stack, next(own, stack.prefix)))
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class _Count:
    """A number of layers in config.json; without a key if it is the length of a list."""

    path: tuple[str, ...]
    key: str | None
    value: int

    def __str__(self) -> str:
        return f"{'.'.join((*self.path, self.key or 'layer_types'))} = {self.value}"


def find_layers(names: Iterable[str], config: Mapping[str, Any] | None = None) -> LayerMap:
    """The stacks of layers among tensor names.

    Args:
        names: names of all tensors of a checkpoint.
        config: content of config.json, or None. Without a number of layers there, the largest stack is the main one.

    Raises:
        AmbiguousLayers: if several lists can be the main stack.
        CheckpointError: if no stack has the number of layers that `config` states.
    """
    names = tuple(names)
    config = config or {}
    counts = _counts(config)
    outermost = _scan(names, 1)
    # a gap in numbered layers means that tensors are missing
    ambiguous = not counts and not any(_LAYERS.search(p) and _stack(p, outermost[p]).extras for p in outermost)
    for depth in (1, 2, 3):  # deeper if the outermost numbers aren't layers: `stages.0.layers.11`
        numbered = outermost if depth == 1 else _scan(names, depth)
        pair = _pair(numbered, config)
        if mains := _single(numbered, config, depth) if pair is None else pair:
            others = [_stack(prefix, numbered[prefix]) for prefix in numbered if all(prefix != m.prefix for m in mains)]
            return LayerMap((*mains, *sorted(others, key=lambda s: (-s.count, s.prefix))), mains)
        if pair == ():
            ambiguous = False
            break
        pool = _candidates(numbered, depth)
        ambiguous |= any(_fits(numbers, count, exact=True) for numbers in pool.values() for count in counts)
    if not counts and not outermost:
        return LayerMap((), ())
    stated = " and ".join(str(count) for count in counts) or "no number of layers"
    kind = AmbiguousLayers if ambiguous or _shares_layers(config, outermost) else CheckpointError
    raise kind(
        f"config.json states {stated}, but the tensor names don't show which stack that is: {_describe(outermost)}. "
        "Either tensors are missing, or config.json belongs to another model, or the layers are in several lists, "
        "which can only be merged completely: without `slices`, `modules`, `non_layer` and gradients."
    )


def _shares_layers(config: Mapping[str, Any], found: Mapping[str, set[int]]) -> bool:
    """Whether each stored layer is used several times, as in ALBERT, whose config.json states the number of groups."""
    groups = config.get("num_hidden_groups")
    return isinstance(groups, int) and any(numbers == set(range(groups)) for numbers in found.values())


def _scan(names: Iterable[str], depth: int) -> dict[str, set[int]]:
    """The layer numbers after each prefix, using the `depth`-th number of each name from the left.

    A leading number is skipped: sentence-transformers numbers its modules (`0.auto_model.encoder.layer.3`).
    """
    numbered: defaultdict[str, set[int]] = defaultdict(set)
    layer: str | None = None  # the beginning of the name before, with its number: neighbours are mostly of one layer
    for name in names:
        if layer is not None and name.startswith(layer):
            continue
        match = _NUMBER.search(name)
        for _ in range(depth - 1):
            match = match and _NUMBER.search(name, match.end())
        if match:
            numbered[name[: match.start()]].add(int(match[1]))
        layer = f"{name[: match.end()]}." if match else None
    return dict(numbered)


def _candidates(found: Mapping[str, set[int]], depth: int) -> dict[str, set[int]]:
    """The stacks that can be the main one."""
    if depth > 1:  # skips experts: inside a layer, only a list named layers contains layers
        found = {prefix: numbers for prefix, numbers in found.items() if _LAYERS.search(prefix)}
    pool = {prefix: numbers for prefix, numbers in found.items() if not is_side_module(prefix)}
    if not any(_LAYERS.search(prefix) for prefix in pool):
        pool = dict(found)  # a vision or speech model
    return pool


def _single(found: Mapping[str, set[int]], config: Mapping[str, Any], depth: int) -> tuple[Stack, ...]:
    """The single main stack, or () if it is ambiguous."""
    pool = _candidates(found, depth)
    counts = _counts(config)
    for exact in (True, False):
        for count in counts:
            prefix = _most_likely([p for p, numbers in pool.items() if _fits(numbers, count, exact)])
            if prefix is not None:
                return (_stack(prefix, found[prefix], count),)
    if counts or not pool:
        return ()
    largest = max(len(numbers) for numbers in pool.values())
    prefix = _most_likely([p for p, numbers in pool.items() if len(numbers) == largest])
    if prefix is None or (largest == 1 and not _LAYERS.search(prefix)):
        return ()
    path = next((path for path, _ in _sections(config) if path and is_language(path[-1])), ())
    stack = replace(_stack(prefix, found[prefix]), config_path=path)  # LLaVA's text_config states no count
    return () if stack.extras else (stack,)


def _pair(found: Mapping[str, set[int]], config: Mapping[str, Any]) -> tuple[Stack, ...] | None:
    """Encoder and decoder: two prefixes that first differ in a component with `encoder` or `decoder`.

    None if there is no such pair, () if config.json states other numbers of layers.
    """
    prefixes = [prefix for prefix in found if _LAYERS.search(prefix) and not is_side_module(prefix)]
    pairs = [(e, d) for e in prefixes for d in prefixes if _are_sides(e.split("."), d.split("."))]
    if not pairs:
        return None
    largest = max(pairs, key=lambda pair: len(found[pair[0]]) + len(found[pair[1]]))
    stacks = []
    for prefix, side, other in zip(largest, ("encoder", "decoder"), ("decoder", "encoder"), strict=True):
        # The side's own section (T5Gemma's "decoder") comes first, then the side's own keys, then the common ones.
        sections = [(path, section) for path, section in _sections(config) if not path or other not in path[-1]]
        sections.sort(key=lambda item: not (item[0] and side in item[0][-1]))
        keys = (f"{side}_layers", f"num_{side}_layers", f"{side}_num_hidden_layers", "num_layers", "num_hidden_layers")
        counts = [_Count(path, key, section[key]) for path, section in sections for key in keys if key in section]
        counts = [count for count in counts if _is_count(count.value)]
        fitting = [c for exact in (True, False) for c in counts if _fits(found[prefix], c, exact)]
        if counts and not fitting:
            return ()
        stacks.append(_stack(prefix, found[prefix], fitting[0] if fitting else None))
    return tuple(stacks)


def _are_sides(first: Sequence[str], second: Sequence[str]) -> bool:
    a, b = next(((a, b) for a, b in zip(first, second, strict=False) if a != b), ("", ""))
    return "encoder" in a and a.replace("encoder", "decoder") == b


def _sections(config: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The sections that may state the number of language layers: first language configs, then the top."""
    sections: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), config)]
    for path, section in sections:  # grows during the iteration
        for key, value in section.items():
            is_section = key.endswith("_config") or key in ("encoder", "decoder")
            if is_section and isinstance(value, Mapping) and len(path) < 3 and not is_side_module(key):
                sections.append(((*path, key), value))
    return sorted(sections, key=lambda item: 1 if not item[0] else (0 if is_language(item[0][-1]) else 2))


def _counts(config: Mapping[str, Any]) -> list[_Count]:
    """Every number of layers that config.json states for the language model, the most likely first."""
    counts = []
    for path, section in _sections(config):
        stated = [_Count(path, key, section[key]) for key in COUNT_KEYS if _is_count(section.get(key))]
        if not stated:
            lists = [section[key] for key in LENGTH_KEYS if isinstance(section.get(key), (list, str)) and section[key]]
            stated = [_Count(path, None, len(lists[0]))] if lists else []
        counts += stated
    return counts


def _fits(numbers: set[int], count: _Count, exact: bool) -> bool:
    """Whether the numbers are 0 to count - 1; unless `exact`, at most as many extra numbers are allowed."""
    # before the sets are compared, since a config may state any number
    within = count.value <= len(numbers) <= count.value * (1 if exact else 2)
    return within and numbers >= set(range(count.value))


def _most_likely(prefixes: Sequence[str]) -> str | None:
    """The stack among several of equal size that is named like a language model's layers; None if ambiguous."""
    for is_preferred in (_LAYERS.search, is_language):
        if len(prefixes) > 1:
            prefixes = [prefix for prefix in prefixes if is_preferred(prefix.lower())] or prefixes
    return prefixes[0] if len(prefixes) == 1 else None


def _stack(prefix: str, numbers: set[int], count: _Count | None = None) -> Stack:
    """A stack with the stated number of layers, or else those numbered from 0 without a gap."""
    layers = count.value if count else next(i for i in range(len(numbers) + 1) if i not in numbers)
    path, key = (count.path, count.key) if count else ((), None)
    return Stack(prefix, layers, tuple(sorted(i for i in numbers if i >= layers)), path, key)


def _describe(found: Mapping[str, set[int]]) -> str:
    """List the numbers of the five largest stacks, such as `model.layers has 0-4, 6-31`."""
    parts = []
    for prefix, numbers in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))[:5]:
        starts = (i for i in sorted(numbers) if i - 1 not in numbers)
        ends = (i for i in sorted(numbers) if i + 1 not in numbers)
        runs = [f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True)]
        parts.append(f"{prefix} has {', '.join(runs[:6])}{', ...' if len(runs) > 6 else ''}")
    return "; ".join(parts) or "no tensor name contains a number"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _under(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(beginning + ".")
