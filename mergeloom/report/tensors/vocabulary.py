"""Describes the output's vocabulary, and where the rows of each model's embeddings come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...io.units import listed, plural
from ..sections import Section

if TYPE_CHECKING:
    from ...engine.run.plan import Plan


def vocabulary_section(plan: Plan) -> Section | None:
    """Describe the output's vocabulary; None if all embeddings are used as they are."""
    vocabulary = plan.built.vocabulary
    return None if vocabulary is None else section_of(vocabulary.to_dict())


def section_of(facts: Mapping[str, Any]) -> Section:
    """Describe a vocabulary.

    Args:
        facts: the result of `StageVocabulary.to_dict`.
    """
    padding = facts["rows"] - facts["tokens"]
    rows = f"{facts['rows']:,}: {plural(facts['tokens'], 'token')}"
    rows += f", {plural(padding, 'padding row')}" if padding > 0 else ""
    new = f" and {plural(len(facts['added']), 'added token')}" if facts["added"] else ""
    pairs = [("rows", rows), ("tokenizer", f"that of {facts['tokenizer']}{new}")]
    return Section("Vocabulary", tuple(pairs + [(each["model"], _origins(each)) for each in facts["models"]]))


def _origins(model: Mapping[str, Any]) -> str:
    """Where the rows of one model's embeddings come from: ``81 own, 11 from b, 4 padding``."""
    texts = [f"{model['own']:,} own"]
    texts += [f"{count:,} from {other}" for other, count in model["others"].items()]
    texts += [f"{model[key]:,} {key}" for key in ("mean", "zero") if model[key]]
    if model["padding"]:
        lent = f" (some from {listed(model['padding_from'])})" if model["padding_from"] else ""
        texts.append(f"{model['padding']:,} padding{lent}")
    return ", ".join(texts)
