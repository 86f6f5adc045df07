"""Writing the files of a model beside its weights: config.json, tokenizer and other companions, the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .card import CardModel, model_card
from .chat_templates import REPLACED, with_template
from .file_sources import FileSources, directory_of, tokenizer_directory
from .io.checkpoint import INDEX
from .io.files import FileKind, companion_files
from .io.output import OutputDirectory, index_bytes

if TYPE_CHECKING:
    from .planning import MadeModel, Plan

CARD = "README.md"
CONFIG = "config.json"


def write_model_files(plan: Plan, out: OutputDirectory) -> list[str]:
    """Write everything but the weights into OUT; the names of what must appear last, every config.json among them."""
    last = []
    for made in reversed(plan.made):
        within = f"{made.folder}/" if made.folder else ""
        _write_companions(made.files, out, within)
        out.write_file(f"{within}{CARD}", _card(plan, made).encode())
        if made.files.config is not None:
            out.write_file(f"{within}{CONFIG}", (json.dumps(made.files.config, indent=2) + "\n").encode())
            last.append(f"{within}{CONFIG}")
        shards = plan.layout.shards_in(made.folder)
        if len(shards) > 1:
            out.write_file(f"{within}{INDEX}", _index(plan, made))
            last.append(f"{within}{INDEX}")
    return last


def _index(plan: Plan, made: MadeModel) -> bytes:
    """The index of a model's shards."""
    graph, layout = plan.built.graph, plan.layout
    numbers = graph.outputs_in(made.folder)
    names = {graph.outputs[n].name: layout.shards[layout.shard_of[n]].name.rpartition("/")[2] for n in numbers}
    return index_bytes(names, sum(graph.nbytes(graph.outputs[number].node) for number in numbers))


def _write_companions(files: FileSources, out: OutputDirectory, within: str) -> None:
    """The tokenizer's files of one model, with the chat template put into them, and the others of another."""
    for file in companion_files(directory_of(files.others), (FileKind.GENERATION, FileKind.OTHER)):
        out.copy_file(f"{within}{file.path}", file.source)
    directory = tokenizer_directory(files)
    changed = {} if files.template is None else with_template(directory, files.template)
    for file in companion_files(directory, (FileKind.TOKENIZER,)):
        if file.path not in changed and not (changed and REPLACED.fullmatch(file.path)):
            out.copy_file(f"{within}{file.path}", file.source)
    for name, data in changed.items():
        out.write_file(f"{within}{name}", data)


def _card(plan: Plan, made: MadeModel) -> str:
    graph = plan.built.graph
    nodes = [graph.outputs[number].node for number in graph.outputs_in(made.folder)]
    used = {graph.read_models[read] for node in nodes for read in graph.node_sources[node]}
    cards = {
        model.number: CardModel(
            model.reference.path,
            revision=model.reference.revision,
            local=Path(model.reference.path).expanduser().exists(),
        )
        for model in plan.built.models
        if not made.folder or model.number in used
    }
    base = next(
        (cards[m.number] for m in plan.built.models if m.reference == made.stage.base_model and m.number in cards), None
    )
    dtypes = sorted({graph.node_dtype[node].torch_name or "packed" for node in nodes})
    methods = [made.stage.merge_method] if made.folder else [stage.merge_method for stage in plan.recipe.stages]
    return model_card(
        name=made.stage.name or "Merged model",
        methods=list(dict.fromkeys(methods)),
        models=list(cards.values()),
        recipe=plan.recipe.text,
        layers=made.layers,
        parameters=sum(map(graph.elements, nodes)),
        dtype=(None if made.folder else plan.built.dtype) or ", ".join(dtypes),
        base_model=base,
    )
