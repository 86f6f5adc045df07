"""Finds names with the prefix of a wrapper, such as DDP or a Lightning module, which programs don't find by them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ....io.checkpoint.checkpoint import Checkpoint
from ....io.open_source import quoted
from ....io.units import listed, plural
from .names import rename_entry, rename_script

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Components that wrappers insert into names, at any depth: torch.compile, FSDP, checkpointing, Lightning Fabric."""
_WRAPPER_PREFIXES = ("module.", "base_model.model.")
"""Prefixes that a wrapper adds to all names: DataParallel and DDP, PEFT."""
_DECODER = re.compile(r"\w+(?:ForCausalLM|LMHeadModel|ForSequenceClassification|ForTokenClassification)")
_ENCODER = re.compile(
    r"(Bert|Roberta|XLMRoberta|Camembert|DistilBert|Deberta|DebertaV2|Electra|MPNet|Albert)"
    r"(?:Model|For(?:MaskedLM|PreTraining|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice))"
)
_ENCODER_DECODER = re.compile(
    r"(?:Bart|MBart|Pegasus|Marian|M2M100|Whisper|Blenderbot|BlenderbotSmall)(?:ForConditionalGeneration|MTModel)"
)
_T5 = re.compile(r"(?:T5|MT5|UMT5)(?:Model|EncoderModel|For\w+)")
_DECODER_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "model.tok_embeddings.weight",
    "transformer.wte.weight",
    "transformer.word_embeddings.weight",
    "gpt_neox.embed_in.weight",
    "backbone.embeddings.weight",
)
_NAMES_OF_ENCODERS = {"XLMRoberta": "roberta", "Camembert": "roberta", "DebertaV2": "deberta"}
"""Names of the encoder in a model with a head, where they aren't the architecture's in lowercase."""
_PARTS_OF_MODELS = ("language_model.",)
"""Prefixes that models with other inputs have, which may have been saved with the configuration of their text part."""


@dataclass(frozen=True, slots=True)
class _Wrapper:
    """What a wrapper adds to the names of tensors.

    Args:
        prefix: the prefix to name in the error.
        inserted: components that are removed wherever they are.
        outer: prefixes that are removed after that, in this order.
        count: number of names that change.
    """

    prefix: str
    inserted: tuple[str, ...]
    outer: tuple[str, ...]
    count: int

    @property
    def code(self) -> str:
        """Python code that computes the new name from `name`."""
        pattern = "|".join(self.inserted)
        code = f're.sub(r"\\b(?:{pattern})\\.", "", name)' if pattern else "name"
        return code + "".join(f".removeprefix({outer!r})" for outer in self.outer)

    def pairs(self, names: Collection[str]) -> list[tuple[str, str]]:
        """The prefixes to remove, the longest first; empty if more than prefixes must be removed."""
        prefixes: set[str] = set()
        for name in names:
            new = re.sub(rf"\b(?:{'|'.join(self.inserted)})\.", "", name) if self.inserted else name
            for outer in self.outer:
                new = new.removeprefix(outer)
            if not name.endswith(new):
                return []
            prefixes.add(name.removesuffix(new))
        return [(prefix, "") for prefix in sorted(prefixes - {""}, key=lambda each: (-len(each), each))]


def wrapped_names(checkpoint: Checkpoint, parts: Collection[str]) -> Iterator[str]:
    """The reason why names with the prefix of a wrapper can't be merged, as a text that continues the model's name.

    Args:
        checkpoint: the checkpoint.
        parts: components of the names of its tensors.
    """
    if (wrapped := _unwrapping(checkpoint, parts)) is not None:
        yield _describe_wrapper(checkpoint, wrapped)
    elif (misplaced := _unexpected_prefix(checkpoint)) is not None:
        yield _describe_prefix(checkpoint, *misplaced)


def _unwrapping(checkpoint: Checkpoint, parts: Collection[str]) -> _Wrapper | None:
    """What a wrapper has added to the names; None if nothing."""
    names = checkpoint.tensors
    inserted = tuple(wrapper for wrapper in _WRAPPERS if wrapper in parts)
    if inserted:
        count = sum(not set(inserted).isdisjoint(name.split(".")) for name in names)
        prefix = inserted[0] + "."
    else:
        prefix = next((prefix for prefix in _WRAPPER_PREFIXES if all(name.startswith(prefix) for name in names)), "")
        count = len(names)
    if not prefix:
        return None
    bare = [re.sub("|".join(rf"\b{w}\." for w in _WRAPPERS), "", name) for name in names]
    outer = tuple(outer for outer in _WRAPPER_PREFIXES if all(name.startswith(outer) for name in bare))
    return _Wrapper(prefix, inserted, outer, count)


def _unexpected_prefix(checkpoint: Checkpoint) -> tuple[str, str, str] | None:
    """The prefix of the names of a model whose architecture has none, that architecture, and the embedding's name.

    Whether it is a prefix is only known where the architecture is: the code of other models may use any names.
    """
    config = checkpoint.config or {}
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or "auto_map" in config or _has_parts(config):
        return None
    architecture = str(architectures[0])
    expected = expected_embeddings(architecture)
    names = checkpoint.tensors
    if not expected or any(name in names for name in expected):
        return None
    for name in names:
        for embedding in expected:
            prefix = name.removesuffix(embedding)
            if prefix == name or not prefix.endswith(".") or prefix in _PARTS_OF_MODELS:
                continue
            if 2 * sum(each.startswith(prefix) for each in names) > len(names):
                return prefix, architecture, embedding
    return None


def _has_parts(config: Mapping[str, object]) -> bool:
    """Whether a model consists of several, each with a section in config.json."""
    return any(
        key.endswith("_config") and isinstance(value, dict) and {"model_type", "hidden_size"} & value.keys()
        for key, value in config.items()
    )


def expected_embeddings(architecture: str) -> tuple[str, ...]:
    """The names that the embedding of an architecture can have; empty if they aren't known."""
    if match := _ENCODER.fullmatch(architecture):
        encoder = _NAMES_OF_ENCODERS.get(match[1], match[1].lower())
        return f"{encoder}.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"
    if _ENCODER_DECODER.fullmatch(architecture):
        return "model.shared.weight", "model.decoder.embed_tokens.weight"
    if _T5.fullmatch(architecture):
        return "shared.weight", "transformer.shared.weight"
    return _DECODER_EMBEDDINGS if _DECODER.fullmatch(architecture) else ()


def _describe_wrapper(checkpoint: Checkpoint, wrapper: _Wrapper) -> str:
    names, prefix = checkpoint.tensors, wrapper.prefix
    example = next(name for name in names if prefix in name)
    return (
        f"has names with {prefix!r}, which a wrapper such as DDP, FSDP, torch.compile or PEFT adds during training: "
        f"{wrapper.count} of its {plural(len(names), 'tensor')}, such as {quoted(example)}. "
        + _advise(checkpoint, wrapper.pairs(names), wrapper.code)
    )


def _describe_prefix(checkpoint: Checkpoint, prefix: str, architecture: str, embedding: str) -> str:
    names = checkpoint.tensors
    others = [name for name in names if not name.startswith(prefix)]
    kept = f" The other {plural(len(others), 'tensor')} ({listed(others)}) keep their names." if others else ""
    return (
        f"has names with {prefix!r}, which a module around the model adds during training (a Lightning module, say): "
        f"{architecture} (config.json) has {quoted(embedding)}, not {quoted(prefix + embedding)}, and "
        f"{len(names) - len(others)} of the {plural(len(names), 'tensor')} have the prefix.{kept} "
        + _advise(checkpoint, [(prefix, "")], "")
    )


def _advise(checkpoint: Checkpoint, pairs: Collection[tuple[str, str]], code: str) -> str:
    """What to do: a line of the recipe if prefixes are enough, or else a script that runs `code` on each name."""
    problem = "No program would find them by these names in the output."
    if pairs:
        return f"{problem} Rename them in the recipe's entry of the model:\n\n    {rename_entry(pairs)}"
    return f"{problem} Rename them in a copy of the model, and use that:\n\n{rename_script(checkpoint, code)}"
