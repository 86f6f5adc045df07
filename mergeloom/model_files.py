"""Writing the files of a model beside its weights: config.json, tokenizer and other companions, the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .card import CardModel, model_card
from .chat_templates import REPLACED, with_template
from .file_sources import FileSources, directory_of, tokenizer_directory
from .io.files import FileKind, companion_files
from .io.output import OutputDirectory

if TYPE_CHECKING:
    from .planning import Plan

CARD = "README.md"
CONFIG = "config.json"


def write_model_files(plan: Plan, out: OutputDirectory) -> list[str]:
    """Write everything but the weights into OUT; the names of what must appear last, config.json among them."""
    _write_companions(plan.files, out)
    out.write_file(CARD, _card(plan).encode())
    if plan.files.config is None:
        return []
    out.write_file(CONFIG, (json.dumps(plan.files.config, indent=2) + "\n").encode())
    return [CONFIG]


def _write_companions(files: FileSources, out: OutputDirectory) -> None:
    """The tokenizer's files of one model, with the chat template put into them, and the others of another."""
    for file in companion_files(directory_of(files.others), (FileKind.GENERATION, FileKind.OTHER)):
        out.copy_file(file.path, file.source)
    directory = tokenizer_directory(files)
    changed = {} if files.template is None else with_template(directory, files.template)
    for file in companion_files(directory, (FileKind.TOKENIZER,)):
        if file.path not in changed and not (changed and REPLACED.fullmatch(file.path)):
            out.copy_file(file.path, file.source)
    for name, data in changed.items():
        out.write_file(name, data)


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
