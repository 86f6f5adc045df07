"""Which tensors belong to which layer, and what the others are: from tensor names and config.json alone.

A stack is a list of layers: `model.layers.12.mlp.up_proj.weight` is `mlp.up_proj.weight` of layer 12 of the stack
`model.layers`. Only the outermost number counts, so that experts are no layers. No architecture is known by name: the
main stack is the one with as many layers as config.json says.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import CheckpointError

_SIDE_KEYS = ("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers", "layers", "num_blocks")
COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers", "depth", *_SIDE_KEYS)
"""The keys under which a config.json states its number of layers, the commonest first."""

LENGTH_KEYS = ("layers_block_type", "layer_types", "hybrid_override_pattern", "block_configs")
"""Keys of lists, or of strings of letters, with one entry a layer; they count where no number is stated."""

_LAYERS = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|encoder_layers|decoder_layers)$")
_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,5})(?=\.|$)")
_LANGUAGE = re.compile(r"(?<![a-z])(?:text|language|llm|lm|thinker|decoder)(?![a-z])")
_EYES = "vision|visual|image|img|vit|vpm|sam|video"
_IN = rf"{_EYES}|audio|apm|speech|acoustic|conformer|qformer|resampler|(?<!vocab_)projector|connector|aligner|merger"
_OUT = "mtp|nextn|eagle|medusa|talker|depth_decoder|codec|token2wav|code2wav"
_SIDE_IN = re.compile(rf"(?<![a-z])(?:{_IN})(?![a-z])")
_SIDE_OUT = re.compile(rf"(?<![a-z])(?:{_OUT})(?![a-z])")
_VISION = re.compile(rf"(?<![a-z])(?:{_EYES})(?![a-z])")


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of layers.

    Args:
        prefix: what stands before the layer's number, such as ``model.layers``.
        count: how many layers it has: 0 .. count - 1.
        extras: numbers beyond the count, such as 61 for the prediction head that DeepSeek-V3 keeps as a layer.
        config_path: the keys that lead to the config with the count: () for the top of config.json.
        config_key: the key of the count there; None where no number is stated.
    """

    prefix: str
    count: int
    extras: tuple[int, ...] = ()
    config_path: tuple[str, ...] = ()
    config_key: str | None = None


@dataclass(frozen=True, slots=True)
class LayerName:
    """A tensor's name, taken apart: ``stack.index.rest``. `extra` tells that the layer lies beyond the count."""

    stack: str
    index: int
    rest: str
    extra: bool


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The layers of one checkpoint.

    Args:
        stacks: every numbered list outside of layers, the main ones first: also a vision tower's.
        mains: the stacks that a recipe slices: one; encoder and decoder where there are both; none without layers.
    """

    stacks: tuple[Stack, ...]
    mains: tuple[Stack, ...]
    _parts: tuple[tuple[Stack, str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_parts", _parts(self.stacks, self.mains))

    @property
    def main(self) -> Stack:
        """The main stack; of an encoder-decoder model the encoder's. Without layers, one with none of them."""
        return self.mains[0] if self.mains else Stack("", 0)

    def split(self, name: str) -> LayerName | None:
        """`name` taken apart, or None where it lies outside the main stacks' layers. Extra layers are not outside."""
        for stack in self.mains:
            prefix = stack.prefix
            start = len(prefix)
            if name.startswith(prefix) and (match := _NUMBER.match(name, start)):
                index = int(match[1])
                return LayerName(prefix, index, sys.intern(name[match.end() + 1 :]), index >= stack.count)
        return None

    def is_after(self, name: str) -> bool:
        """Whether a tensor outside the layers comes after them, and takes the parameters of the last slice.

        Judged by its name: heads, final norms and poolers come after; embeddings before, and so do a vision tower and
        its projector, which make the layers' input. What no rule knows comes before, as in mergekit's own guess.
        """
        text = name.lower()
        if not _is_aside(self.main.prefix) and (_SIDE_OUT.search(text) or _SIDE_IN.search(text)):
            return _SIDE_OUT.search(text) is not None
        return bool(_AFTER.search(text)) or (not _BEFORE.search(text) and bool(_END.search(text)))

    def module(self, key: str) -> Stack | None:
        """The stack that a recipe's ``modules:`` addresses as `key`, or None.

        `key` is a stack's prefix, a dotted beginning that it shares with no other, one of its components (``encoder``,
        ``decoder``, ``language_model``), or mergekit's ``text_decoder``, ``default``, ``vision_tower``.
        """
        for stack, beginning in self._parts:
            if key in (stack.prefix, beginning):
                return stack
        found = [stack for stack, _ in self._parts if key in stack.prefix.split(".")]
        if not found and len(self.mains) == 1 and key in ("text_decoder", "default", "language_model"):
            found = [self.main]
        if not found and _VISION.search(key):
            found = [stack for stack, _ in self._parts if _VISION.search(stack.prefix)]
        return found[0] if len(found) == 1 else None

    def owner(self, name: str) -> Stack | None:
        """The stack to whose part of the model a tensor belongs, in a layer or beside them.

        The rest belongs to the main stack. Of an encoder-decoder model it belongs to none: T5's ``shared.weight``.
        """
        for stack, beginning in self._parts:
            if _under(name, beginning):
                return stack
        return self.mains[0] if len(self.mains) == 1 else None

    def on(self, stack: Stack) -> LayerMap:
        """The same checkpoint with `stack` as its only main stack, for a module of a recipe."""
        return replace(self, mains=(stack,))


def _parts(stacks: Iterable[Stack], mains: tuple[Stack, ...]) -> tuple[tuple[Stack, str], ...]:
    """Stacks of real layers, and the shortest beginning of each one's prefix that no other of them has."""
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
    """A number of layers that config.json states, or implies by the length of a list: then without a key."""

    path: tuple[str, ...]
    key: str | None
    value: int

    def __str__(self) -> str:
        return f"{'.'.join((*self.path, self.key or 'layer_types'))} = {self.value}"


def find_layers(names: Iterable[str], config: Mapping[str, Any] | None = None) -> LayerMap:
    """The stacks of layers among tensor names.

    Args:
        names: the names of all tensors of a checkpoint.
        config: its config.json, or None. Without a count there, the largest stack is the main one.

    Raises:
        CheckpointError: no stack has the number of layers that `config` states, or several could be meant.
    """
    names = tuple(names)
    config = config or {}
    outermost = _scan(names, 1)
    for depth in (1, 2, 3):  # deeper where the outermost numbers count no layers: `stages.0.layers.11`
        found = outermost if depth == 1 else _scan(names, depth)
        pair = _pair(found, config)
        if mains := _single(found, config, depth) if pair is None else pair:
            others = [_stack(prefix, found[prefix]) for prefix in found if all(prefix != m.prefix for m in mains)]
            return LayerMap((*mains, *sorted(others, key=lambda s: (-s.count, s.prefix))), mains)
        if pair == ():
            break
    counts = _counts(config)
    if not counts and not outermost:
        return LayerMap((), ())
    said = " and ".join(str(count) for count in counts) or "nothing of layers"
    raise CheckpointError(
        f"config.json says {said}, but the tensors' names do not tell which stack that is: {_describe(outermost)}. "
        "Either tensors are missing, or config.json belongs to another model, or its layers are spread over several "
        "lists, which mergeloom does not know how to slice."
    )


def _scan(names: Iterable[str], depth: int) -> dict[str, set[int]]:
    """The numbers after each prefix, taking the `depth`-th number of a name from the left. A leading one is skipped:
    sentence-transformers numbers its modules (`0.auto_model.encoder.layer.3`)."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        match = _NUMBER.search(name)
        for _ in range(depth - 1):
            match = match and _NUMBER.search(name, match.end())
        if match:
            found[name[: match.start()]].add(int(match[1]))
    return dict(found)


def _single(found: Mapping[str, set[int]], config: Mapping[str, Any], depth: int) -> tuple[Stack, ...]:
    """The one main stack, or () where none can be told."""
    if depth > 1:  # inside a layer only a list that is called layers can hold layers: no experts
        found = {prefix: numbers for prefix, numbers in found.items() if _LAYERS.search(prefix)}
    pool = {prefix: numbers for prefix, numbers in found.items() if not _is_aside(prefix)}
    if not any(_LAYERS.search(prefix) for prefix in pool):
        pool = dict(found)  # a vision or speech model alone
    counts = _counts(config)
    for exact in (True, False):
        for count in counts:
            prefix = _likeliest([p for p, numbers in pool.items() if _fits(numbers, count, exact)])
            if prefix is not None:
                return (_stack(prefix, found[prefix], count),)
    if counts or not pool:
        return ()
    largest = max(len(numbers) for numbers in pool.values())
    prefix = _likeliest([p for p, numbers in pool.items() if len(numbers) == largest])
    if prefix is None or (largest == 1 and not _LAYERS.search(prefix)):
        return ()
    path = next((path for path, _ in _sections(config) if path and _LANGUAGE.search(path[-1])), ())
    stack = replace(_stack(prefix, found[prefix]), config_path=path)  # LLaVA's text_config states no count
    return () if stack.extras else (stack,)


def _pair(found: Mapping[str, set[int]], config: Mapping[str, Any]) -> tuple[Stack, ...] | None:
    """Encoder and decoder: two prefixes that part where one has `encoder` and the other `decoder`.

    None where there are no such two, () where config.json states other counts than they have.
    """
    prefixes = [prefix for prefix in found if _LAYERS.search(prefix) and not _is_aside(prefix)]
    pairs = [(e, d) for e in prefixes for d in prefixes if _are_sides(e.split("."), d.split("."))]
    if not pairs:
        return None
    largest = max(pairs, key=lambda pair: len(found[pair[0]]) + len(found[pair[1]]))
    stacks = []
    for prefix, side, other in zip(largest, ("encoder", "decoder"), ("decoder", "encoder"), strict=True):
        # A section of its own (T5Gemma's "decoder") knows best, then the side's own keys, then the common ones.
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
    """The configs that can speak of the language layers: nested ones that are called so, the top, other nested ones."""
    found: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), config)]
    for path, section in found:  # grows while it is walked
        for key, value in section.items():
            is_section = key.endswith("_config") or key in ("encoder", "decoder")
            if is_section and isinstance(value, Mapping) and len(path) < 3 and not _is_aside(key):
                found.append(((*path, key), value))
    return sorted(found, key=lambda item: 1 if not item[0] else (0 if _LANGUAGE.search(item[0][-1]) else 2))


def _counts(config: Mapping[str, Any]) -> list[_Count]:
    """Every number of layers that config.json states for the language part, the likeliest first."""
    counts = []
    for path, section in _sections(config):
        found = [_Count(path, key, section[key]) for key in COUNT_KEYS if _is_count(section.get(key))]
        if not found:
            lists = [section[key] for key in LENGTH_KEYS if isinstance(section.get(key), (list, str)) and section[key]]
            found = [_Count(path, None, len(lists[0]))] if lists else []
        counts += found
    return counts


def _fits(numbers: set[int], count: _Count, exact: bool) -> bool:
    """Whether the numbers are 0 .. count - 1, or, where `exact` is false, those and at most as many beyond."""
    within = count.value <= len(numbers) <= count.value * (1 if exact else 2)  # first: a config may say any number
    return within and numbers >= set(range(count.value))


def _likeliest(prefixes: Sequence[str]) -> str | None:
    """The one of several stacks of equal size that is called like the layers of a language model; None if unclear."""
    for pattern in (_LAYERS, _LANGUAGE):
        if len(prefixes) > 1:
            prefixes = [prefix for prefix in prefixes if pattern.search(prefix.lower())] or prefixes
    return prefixes[0] if len(prefixes) == 1 else None


def _stack(prefix: str, numbers: set[int], count: _Count | None = None) -> Stack:
    """A stack with as many layers as are stated, else as many as are numbered without a gap."""
    layers = count.value if count else next(i for i in range(len(numbers) + 1) if i not in numbers)
    path, key = (count.path, count.key) if count else ((), None)
    return Stack(prefix, layers, tuple(sorted(i for i in numbers if i >= layers)), path, key)


def _describe(found: Mapping[str, set[int]]) -> str:
    """`model.layers has 0-4, 6-31` for the largest few stacks."""
    parts = []
    for prefix, numbers in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))[:5]:
        starts = (i for i in sorted(numbers) if i - 1 not in numbers)
        ends = (i for i in sorted(numbers) if i + 1 not in numbers)
        runs = [f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True)]
        parts.append(f"{prefix} has {', '.join(runs[:6])}{', ...' if len(runs) > 6 else ''}")
    return "; ".join(parts) or "no name has a number in it"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_aside(prefix: str) -> bool:
    return bool(_SIDE_IN.search(prefix.lower()) or _SIDE_OUT.search(prefix.lower()))


def _under(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(beginning + ".")


# Roles: what a tensor is, by its name.

_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head(?:\.decoder|\.out_proj)?|generator_lm_head|embed_out|output|output_layer|output_projection"
    r"|vocab_projector|cls\.predictions\.decoder|pred_layer\.proj|lm_loss|ff_out)\.weight$|^(?:decoder|proj_out)\.weight$"
)
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings?|tok_embeddings|token_embeddings?|tokens_embed|embed_in|shared"
    r"|embeddings)\.weight$"
)
_BUFFER = re.compile(
    r"(?:original_)?inv_freq|cos_cached|sin_cached|freqs_cis|masked_bias|causal_mask|attn_mask|tril|position_ids|version"
    r"|token_type_ids|num_batches_tracked|relative_position_index|relative_coords_table|_float_tensor"
)
_MASK = re.compile(r"(?:^|\.)(?:attn|attention|self_attn|self_attention|crossattention)\.bias$")
_AFTER = re.compile(
    r"(?:^|\.)(?:(?:\w*_)?heads?|score|(?:\w*_)?classifier|(?:\w*_)?pooler|cls|\w*unembed\w*|(?:\w*_)?logits?(?:_\w+)?"
    r"|(?:\w*_)?outputs?(?:_\w+)?|embed_out|out_proj|proj_out|project_out|text_projection|(?:\w*_)?predictions?|vocab_\w+"
    r"|lm_loss|pred_layer|ff_out|seq_relationship|embedding_norm|mlm_\w+)(?=\.|$)|^decoder\.(?:weight|bias)$"
)
_BEFORE = re.compile(
    r"embed|(?:^|\.)(?:wte|wpe|shared|emb|rotary\w*|rope)(?=\.|$)|position|token|per_layer|pre_?la?ye?r_?norm"
    r"|layernorm_pre|ln_pre|norm_pre"
)
_END = re.compile(r"(?:^|\.)(?:\w*(?:norm|(?:^|_|\b)ln)(?:_\w+)?|final_\w+|merger|projector)(?=\.|$)")


def is_head(name: str) -> bool:
    """Whether a tensor is a language model's output matrix: ``lm_head.weight``, ``output.weight``, nested ones too."""
    return bool(_HEAD.search(name)) and not _NUMBER.search(name) and not _is_aside(name)


def is_embedding(name: str) -> bool:
    """Whether a tensor is the matrix of token embeddings, which a tied head can stand for."""
    return bool(_EMBEDDING.search(name)) and not _NUMBER.search(name) and not _is_aside(name)


def tied_embedding(head: str, names: Iterable[str]) -> str | None:
    """The embedding among `names` that stands for the missing `head`; None where there is none.

    The nearest is meant: the one that shares the longest beginning with the head; a matrix shared by encoder and
    decoder before either one's own, the decoder's before the encoder's.
    """

    def distance(name: str) -> tuple[int, bool, bool, int, str]:
        components = name.split(".")
        shared = sum(name.startswith(head[: dot.end()]) for dot in re.finditer(r"\.", head))
        return (-shared, "shared" not in components, not _LANGUAGE.search(name), len(components), name)

    return min(filter(is_embedding, names), key=distance, default=None)


def is_optional(name: str) -> bool:
    """Whether a tensor may be missing from some inputs: heads, biases, T5's relative positions (first layers only)."""
    return name.endswith((".bias", "proj_bias", ".relative_attention_bias.weight")) or name == "bias" or is_head(name)


def is_buffer(name: str, shape: Sequence[int] | None = None) -> bool:
    """Whether a tensor is no parameter, such as rotary frequencies, position ids or a causal mask.

    `shape` tells GPT-2's causal mask ``attn.bias``, which is (1, 1, n, n), from a bias of that name.
    """
    is_square = shape is not None and len(shape) == 4 and tuple(shape[:2]) == (1, 1) and shape[2] == shape[3]
    is_named = _BUFFER.fullmatch(name.rpartition(".")[2]) is not None or name.endswith("rope.freqs")
    return is_named or (is_square and bool(_MASK.search(name)))
