"""Embeddings and heads that an adapter replaces by tables with other rows, since tokens were added to its model.

PEFT saves such tables in full: in ``modules_to_save``, or next to the adapter if the vocabulary was resized
(``save_embedding_layers``, peft 0.21.2, ``utils/save_and_load.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ....errors import CheckpointError
from ....methods.kernel.access import Shape
from ..logical import Tensors, shape_of
from ..roles import is_embedding, is_head, is_prediction_table, tied_embedding
from ..vocabularies.tokenizer_files import main_file
from ..warnings import ModelWarning, ModelWarningKind
from .loaded import Adapter


def is_table(name: str) -> bool:
    """Whether a tensor has a row for each token: an embedding, a head, or a head's bias."""
    weight = f"{name.removesuffix('bias')}weight" if name.endswith(".bias") else name
    return is_embedding(weight) or is_head(weight)


def is_resized(name: str, own: Shape, base: Shape) -> bool:
    """Whether a tensor with the shape `own` is one with the shape `base` for another number of tokens."""
    return is_table(name) and own[:1] != base[:1] and own[1:] == base[1:]


def base_shape(tensors: Tensors, name: str) -> Shape:
    """The shape of a tensor of the base. A head that the base lacks has that of the embedding that it is tied to."""
    if name not in tensors:
        name = tied_embedding(name, list(tensors)) or name
    return shape_of(tensors, name)


def check_tables(base: str, tensors: Tensors, replaced: Mapping[str, tuple[str, Shape]]) -> None:
    """Check that all tables have as many rows as the ones that an adapter has resized.

    Args:
        base: name of the base.
        tensors: tensors of the base.
        replaced: the tensors that adapters replace, each with the name of the adapter and its shape there.

    Raises:
        CheckpointError: one table was resized, and another of as many rows in the base was not.
    """
    resized = {
        name: (adapter, shape[0])
        for name, (adapter, shape) in replaced.items()
        if is_resized(name, shape, base_shape(tensors, name))
    }
    if not resized:
        return
    tables = dict.fromkeys(name for name in (*tensors, *replaced) if is_table(name) or is_prediction_table(name))
    for name, (adapter, rows) in resized.items():
        before = base_shape(tensors, name)[0]
        for other in tables:
            owner, shape = replaced.get(other, (base, base_shape(tensors, other)))
            if base_shape(tensors, other)[0] == before and shape[0] != rows:
                raise CheckpointError(
                    f"{adapter}: {name} was resized from {before:,} to {rows:,} rows, but {other} of {owner} has "
                    f"{shape[0]:,}: a token has a row in every embedding and head. Save the adapter again with all of "
                    "them (save_pretrained with save_embedding_layers=True)"
                )


def rows_without_tokens(
    name: str, base: Tensors, tensors: Tensors, adapters: Sequence[Adapter]
) -> Iterator[ModelWarning]:
    """Warn if a model with adapters has more rows than its base, and no adapter says which tokens they have.

    Args:
        name: name of the model with its adapters.
        base: tensors of the base.
        tensors: tensors of the model with its adapters.
        adapters: the adapters.
    """
    replaces = any(is_embedding(table) for adapter in adapters for table in adapter.changes.replaced)
    if not replaces or any(main_file(adapter.checkpoint) is not None for adapter in adapters):
        return
    for table in filter(is_embedding, base):
        before, rows = (shape_of(each, table)[0] for each in (base, tensors))
        if rows > before:
            yield ModelWarning(
                ModelWarningKind.ADAPTER,
                f"{table} of {name} has {rows:,} rows, {rows - before:,} more than that of the base, and the adapter "
                "has no tokenizer files: these rows count as padding",
                "add the tokenizer files that were saved with the adapter, if tokens were added",
                (table,),
            )
