"""Compares how models use the results of their layers: the labels of classifiers, and the pooling of embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ....io.small_files import read_json
from ...graph.build import BuiltGraph
from ...model.inputs import Model
from ...model.vocabularies.tokenizer_files import POOLING, has_file, small_files_directory
from ...model.warnings import ModelWarning, ModelWarningKind

_CLASSIFIER = re.compile(r"For\w*Classification$")
_GENERIC = re.compile(r"label[_ ]?\d+|\d+")
"""Labels that transformers writes if the user names none."""
_MODE = "pooling_mode_"
_UNIT = re.compile(r"_tokens?$")


def compare_heads(built: BuiltGraph) -> Iterator[ModelWarning]:
    """Warn if classes with different labels are merged, or embeddings that are pooled differently.

    Args:
        built: graph of a stage with several models.

    Raises:
        CheckpointError: a pooling config is not valid JSON.
    """
    models = [
        model for number in sorted(set(built.graph.read_models)) if not (model := built.models[number]).is_adapter
    ]
    if len(models) > 1:
        yield from _labels(built)
        yield from _pooling([model for model in models if model.checkpoint.files])


def _labels(built: BuiltGraph) -> Iterator[ModelWarning]:
    labels = {number: found for number, model in enumerate(built.models) if (found := _stated(model.checkpoint.config))}
    if len({tuple(sorted(each.items())) for each in labels.values()}) < 2:
        return
    graph = built.graph
    outside = {name for model in built.models for name in model.non_layer}
    for output in graph.outputs:
        if output.name not in outside:
            continue
        numbers = sorted({graph.read_models[read] for read in graph.reads_of(output.node)} & set(labels))
        rows = graph.shape(output.node)[:1]
        merged = [(built.models[number].name, labels[number]) for number in numbers if (len(labels[number]),) == rows]
        for name, other in merged[1:]:
            first, own = merged[0]
            different = next((row for row in sorted(own) if other.get(row, own[row]).lower() != own[row].lower()), None)
            if different is not None:
                yield ModelWarning(
                    ModelWarningKind.CONFIG_DIFFERS,
                    f"id2label: class {different} is {own[different]} in {first} and {other[different]} in {name}, and "
                    f"these rows of {output.name} are merged",
                    "merge models with the same classes in the same order, or take what follows the layers from one "
                    "model with norm under non_layer",
                    ("id2label", output.name),
                )
                return


def _stated(config: Mapping[str, Any] | None) -> dict[int, str]:
    """The labels of a classifier that config.json states, by class; empty for other models and generic labels."""
    config = config or {}
    architectures = config.get("architectures")
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) and isinstance(config.get("label2id"), Mapping):
        labels = {number: label for label, number in config["label2id"].items()}
    is_classifier = isinstance(architectures, list) and any(_CLASSIFIER.search(str(each)) for each in architectures)
    if not is_classifier or not isinstance(labels, Mapping):
        return {}
    found = {int(row): str(label) for row, label in labels.items() if str(row).isdecimal()}
    return {} if all(_GENERIC.fullmatch(label.lower()) for label in found.values()) else found


def _pooling(models: Sequence[Model]) -> Iterator[ModelWarning]:
    modes = {
        model.name: mode
        for model in models
        if has_file(model.checkpoint, POOLING)
        and (mode := _mode(read_json(small_files_directory(model.checkpoint) / POOLING)))
    }
    if len(set(modes.values())) > 1:
        described = " and ".join(f"{mode} in {name}" for name, mode in modes.items())
        yield ModelWarning(
            ModelWarningKind.CONFIG_DIFFERS,
            f"the pooling of token embeddings differs between the models: {described} ({POOLING})",
            "merge models with the same pooling: the output has one of them",
            (POOLING,),
        )


def _mode(config: Any) -> str:
    """The pooling that a config of sentence-transformers states, such as ``mean``; empty if it states none."""
    if not isinstance(config, Mapping):
        return ""
    stated = config.get("pooling_mode")  # newer versions write the short name
    if isinstance(stated, str):
        return stated
    modes = stated if isinstance(stated, list) else [key[len(_MODE) :] for key in config if _is_mode(key, config[key])]
    return " + ".join(sorted(_UNIT.sub("", str(mode)) for mode in modes))


def _is_mode(key: str, value: Any) -> bool:
    return key.startswith(_MODE) and value is True
