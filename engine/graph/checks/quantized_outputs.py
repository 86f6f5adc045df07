"""Checks that the output's config.json describes the quantized tensors that are copied to the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....errors import CheckpointError
from ...model.checks.formats import format_name, quantization_config, unquantized
from ...model.inputs import Model
from ...model.warnings import ModelWarning, ModelWarningKind
from ..graph import MergeGraph

_UNRELATED = (
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "dataset",
    "tokenizer",
    "meta",
    "version",
    "batch_size",
)
"""Keys that say how a model was quantized, or which modules, but not how codes become values."""


def check_quantized_outputs(graph: MergeGraph, models: Sequence[Model], donor: Model) -> Iterator[ModelWarning]:
    """Compare the formats of the models whose quantized tensors are copied with that of the donor of config.json.

    Args:
        graph: complete graph of a stage.
        models: the stage's models.
        donor: the model that config.json comes from.

    Yields:
        Warnings about models whose config.json describes the same format differently.

    Raises:
        CheckpointError: a model has another format than the donor, so its tensors would be read as something else.
    """
    copied: dict[int, str] = {}
    values: dict[int, str] = {}
    if any(model.quantized for model in models):
        for number, name in zip(graph.read_models, graph.read_names, strict=True):
            if name in models[number].quantized:
                copied.setdefault(number, name)
            elif name in donor.quantized:
                values.setdefault(number, name)
    label = format_name(donor.checkpoint, donor.quantized) if donor.quantized else None
    for number, name in values.items() if copied else ():
        raise CheckpointError(
            f"tensor {name} of {models[number].name} is not quantized, but config.json comes from {donor.name}, where "
            f"it is quantized ({label}; {donor.quantized[name]}): loaders would read it as codes; "
            f"{unquantized(donor.reference.text, donor.checkpoint)}"
        )
    for number, name in copied.items():
        model = models[number]
        own = format_name(model.checkpoint, model.quantized)
        if model is not donor and own != label:
            described = "is not quantized" if label is None else f"is quantized with {label}"
            raise CheckpointError(
                f"tensor {name} of {model.name} is quantized ({own}; {model.quantized[name]}) and is copied, but "
                f"config.json comes from {donor.name}, which {described}: loaders would read it as something else; "
                f"{unquantized(model.reference.text, model.checkpoint)}"
            )
        if model is not donor and (keys := _different_settings(model, donor)):
            yield ModelWarning(
                ModelWarningKind.QUANTIZATION,
                f"{model.name} and {donor.name} are both quantized ({own}), but their config.json files describe it "
                f"differently: {', '.join(keys)}. config.json of {donor.name} is used for all tensors",
                "use models that were quantized with the same settings",
                tuple(keys),
            )


def _different_settings(model: Model, donor: Model) -> list[str]:
    """The keys under which two models describe a quantization differently, with both values."""
    described = [quantization_config(each.checkpoint.config) for each in (model, donor)]
    own, other = (section for _, section in (each or ("", {}) for each in described))
    keys = [key for key in {**own, **other} if key not in _UNRELATED and own.get(key) != other.get(key)]
    return [f"{key} ({own.get(key)!r} and {other.get(key)!r})" for key in keys]
