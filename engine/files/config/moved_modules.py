"""Updates the lists of modules that are not quantized where layers have moved, or come from several models.

An entry that names a layer by its number, such as ``model.layers.3.mlp.gate``, becomes one entry for each layer of the
output that is the donor's layer 3. Modules in layers of other models are listed if their own config.json lists them, or
the donor's lists their kind.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...graph.build import BuiltGraph, OutputStack
from ...graph.encoding.linear import without_numbers
from ...model.checks.formats import quantization_config
from ...model.formats.skip_lists import KEYS, SPECIAL, SkipList, skip_lists
from ...model.inputs import Model
from ...model.layers import Stack
from ...model.roles import is_prediction, is_side_module
from ...model.warnings import ModelWarning, ModelWarningKind
from .skip_list import entries_of, lists_of_codes

_LAYER = re.compile(r"((?:re:)?\^?((?:[^\W\d][\w-]*\\?\.)*[^\W\d][\w-]*)\\?\.)(\d+)(?=\\?\.|\$?$)")
"""An entry that names a layer: what precedes its number, the name before it, and the number."""


def move_entries(
    config: dict[str, Any], stacks: Sequence[OutputStack], built: BuiltGraph, *, chosen: bool
) -> list[ModelWarning]:
    """Update the lists of modules that are not quantized for the output's layers.

    Args:
        config: config.json, which is modified.
        stacks: the output's stacks, with layer indices of the model that `config` belongs to.
        built: graph of the stage.
        chosen: whether the recipe says which model `config` belongs to, so it applies to the layers of all models.

    Returns:
        A warning about what names layers in another way.
    """
    found = quantization_config(config)
    prefixes = tuple(each.prefix for each in built.models[built.donor].layers.stacks)
    moved = [_Moves(stack, None if chosen or not stack.inputs else built.donor, prefixes) for stack in stacks]
    if found is None or all(each.is_identity for each in moved):
        return []
    key, section = found
    assert isinstance(section, dict)
    names = [name for name in KEYS if isinstance(section.get(name), list)]
    others = list(_listed_elsewhere(built)) if names and not chosen else []
    for name in names:
        entries = [each for entry in section[name] for each in _renumbered(entry, moved)]
        listed = SkipList("", (each for each in entries if isinstance(each, str)), _method(section))
        added = [module for module in others if listed.entry_of(module) is None]
        entries += entries_of(added, lists_of_codes(built), _method(section))
        section[name] = list(dict.fromkeys(entries)) if all(isinstance(each, str) for each in entries) else entries
    rest = {name: value for name, value in section.items() if name not in names}
    unknown = [entry for name in names for entry in section[name] if any(each.is_unclear(entry) for each in moved)]
    unknown += [text for text in _texts(rest) if any(each.names_layer(text) for each in moved)]
    if not unknown:
        return []
    problem = f"{key} is not updated where it names layers as in {unknown[0]!r}: they may have moved"
    return [ModelWarning(ModelWarningKind.QUANTIZATION, problem, names=(key,))]


class _Moves:
    """The new numbers of the layers in a stack.

    Args:
        stack: the stack.
        donor: number of the model whose layers are meant; None if all layers have a source there.
        stacks: prefixes of all stacks of the model that names the output's tensors.
    """

    def __init__(self, stack: OutputStack, donor: int | None, stacks: tuple[str, ...]) -> None:
        count, layers = stack.donor.count, len(stack.sources)
        owners = [inputs[0][0] for inputs in stack.inputs] if donor is not None else [donor] * layers
        self._new: dict[int, list[int]] = {}
        for new, (old, owner) in enumerate(zip(stack.sources, owners, strict=True)):
            if owner == donor:
                self._new.setdefault(old, []).append(new)
        if layers and owners[-1] == donor:
            self._new |= {extra: [layers + extra - count] for extra in stack.donor.extras}
        self.is_identity = stack.sources == tuple(range(count)) and set(owners) <= {donor}
        self._prefix, self._stacks = stack.donor.prefix, stacks
        last = re.escape(self._prefix.rpartition(".")[2])
        self._pattern = re.compile(rf"(?:^|\W){last}\\?\.[\d\[(\\]")

    def renumber(self, entry: str) -> list[str] | None:
        """The entries in place of one that names a layer; None if it names none."""
        match = _LAYER.match(entry)
        if match is None or _stacks_named(match[2], self._stacks) != (self._prefix,):
            return None
        return [f"{match[1]}{new}{entry[match.end() :]}" for new in self._new.get(int(match[3]), ())]

    def names_layer(self, text: str) -> bool:
        """Whether a text names a layer that may have moved."""
        return not self.is_identity and (self.renumber(text) is not None or self.is_unclear(text))

    def is_unclear(self, entry: object) -> bool:
        """Whether an entry names layers in another way than by one number of one stack; names of other stacks don't."""
        if self.is_identity or not isinstance(entry, str):
            return False
        match = _LAYER.match(entry)
        if match is not None:
            found = _stacks_named(match[2], self._stacks)
            return len(found) > 1 and self._prefix in found
        return SPECIAL.search(entry) is not None and self._pattern.search(entry) is not None


@functools.lru_cache(64)
def _stacks_named(named: str, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """The prefixes of the stacks that the text before a layer's number can mean: those most like it, from the end.

    Lists can have the names of a loader's modules, such as ``model.language_model.layers`` for ``model.layers``.
    """
    parts = named.replace("\\", "").split(".")
    found: dict[tuple[bool, bool, int], list[str]] = {}
    for prefix in prefixes:
        own = prefix.split(".")
        pairs = zip(reversed(parts), reversed(own), strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        same = _tower(own) == _tower(parts)
        if common and (same or common == len(parts)):  # the end of a prefix can't say which tower it is in
            found.setdefault((own == parts, same, common), []).append(prefix)
    return tuple(found[max(found)]) if found else ()


def _tower(parts: Sequence[str]) -> tuple[bool, bool]:
    """What kind of module layers belong to, by the components of a prefix: one next to the language model, or MTP."""
    name = ".".join(parts)
    return is_side_module(name), is_prediction(name)


def _renumbered(entry: Any, moved: Iterable[_Moves]) -> list[Any]:
    """The entries in place of one of a list."""
    found = (each.renumber(entry) for each in moved) if isinstance(entry, str) else ()
    return next((entries for entries in found if entries is not None), [entry])


def _method(section: Mapping[str, Any]) -> str:
    return str(section.get("quant_method") or "").lower()


def _listed_elsewhere(built: BuiltGraph) -> Iterator[str]:
    """Yield the unquantized modules in layers of other models than the donor that need an entry.

    Their own config.json lists them, or the donor's lists a module of their kind, such as the router of another layer:
    an unquantized model has no lists, but loaders create a quantized module wherever the output's doesn't name one.
    """
    graph, donor = built.graph, built.models[built.donor]
    mains = [main.prefix for main in donor.layers.mains]
    stacks = {each.donor.prefix: (mains.index(each.donor.prefix), each) for each in built.stacks if each.inputs}
    # not only the models that are read: a stage and a model with adapters have lists, and others have their tensors
    owners = {built.donor, *(inputs[0][0] for _, stack in stacks.values() for inputs in stack.inputs)}
    lists = {number: _Listed(built.models[number]) for number in owners}
    kinds: dict[tuple[str, str], bool] = {}
    for name, node in zip(graph.outputs.names, graph.outputs.nodes, strict=True):
        layer = donor.layers.split(name) if len(graph.shape(node)) >= 2 and name.endswith(".weight") else None
        if layer is None or layer.stack not in stacks or not graph.node_dtype[node].is_wide_float:
            continue
        position, stack = stacks[layer.stack]
        beyond = layer.index - len(stack.inputs)
        number, index = stack.inputs[min(layer.index, len(stack.inputs) - 1)][0]
        if number == built.donor:
            continue
        own = built.models[number].stack(position)
        index = index if beyond < 0 else own.count + beyond
        rest = layer.rest.removesuffix(".weight")
        kind = layer.stack, without_numbers(f".{rest}")
        if kind not in kinds:
            indices = (*range(stack.donor.count), *stack.donor.extras)
            kinds[kind] = lists[built.donor].names(stack.donor, indices, rest)
        if kinds[kind] or lists[number].names(own, (index,), rest):
            yield name.removesuffix(".weight")


class _Listed:
    """What the lists in a model's config.json name.

    Args:
        model: the model.
    """

    def __init__(self, model: Model) -> None:
        self._lists = skip_lists(model.checkpoint.config)
        self._names = {each.prefix: _names_of(each.prefix, model) for each in model.layers.mains if self._lists}

    def names(self, stack: Stack, layers: Iterable[int], module: str) -> bool:
        """Whether one of the lists names a module in any of some layers of a main stack."""
        prefixes = self._names.get(stack.prefix, ())
        modules = [f"{prefix}.{layer}.{module}" for layer in layers for prefix in prefixes]
        return any(each.entry_of(name) is not None for each in self._lists for name in modules)


def _names_of(prefix: str, model: Model) -> tuple[str, ...]:
    """A stack's prefix, and the others by which the lists in a model's config.json name its layers."""
    described = quantization_config(model.checkpoint.config)
    section = {} if described is None else described[1]
    stacks = tuple(each.prefix for each in model.layers.stacks)
    found = {prefix: None}
    for entry in (each for name in KEYS if isinstance(section.get(name), list) for each in section[name]):
        match = _LAYER.match(entry) if isinstance(entry, str) else None
        if match is not None and _stacks_named(match[2], stacks) == (prefix,):
            found[match[2].replace("\\", "")] = None
    return tuple(found)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a section, among them its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from (str(key), *_texts(each))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)
