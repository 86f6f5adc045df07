"""Finds names with the prefix of a wrapper, such as DDP or a Lightning module, which programs don't find by them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from ....io.checkpoint.checkpoint import Checkpoint
from ....io.open_source import quoted
from ....io.units import listed, plural
from .names import rename_script

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


def wrapped_names(checkpoint: Checkpoint, parts: Collection[str]) -> Iterator[str]:
    """The reason why names with the prefix of a wrapper can't be merged, as a text that continues the model's name.

    Args:
        checkpoint: the checkpoint.
        parts: components of the names of its tensors.
    """
    if (wrapped := _unwrapping(checkpoint, parts)) is not None:
        yield _describe_wrapper(checkpoint, *wrapped)
    elif (misplaced := _unexpected_prefix(checkpoint)) is not None:
        yield _describe_prefix(checkpoint, *misplaced)


def _unwrapping(checkpoint: Checkpoint, parts: Collection[str]) -> tuple[str, str, int] | None:
    """The prefix of a wrapper in tensor names, Python code that removes it from `name`, and the number of names."""
    names = checkpoint.tensors
    inserted = [wrapper for wrapper in _WRAPPERS if wrapper in parts]
    if inserted:
        pattern = "|".join(inserted)
        count = sum(not set(inserted).isdisjoint(name.split(".")) for name in names)
        code = f're.sub(r"\\b(?:{pattern})\\.", "", name)'
        prefix = inserted[0] + "."
    else:
        prefix = next((prefix for prefix in _WRAPPER_PREFIXES if all(name.startswith(prefix) for name in names)), "")
        code, count = "name", len(names)
    if not prefix:
        return None
    for outer in _WRAPPER_PREFIXES:
        if all(re.sub("|".join(rf"\b{w}\." for w in _WRAPPERS), "", name).startswith(outer) for name in names):
            code += f".removeprefix({outer!r})"
    return prefix, code, count


def _unexpected_prefix(checkpoint: Checkpoint) -> tuple[str, str, str] | None:
    """The prefix of the names of a model whose architecture has none, that architecture, and the embedding's name.

    Whether it is a prefix is only known where the architecture is: the code of other models may use any names.
    """
    config = checkpoint.config or {}
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or "auto_map" in config or _has_parts(config):
        return None
    architecture = str(architectures[0])
    expected = _embeddings(architecture)
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


def _embeddings(architecture: str) -> tuple[str, ...]:
    """The names that the embedding of an architecture can have; empty if they aren't known."""
    if match := _ENCODER.fullmatch(architecture):
        encoder = _NAMES_OF_ENCODERS.get(match[1], match[1].lower())
        return f"{encoder}.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"
    if _ENCODER_DECODER.fullmatch(architecture):
        return "model.shared.weight", "model.decoder.embed_tokens.weight"
    if _T5.fullmatch(architecture):
        return "shared.weight", "transformer.shared.weight"
    return _DECODER_EMBEDDINGS if _DECODER.fullmatch(architecture) else ()


def _describe_wrapper(checkpoint: Checkpoint, prefix: str, code: str, count: int) -> str:
    example = next(name for name in checkpoint.tensors if prefix in name)
    return (
        f"has names with {prefix!r}, which a wrapper such as DDP, FSDP, torch.compile or PEFT adds during training: "
        f"{count} of its {plural(len(checkpoint.tensors), 'tensor')}, such as {quoted(example)}. "
        + _advise(checkpoint, code)
    )


def _describe_prefix(checkpoint: Checkpoint, prefix: str, architecture: str, embedding: str) -> str:
    names = checkpoint.tensors
    others = [name for name in names if not name.startswith(prefix)]
    kept = f" The other {plural(len(others), 'tensor')} ({listed(others)}) keep their names." if others else ""
    return (
        f"has names with {prefix!r}, which a module around the model adds during training (a Lightning module, say): "
        f"{architecture} (config.json) has {quoted(embedding)}, not {quoted(prefix + embedding)}, and "
        f"{len(names) - len(others)} of the {plural(len(names), 'tensor')} have the prefix.{kept} "
        + _advise(checkpoint, f"name.removeprefix({prefix!r})")
    )


def _advise(checkpoint: Checkpoint, code: str) -> str:
    return (
        "No program would find them by these names in the output. Rename them in a copy of the model, and use that:\n\n"
        + rename_script(checkpoint, code)
    )
