"""Describes the output's vocabulary, and where the rows of each model's embeddings come from."""

from __future__ import annotations

from ...engine.model.vocabularies.row_maps import ModelRows
from ...engine.model.vocabularies.stage import StageVocabulary
from ...engine.run.plan import Plan
from ...io.units import plural
from ..sections import Section


def vocabulary_section(plan: Plan) -> Section | None:
    """Describe the output's vocabulary; None if all embeddings are used as they are."""
    vocabulary = plan.built.vocabulary
    if vocabulary is None:
        return None
    padding = vocabulary.rows - vocabulary.tokens
    rows = f"{vocabulary.rows:,}: {plural(vocabulary.tokens, 'token')}"
    rows += f", {plural(padding, 'padding row')}" if padding > 0 else ""
    new = f" and {plural(len(vocabulary.new), 'added token')}" if vocabulary.new else ""
    pairs = [("rows", rows), ("tokenizer", f"that of {vocabulary.source.text}{new}")]
    pairs += [(vocabulary.names[number], _origins(vocabulary, rows)) for number, rows in vocabulary.models.items()]
    return Section("Vocabulary", tuple(pairs))


def _origins(vocabulary: StageVocabulary, rows: ModelRows) -> str:
    if rows.unchanged:
        return "unchanged"
    counts = rows.counts
    texts = [f"{counts.own:,} own"]
    texts += [f"{count:,} from {vocabulary.names[other]}" for other, count in counts.others.items()]
    texts += [f"{count:,} {name}" for name, count in (("mean", counts.mean), ("zero", counts.zero)) if count]
    if counts.padding:
        tables = (table for table in rows.tables[1:] if table.rows.highest >= 0)
        others = dict.fromkeys(vocabulary.names[table.model] for table in tables if table.count == 1)
        source = f" (from {', '.join(others)} where it has none)" if others and not counts.others else ""
        texts.append(f"{counts.padding:,} padding{source}")
    return ", ".join(texts)
