"""Checks that an adapter has the tensors that its adapter_config.json says were trained.

PEFT loads an adapter without them, and the model then has the base's values in their place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ....errors import CheckpointError
from ..logical import Tensors
from ..roles import is_embedding, is_head
from .changes import BIAS, TOKENS, B
from .config import CONFIG
from .loaded import Adapter


def check_complete(
    adapter: Adapter, tensors: Tensors, config: Mapping[str, Any] | None, stacks: Collection[str]
) -> None:
    """Check that nothing is missing in an adapter.

    Args:
        adapter: the adapter.
        tensors: tensors of the base.
        config: config.json of the base, or None.
        stacks: the modules of the adapter that wrap fused experts.

    Raises:
        CheckpointError: the adapter lacks tensors that its config says were trained, and that the base has.
    """
    tied = bool((config or {}).get("tie_word_embeddings", True))
    missing = next(_missing(adapter, tensors, stacks, tied=tied), None)
    if missing is not None:
        raise CheckpointError(
            f"{adapter.name}: {CONFIG} has {missing}: the file is incomplete; save or download the adapter again"
        )


def _missing(adapter: Adapter, tensors: Tensors, stacks: Collection[str], *, tied: bool) -> Iterator[str]:
    """What the config says was trained, each with the tensors that the adapter lacks."""
    config, changes = adapter.config, adapter.changes
    for saved in config.modules_to_save:
        if any(_is_in(name, saved) for name in changes.replaced):
            continue
        of_base = [name for name in tensors if _is_in(name, saved)]
        saved_once = tied and any(is_head(name) or is_embedding(name) for name in of_base)  # PEFT saves one of the two
        if of_base and not saved_once:
            yield f"{saved} in modules_to_save, but the adapter has none of its tensors, such as {of_base[0]}"
    if config.trains_tokens and not any(TOKENS in stored for stored in changes.modules.values()):
        yield f"trainable_token_indices, but the adapter has no {TOKENS}"
    if config.lora_bias:
        lacking = (module for module, stored in changes.modules.items() if B in stored and BIAS not in stored)
        yield from (f"lora_bias, but {module} has no {BIAS}" for module in lacking)
    if config.bias == "all" and not _has_biases(adapter):
        biases = (name for name in tensors if name.endswith(".bias"))
        yield from (f"bias: all, but the adapter has no biases, such as {name}" for name in biases)
    experts = [target for target in config.target_parameters if "experts." in target]
    if experts and not stacks and any(".experts." in name for name in tensors):
        yield f"{experts[0]} in target_parameters, but the adapter has no factors of experts"


def unsaved_biases(adapter: Adapter, tensors: Tensors) -> str:
    """Return a remark if biases next to the factors were trained and are not in the adapter; empty otherwise.

    Many versions of PEFT did not save them (huggingface/peft issue 3306), so the file is as complete as it can be.
    """
    if adapter.config.bias != "lora_only" or _has_biases(adapter):
        return ""
    modules = tuple([module.removeprefix("model.") for module in adapter.changes.modules])
    names = (name for name in tensors if name.endswith(".bias"))
    trained = next((name for name in names if name.removesuffix(".bias").endswith(modules)), None)
    if trained is None:
        return ""
    return (
        f"{adapter.name}: {CONFIG} has bias: lora_only, but the adapter has no biases, such as {trained}: they stay "
        "those of the base, as when PEFT loads it"
    )


def _has_biases(adapter: Adapter) -> bool:
    return any(name.endswith(".bias") for name in adapter.changes.replaced)


def _is_in(name: str, module: str) -> bool:
    """Whether a tensor belongs to a module, whose path is known from its end on."""
    return f".{module}." in f".{name}"
