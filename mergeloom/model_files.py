"""The files of a model beside its weights: config.json, tokenizer and other companions, the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import CardModel, model_card
from .engine.build import BuiltGraph
from .engine.config import merged_config
from .io.files import companion_files
from .io.output import OutputDirectory

if TYPE_CHECKING:
    from .planning import Plan

CARD = "README.md"
CONFIG = "config.json"


def config_of(built: BuiltGraph) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The output's config.json, and what the user should know about it; None where the donor has none."""
    config: Mapping[str, Any] | None = built.donor_config
    if config is None:
        return None, (f"{built.models[built.donor].name} has no config.json, so that none is written",)
    # without a head the donor has none either: it is tied already, or it is no language model
    tied = False if built.head else None
    warnings: list[str] = []
    for stack in built.stacks:
        merged = merged_config(
            config,
            layers=len(stack.sources),
            source_layers=stack.sources,
            tied=tied,
            dtype=built.dtype,
            main=stack.donor.config_path,
            key=stack.donor.config_key,
            donor_layers=stack.donor.count,
        )
        config = merged.config
        warnings += merged.warnings
    return dict(config), tuple(dict.fromkeys(warnings))


def write_model_files(plan: Plan, out: OutputDirectory) -> list[str]:
    """Write everything but the weights into OUT; the names of what must appear last, config.json among them."""
    config, _ = config_of(plan.built)
    donor = plan.built.models[plan.built.donor]
    path = donor.checkpoint.path
    for file in companion_files(path if path.is_dir() else path.parent):
        out.copy_file(file.path, file.source)
    out.write_file(CARD, _card(plan).encode())
    if config is None:
        return []
    out.write_file(CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return [CONFIG]


def _card(plan: Plan) -> str:
    graph = plan.built.graph
    cards = {
        model.number: CardModel(
            model.reference.path,
            revision=model.reference.revision,
            local=Path(model.reference.path).expanduser().exists(),
        )
        for model in plan.built.models
    }
    base = next((cards[model.number] for model in plan.built.models if model.reference == plan.stage.base_model), None)
    dtypes = sorted({graph.node_dtype[output.node].torch_name or "packed" for output in graph.outputs})
    return model_card(
        name=plan.stage.name or "Merged model",
        methods=list(dict.fromkeys(stage.merge_method for stage in plan.recipe.stages)),
        models=list(cards.values()),
        recipe=plan.recipe.text,
        layers=plan.built.layers,
        parameters=sum(graph.elements(output.node) for output in graph.outputs),
        dtype=plan.built.dtype or ", ".join(dtypes),
        base_model=base,
    )
