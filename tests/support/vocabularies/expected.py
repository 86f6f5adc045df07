"""The rows of merged embeddings by the documented rules, token by token in float64, without mergeloom's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tests.support.outputs import read_model

Row = Tensor
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Loaded:
    """A model: its tokens, and its tensors in float64."""

    tokens: Mapping[str, int]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Loaded:
        """Read a model with a tokenizer.json."""
        tensors = {name: tensor.double() for name, tensor in read_model(path).items()}
        rows = len(tensors[EMBEDDING])
        tokens = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab()
        return cls({text: row for text, row in tokens.items() if row < rows}, tensors)

    def row(self, text: str, name: str) -> Row | None:
        """The embedding of a token, or None. A tied head is the embedding."""
        table = self.tensors.get(name, self.tensors[EMBEDDING])
        return table[self.tokens[text]] if text in self.tokens else None


def default_row(
    text: str, name: str, models: Mapping[str, Loaded], base: str | None, chosen: Mapping[str, Any] | None
) -> Row:
    """The embedding of a token in the models that lack it.

    Args:
        text: the token.
        name: name of the tensor.
        models: the models by name, in the order of the recipe.
        base: name of the base model.
        chosen: the recipe's entry for the token, or None.
    """
    source = (chosen or {}).get("source")
    if isinstance(source, str):
        row = models[source].row(text, name)
        assert row is not None
        return row
    if isinstance(source, dict) and source["kind"] == "zero":
        return torch.zeros(next(iter(models.values())).tensors[EMBEDDING].shape[1], dtype=torch.float64)
    if isinstance(source, dict):
        model = models[source["model"]]
        if "token" in source:
            row = model.row(source["token"], name)
            assert row is not None
            return row
        return model.tensors.get(name, model.tensors[EMBEDDING])[source["token_id"]]
    found = [row for model in models.values() if (row := model.row(text, name)) is not None]
    if len(found) > 1 and base is not None and (own := models[base].row(text, name)) is not None:
        return own
    return (
        torch.stack(found).mean(0)
        if found
        else torch.zeros(next(iter(models.values())).tensors[EMBEDDING].shape[1], dtype=torch.float64)
    )


def rows_of(
    model: str,
    name: str,
    tokens: Sequence[str],
    models: Mapping[str, Loaded],
    base: str | None,
    chosen: Mapping[str, Any],
) -> Tensor:
    """The embeddings of tokens in one model."""
    rows = []
    for text in tokens:
        own = models[model].row(text, name)
        forced = bool((chosen.get(text) or {}).get("force"))
        rows.append(own if own is not None and not forced else default_row(text, name, models, base, chosen.get(text)))
    return torch.stack(rows)


def merged_rows(
    combine: Callable[[Sequence[Tensor]], Tensor],
    name: str,
    tokens: Sequence[str],
    models: Mapping[str, Loaded],
    base: str | None,
    chosen: Mapping[str, Any] | None = None,
) -> Tensor:
    """The merged embeddings of tokens.

    Args:
        combine: function that merges the models' matrices.
        name: name of the tensor.
        tokens: the tokens.
        models: the models by name.
        base: name of the base model, or None.
        chosen: the recipe's entries under ``tokens``.
    """
    return combine([rows_of(model, name, tokens, models, base, chosen or {}) for model in models])
