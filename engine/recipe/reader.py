"""Builds a validated Recipe from the nodes of a YAML source, and reports what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import yaml

from ...errors import RecipeError
from ...methods.kernel.method import Method
from ...methods.kernel.spec import Base
from .entries.chat_template import read_chat_template
from .entries.dtype_reader import read_output_dtype
from .entries.tensor_sources import read_tensor_sources
from .entries.tokenizer import read_tokenizer
from .input_advice import (
    STACK,
    base_advice,
    check_density,
    check_weight,
    count_advice,
    missing_base,
    ranges_misplaced,
)
from .misplaced import CONTENTS, STAGE_KEYS, nearest, other_file
from .node_reader import NodeReader
from .nodes import Keys, Node, Origins
from .order import in_order
from .parameters import describe
from .types import (
    UNKNOWN_METHOD,
    ModelReference,
    Module,
    NonLayer,
    Recipe,
    Slice,
    Source,
    Stage,
    base_index,
    slices_of,
)
from .warnings import RecipeWarning, WarningKind, shortened
from .yaml import YamlSource

NON_LAYER_ALIAS = "outside"
"""The former name of `non_layer`, which recipes may still use."""
OTHER_TOOLS = {"experts": "mergekit-moe", "gate_mode": "mergekit-moe", "genome": "mergekit-evolve"}


def recipe_of(source: YamlSource, file: Path | None, *, strict: bool, methods: Mapping[str, Method]) -> Recipe:
    """Validate the documents of a source as one recipe. Raises RecipeError."""
    if not source.documents:
        raise RecipeError("the recipe is empty", source=file)
    places = [_place(node, index, len(source.documents)) for index, node in enumerate(source.documents)]
    lines: dict[Keys, int] = {}
    overrides: dict[Keys, str] = {}
    for node, place in zip(source.documents, places, strict=True):
        lines.update(node.lines(place))
        overrides.update(node.overrides(place))
    origins = Origins(file, lines, overrides)
    reader = NodeReader(origins, strict, methods)
    for keys, place in zip(source.repeated, places, strict=False):
        reader.repeated.update((*place, *path) for path in keys)
    for remark in source.remarks:
        if any(remark.path in keys for keys in source.repeated):
            continue  # each of the entries holds an anchor of its own
        reader.warnings.append(
            RecipeWarning(WarningKind.DUPLICATE_KEY, remark.message, source=file, line=remark.line, place=remark.path)
        )
    stages = [
        stage
        for node, place in zip(source.documents, places, strict=True)
        if (stage := reader.attempt(partial(_stage, reader, node, place), place)) is not None
    ]
    ordered: tuple[Stage, ...] | None = ()
    if not reader.incomplete(()):
        ordered = reader.attempt(lambda: in_order(stages, reader.error, reader.warn), ())
    reader.attempt(lambda: reader.renames.check_stages(stages), ())
    if reader.mistakes or ordered is None:
        error = RecipeError.together(reader.mistakes)
        error.add_warnings(shortened(reader.warnings))
        raise error
    text = source.text or yaml.safe_dump_all(
        [node.plain() for node in source.documents], sort_keys=False, allow_unicode=True, width=10**9
    )
    return Recipe(ordered, tuple(shortened(reader.warnings)), text, origins, reader.renames.found)


def _place(node: Node, index: int, count: int) -> Keys:
    """The key path of one of `count` documents: empty for a single one, else its name or number."""
    if count == 1:
        return ()
    name = node.value.get("name") if isinstance(node.value, Mapping) else None
    return (name.value,) if name is not None and isinstance(name.value, str) else (index,)


def _stage(reader: NodeReader, node: Node, place: Keys) -> Stage:
    keys = reader.mapping(node, place, "a recipe: a mapping with `merge_method` and `models` or `slices`")
    for key, tool in OTHER_TOOLS.items():
        if key in keys:
            message = f"this is a file for {tool}, which mergeloom does not support"
            raise reader.error(message, (*place, key), unsupported=True)
    if (problem := other_file(keys)) is not None:
        raise reader.error(problem, place)
    method = reader.attempt(lambda: _method(reader, keys, place), (*place, "merge_method")) or UNKNOWN_METHOD
    _one_content(reader, keys, place, CONTENTS, STAGE_KEYS)
    reader.check_keys(keys, place, STAGE_KEYS, aliases=(NON_LAYER_ALIAS,))
    stage = Stage(
        name=reader.optional(keys, place, "name", lambda n, p: _name(reader, n, p)),
        merge_method=method.name,
        base_model=reader.optional(keys, place, "base_model", reader.reference),
        models=reader.optional(keys, place, "models", lambda n, p: _models(reader, n, p, method)),
        slices=reader.optional(keys, place, "slices", lambda n, p: _slices(reader, n, p, method)),
        modules=reader.optional(keys, place, "modules", lambda n, p: _modules(reader, n, p, method)),
        parameters=reader.settings(keys, place, method),
        dtype=reader.optional(keys, place, "dtype", reader.dtype),
        out_dtype=reader.optional(keys, place, "out_dtype", partial(read_output_dtype, reader)),
        tokenizer=reader.attempt(lambda: read_tokenizer(reader, keys, place), (*place, "tokenizer")),
        chat_template=reader.optional(keys, place, "chat_template", partial(read_chat_template, reader)),
        files_from=reader.optional(keys, place, "files_from", reader.reference),
        non_layer=reader.attempt(lambda: _non_layer(reader, keys, place), (*place, "non_layer")) or NonLayer(),
        tensors_from=reader.optional(keys, place, "tensors_from", partial(read_tensor_sources, reader)) or (),
        allow_nonfinite=reader.optional(keys, place, "allow_nonfinite", reader.switch) or False,
        allow_vocabulary_mismatch=reader.optional(keys, place, "allow_vocabulary_mismatch", reader.switch) or False,
        save=reader.optional(keys, place, "save", reader.switch) or False,
        place=place,
    )
    _check_stage(reader, stage, method)
    return stage


def _check_stage(reader: NodeReader, stage: Stage, method: Method) -> None:
    """Check that the method can work with the stage's models, as far as they could be read."""
    if reader.incomplete((*stage.place, "base_model")) or reader.incomplete((*stage.place, "merge_method")):
        return
    if method.base is Base.REQUIRED and stage.base_model is None:
        parts = slices_of(stage)
        if any(part.base_model is None for part in parts):
            message = f"{method.name} needs a `base_model`{missing_base(parts, method)}"
            reader.fail(message, (*stage.place, "merge_method"), (*stage.place, "base_model"))
            return
    if stage.models is None and stage.slices is None and stage.modules is None:
        return
    for part in slices_of(stage):
        if part.sources and not reader.incomplete(part.place):
            reader.attempt(partial(_check_inputs, reader, stage, part, method), part.place)
    check_density(reader, stage, method)
    check_weight(reader, stage, method)


def _method(reader: NodeReader, keys: Mapping[str, Node], path: Keys) -> Method:
    node = reader.required(keys, path, "merge_method", STAGE_KEYS)
    path = (*path, "merge_method")
    name = reader.text(node, path, "the name of a merge method")
    if name not in reader.methods:
        close = nearest(name, reader.methods)
        advice = f"did you mean `{close}`?" if close else "`mergeloom methods` lists all methods"
        raise reader.error(f"unknown merge method {describe(name)}; {advice}", path)
    return reader.methods[name]


def _one_content(
    reader: NodeReader, keys: Mapping[str, Node], path: Keys, contents: Collection[str], known: Collection[str]
) -> None:
    """Require exactly one of `models`, `slices` and `modules`; otherwise, add the error to the reader's mistakes."""
    present = [key for key in contents if key in keys and keys[key].value is not None]
    if len(present) > 1:
        both = " and ".join(f"`{key}`" for key in present)
        reader.fail(f"{both} are mutually exclusive: keep one of them", (*path, present[-1]))
    if present:
        return
    for key in keys:
        if key in contents:
            what = "the models below it: `- model: ...`" if key == "models" else f"the {key} below it"
            reader.fail(f"`{key}` is empty: list {what}", (*path, key))
            return
        close = nearest(key, contents)
        if key not in known and close is not None:
            reader.fail(f"unknown key; did you mean `{close}`?", (*path, key), named=True)
            return
    reader.fail(f"missing key: one of {', '.join(f'`{key}`' for key in contents)} is required", path)


def _name(reader: NodeReader, node: Node, path: Keys) -> str:
    name = reader.text(node, path, "the stage's name")
    if not re.fullmatch(r"[\w. /-]+", name) or any(not part.strip(" .") for part in name.split("/")):
        raise reader.error(f"invalid stage name {describe(name)}: use letters, digits, and . _ - between them", path)
    return name


def _non_layer(reader: NodeReader, keys: Mapping[str, Node], path: Keys) -> NonLayer:
    names = [key for key in ("non_layer", NON_LAYER_ALIAS) if key in keys and keys[key].value is not None]
    if not names:
        return NonLayer()
    if len(names) > 1:
        message = f"`non_layer` and its former name `{NON_LAYER_ALIAS}` are mutually exclusive: keep `non_layer`"
        raise reader.error(message, (*path, NON_LAYER_ALIAS))
    path = (*path, names[0])
    known = ("embeddings", "norm", "head")
    models = reader.mapping(keys[names[0]], path, "a mapping of embeddings, norm and head to models")
    reader.check_keys(models, path, known)
    embeddings, norm, head = (reader.optional(models, path, key, reader.reference) for key in known)
    return NonLayer(embeddings, norm, head, path)


def _modules(reader: NodeReader, node: Node, path: Keys, method: Method) -> tuple[Module, ...]:
    modules = reader.mapping(node, path, "a mapping of modules by name")
    if not modules:
        raise reader.error("expected a mapping of modules by name, got an empty mapping", path)
    found = [
        reader.attempt(partial(_module, reader, child, (*path, name), name, method), (*path, name))
        for name, child in modules.items()
    ]
    return tuple(module for module in found if module is not None)


def _module(reader: NodeReader, node: Node, path: Keys, name: str, method: Method) -> Module:
    known = ("models", "slices", "parameters")
    keys = reader.mapping(node, path, "a module: a mapping with `models` or `slices`")
    _one_content(reader, keys, path, ("models", "slices"), known)
    reader.check_keys(keys, path, known)
    return Module(
        name,
        slices=reader.optional(keys, path, "slices", lambda n, p: _slices(reader, n, p, method)),
        models=reader.optional(keys, path, "models", lambda n, p: _models(reader, n, p, method)),
        parameters=reader.settings(keys, path, method),
        place=path,
    )


def _slices(reader: NodeReader, node: Node, path: Keys, method: Method) -> tuple[Slice, ...]:
    entries = reader.entries(node, path, "slices")
    found = [
        reader.attempt(partial(_slice, reader, child, (*path, index), method), (*path, index))
        for index, child in enumerate(entries)
    ]
    return tuple(part for part in found if part is not None)


def _slice(reader: NodeReader, node: Node, path: Keys, method: Method) -> Slice:
    known = ("sources", "base_model", "parameters")
    keys = reader.mapping(node, path, "a slice: a mapping with `sources`")
    reader.attempt(lambda: reader.required(keys, path, "sources", known), (*path, "sources"))
    reader.check_keys(keys, path, known)
    return Slice(
        reader.optional(keys, path, "sources", lambda n, p: _sources(reader, n, p, method, ranged=True)) or (),
        reader.optional(keys, path, "base_model", reader.reference),
        reader.settings(keys, path, method),
        path,
    )


def _models(reader: NodeReader, node: Node, path: Keys, method: Method) -> tuple[Source, ...]:
    return _sources(reader, node, path, method, ranged=False)


def _sources(reader: NodeReader, node: Node, path: Keys, method: Method, *, ranged: bool) -> tuple[Source, ...]:
    """The models of a list. Of several entries with the same model and layers, the last is used."""
    entries = reader.entries(node, path, "models, each with its layer_range" if ranged else "models")
    found = [
        reader.attempt(partial(_source, reader, child, (*path, i), method, ranged=ranged), (*path, i))
        for i, child in enumerate(entries)
    ]
    sources = [(index, source) for index, source in enumerate(found) if source is not None]
    if reader.incomplete(path):  # sources whose layers can't be read are not duplicates
        return tuple(source for _, source in sources)
    last = {(source.model, source.layer_range): index for index, source in sources}
    kept = []
    for index, source in sources:
        final = last[source.model, source.layer_range]
        if final == index:
            kept.append(source)
            continue
        first, second = entries[index], entries[final]
        message = f"{source.model.text} is listed twice"
        if first.plain() == second.plain():
            message += (
                f"{'' if second.line is None else f', here and on line {second.line}'}: it counts once; remove one"
            )
        else:
            message += f": the last entry is used, {_entry(second)}, instead of this one, {_entry(first)}"
        reader.warn(WarningKind.DUPLICATE_MODEL, message, source.place)
    return tuple(kept)


def _entry(node: Node) -> str:
    """The parameters of an entry of `models` or `sources`, for a warning."""
    parameters = node.plain().get("parameters")
    line = f"line {node.line}: " if node.line is not None else ""
    return f"{line}{describe(parameters) if parameters else 'no parameters'}"


def _source(reader: NodeReader, node: Node, path: Keys, method: Method, *, ranged: bool) -> Source | None:
    required = ("model", "layer_range") if ranged else ("model",)
    known = (*required, "rename", "parameters")
    if isinstance(node.value, str) and not ranged:
        raise reader.error(f"write `- model: {node.value}` to list a model", path)
    keys = reader.mapping(node, path, f"a mapping with `model`{' and `layer_range`' if ranged else ''}")
    for key in required:
        reader.attempt(partial(reader.required, keys, path, key, known), (*path, key))
    reader.check_keys(keys, path, known)
    reference = reader.optional(keys, path, "model", reader.reference)
    if reference is not None:
        reader.attempt(partial(reader.renames.read, reference, keys, path), (*path, "rename"))
    name = None if reference is None else reference.path
    layers = reader.optional(keys, path, "layer_range", lambda n, p: reader.layer_range(n, p, name)) if ranged else None
    settings = reader.settings(keys, path, method, model=reference or ModelReference("?"))
    return None if reference is None else Source(reference, layers, settings, path)


def _check_inputs(reader: NodeReader, stage: Stage, part: Slice, method: Method) -> None:
    """Check that the method can work with a slice's inputs, their layers and the base model."""
    ranges = [source.layer_range for source in part.sources if source.layer_range is not None]
    if len({end - first for first, end in ranges}) > 1:
        listed = ", ".join(f"{source.model.text} {list(source.layer_range or ())}" for source in part.sources)
        message = f"all sources of a slice must have the same number of layers, got {listed}{STACK}"
        raise reader.error(message, part.place)
    base = part.base_model or stage.base_model
    causes = ((*stage.place, "merge_method"), (*stage.place, "base_model"))
    index = base_index(stage, part, method)
    if method.base is not Base.NONE and base is not None:
        if index is None:
            message = f"{method.name} needs the base model, {base.text}, among the slice's sources"
            raise reader.error(f"{message}{base_advice(base, part, method)}", part.place, *causes)
        if sum(source.model == base for source in part.sources) > 1:
            message = f"the base model, {base.text}, is among the sources more than once"
            raise reader.error(message, part.place, *causes)
        if index is not None:
            _report_base_parameters(reader, part.sources[index], method, *causes)
    others = [source.model.text for number, source in enumerate(part.sources) if number != index]
    if stage.modules is not None and index is not None and not others:
        return  # a module that is copied from the base model
    if len(others) < method.minimum or (method.maximum is not None and len(others) > method.maximum):
        upper = " or more" if method.maximum is None else f" to {method.maximum}"
        number = f"{method.minimum}{'' if method.maximum == method.minimum else upper}"
        message = f"{method.name} takes {number} model{'' if number == '1' else 's'}"
        message += f"{'' if index is None else ' besides the base'}, got {len(others)}"
        message += f": {', '.join(others)}" if others else ""
        advice = (
            ": use `slices` for ranges of layers" if ranges_misplaced(reader) else count_advice(part, method, index)
        )
        reader.fail(f"{message}{advice}", part.place, *causes)


def _report_base_parameters(reader: NodeReader, base: Source, method: Method, *causes: Keys) -> None:
    """Report the parameters of a base model that is listed among the models: methods use only those of the others."""
    names = [f"`{name}`" for name in base.parameters]
    if names:
        problem = f"{' and '.join(names)} of the base model, {base.model.text}, "
        problem += f"{'has' if len(names) == 1 else 'have'} no effect: {method.name} merges the other models into it"
        what = "it" if len(names) == 1 else "them"
        advice = f"remove {what}, or use another `base_model` if this model should be merged, too"
        reader.report(WarningKind.NO_EFFECT, problem, (*base.place, "parameters"), *causes, advice=advice)
