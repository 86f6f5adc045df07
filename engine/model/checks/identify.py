"""Decides from file and tensor names whether a checkpoint is a model, and explains what else it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ....errors import CheckpointError
from ....io.checkpoint.checkpoint import Checkpoint
from ....io.checkpoint.file_sets import ADAPTER, shard_number
from ....io.open_source import quoted
from ....io.tensors.table import components, described
from ....io.units import listed, plural
from ..adapters.loaded import adapter_config
from ..contents.adapters import ADAPTER_PARTS, find_adapter, is_textual_inversion
from ..roles import is_buffer
from .names import directory_of
from .wrappers import wrapped_names

_OPTIMIZER_PARTS = frozenset(
    ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_avg_sq_row", "exp_avg_sq_col", "square_avg"]
)
"""Components of tensor names in the state of optimizers: Adam, SGD, Adafactor, RMSprop."""
_MODEL_FILES = ("model", "pytorch_model", "diffusion_pytorch_model", "consolidated")


def check_is_model(name: str, checkpoint: Checkpoint) -> None:
    """Check that an input is a model whose tensors can be merged by name.

    Args:
        name: name of the input in the recipe.
        checkpoint: the input.

    Raises:
        CheckpointError: it is an adapter, the state of an optimizer or something else that is not a model, a part of
            one, or a model whose tensors are empty or have names with the prefix of a wrapper.
    """
    for problem in not_a_model(checkpoint):
        raise CheckpointError(f"{name} {problem}")


def not_a_model(checkpoint: Checkpoint) -> Iterator[str]:
    """The reasons why a checkpoint is not a model that can be merged, as texts that continue its name."""
    parts = components(checkpoint.tensors)
    if (evidence := _adapter_evidence(checkpoint, parts)) is not None:
        yield _describe_adapter(checkpoint, evidence)
    if not _OPTIMIZER_PARTS.isdisjoint(parts):
        yield (
            "is the state of an optimizer, not a model (it has a tensor "
            f"{_example(checkpoint, _OPTIMIZER_PARTS)}): use the directory with the model's weights"
        )
    if is_textual_inversion(checkpoint.tensors):
        yield (
            f"contains the embeddings of a textual inversion, not a model (tensors: {listed(checkpoint.tensors)}): "
            "load them into the text encoder, and merge that"
        )
    if (number := _lone_shard(checkpoint)) is not None:
        yield (
            f"is shard {number[0]} of {number[1]} of a model: use the path of the directory, or of the index, to merge "
            "all shards"
        )
    yield from wrapped_names(checkpoint, parts)
    yield from _empty_tensors(checkpoint)


def _example(checkpoint: Checkpoint, parts: Collection[str]) -> str:
    """The first tensor whose name has one of these components, quoted."""
    return quoted(next(name for name in checkpoint.tensors if any(part in parts for part in name.split("."))))


# ------------------------------------------------------------------------------------------------ adapters


def _adapter_evidence(checkpoint: Checkpoint, parts: Collection[str]) -> str | None:
    """Why a checkpoint is an adapter, or None. A model may include adapters: Phi-4-multimodal has two."""
    files = [file.name for file in checkpoint.files]
    adapters = [name for name in (*files, *(file.name for file in checkpoint.ignored)) if name.startswith(ADAPTER)]
    if adapters and not any(name.startswith(_MODEL_FILES) for name in files):
        return f"its weights are in {adapters[0]}"
    if "base_layer" in parts and "default" in parts and not ADAPTER_PARTS.isdisjoint(parts):
        return f"it has both {_example(checkpoint, ('base_layer',))} and {_example(checkpoint, ADAPTER_PARTS)}"
    adapter = find_adapter(checkpoint.tensors)
    return None if adapter is None else f"it has a tensor {quoted(adapter.example)}"


def _describe_adapter(checkpoint: Checkpoint, evidence: str) -> str:
    adapter = find_adapter(checkpoint.tensors)
    config = _config_of(checkpoint)
    base = config.get("base_model_name_or_path")
    kind = str(config["peft_type"]) if "peft_type" in config else (adapter.kind if adapter is not None else None)
    what = {"LORA": "a LoRA adapter", None: "an adapter"}.get(kind, f"an adapter ({kind})")
    named = isinstance(base, str) and bool(base)
    of_base = f" of {base}" if named else ""
    if adapter is not None and adapter.ranks:
        evidence += f"; {adapter.title.partition(' of ')[2]}"
    start = f"is {what}{of_base}, not a model ({evidence}): "
    if adapter is not None and adapter.kind == "IP-Adapter":
        return f"{start}it adds inputs to a diffusion model. Load it next to a merged model, and leave it out of merges"
    source = directory_of(checkpoint)
    if config.get("peft_type") == "LORA":
        return f"{start}for the model with the adapter, write `{base if named else 'BASE'}+{source}`"
    start += (
        "only LoRA adapters in PEFT's format can be applied while merging; merge it into its base model first, and use "
        "the "
    )
    if adapter is not None and adapter.diffusion:
        return (
            f"{start}new file: ComfyUI does that for all kinds (Load LoRA, then Save Checkpoint), and for LoRA, "
            "kohya's sd-scripts do, too (networks/merge_lora.py, sdxl_merge_lora.py and flux_merge_lora.py)"
        )
    target = source + "-merged" if not hasattr(checkpoint, "repository") else source.rpartition("/")[2] + "-merged"
    return (
        f"{start}new directory:\n\n"
        "    from peft import PeftModel\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"    base, adapter = {base if named else 'BASE MODEL'!r}, {source!r}\n"
        '    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype="auto")\n'
        "    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()\n"
        f"    model.save_pretrained({target!r})\n"
        f"    AutoTokenizer.from_pretrained(base).save_pretrained({target!r})"
    )


def _config_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The content of adapter_config.json; empty without one, and for a file that nothing next to it belongs to."""
    if checkpoint.standalone and not checkpoint.path.name.startswith(ADAPTER):
        return {}
    return adapter_config(checkpoint)


# ------------------------------------------------------------------------------------------------ parts of models


def _lone_shard(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The number of a single shard that was given by its path, and the number of all shards; None for a model."""
    if checkpoint.index is not None or len(checkpoint.files) != 1:
        return None
    number = shard_number(checkpoint.files[0].name)
    return number if number is not None and number[1] > 1 else None


def _empty_tensors(checkpoint: Checkpoint) -> Iterator[str]:
    """Parameters without elements: those of a trainer that keeps only a part of each in a process."""
    empty = [
        name
        for name, ref in described(checkpoint.tensors, lambda each: not each.elements)
        if not ref.elements and ref.dtype.is_wide_float and not is_buffer(name, ref.shape)
    ]
    # a parameter may have no rows, but keeps its other dimension
    if any(checkpoint.tensors[name].shape == (0,) for name in empty) or len(empty) == len(checkpoint.tensors):
        shape = list(checkpoint.tensors[empty[0]].shape)
        yield (
            f"has {plural(len(empty), 'tensor')} without values ({listed(empty)}; shape {shape}): a trainer that "
            "distributes weights over processes (DeepSpeed ZeRO-3, FSDP) has saved the model without gathering them. "
            "Save it again with gathered weights (DeepSpeed: `stage3_gather_16bit_weights_on_model_save` or its "
            "zero_to_fp32.py; FSDP: a full state dict)"
        )
