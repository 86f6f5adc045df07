"""Gives models their embeddings in the output's vocabulary: values that are gathered from tables of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ....errors import CheckpointError
from ....io.tensors.refs import TensorRef
from ....methods.formats.adapters import REPLACED
from ....methods.formats.gathered import GATHERED
from ....methods.kernel.access import GatheredRows
from ...recipe.entries.dtype_lookup import promote
from ...recipe.types import Recipe
from ..checks.mismatch import TensorMismatch, require_one_architecture
from ..inputs import Model
from ..logical import Decode, LogicalTensor, LogicalTensors, Part
from ..paths import located
from .row_maps import ModelRows
from .tensors import embedding_names, heads_of_others, table_of, vocabulary_names


def gather_embeddings(recipe: Recipe, models: Sequence[Model], rows: Mapping[int, ModelRows]) -> None:
    """Replace the tensors of models that have a row for each token by values in the output's vocabulary.

    A model whose head is tied to its embedding gets a head if others have one, since its missing rows are theirs.

    Args:
        recipe: the recipe, for error messages.
        models: the models of a stage, by number.
        rows: for each model with embeddings, by number, where its rows come from.

    Raises:
        CheckpointError: the models are of different architectures, a tensor is quantized or has integers, has other
            columns in another model, or it is not known how to rearrange it.
    """
    first = models[min(rows)]
    for number in rows:  # a model and the text model that it contains have other names
        if embedding_names(models[number]) == embedding_names(first):
            with located(recipe, models[number].reference):
                require_one_architecture(first, models[number])
    found: dict[int, list[LogicalTensor]] = {}
    for number, each in rows.items():
        if not each.unchanged:
            with located(recipe, models[number].reference):
                names = list(_names(models, models[number], each))
            found[number] = [_value(recipe, models, models[number], name, each) for name in names]
    for number, values in found.items():  # afterwards: the values have parts of other models' stored tensors
        model = models[number]
        if not isinstance(model.tensors, LogicalTensors):
            model.tensors = LogicalTensors(model.tensors, ())
        added = [value.name for value in values if value.name not in model.tensors]
        model.tensors = model.tensors.with_values(values)
        model.non_layer = model.non_layer + added


def _names(models: Sequence[Model], model: Model, rows: ModelRows) -> Iterator[str]:
    yield from vocabulary_names(model, rows.rows)
    yield from heads_of_others(models, model)


def _value(recipe: Recipe, models: Sequence[Model], model: Model, name: str, rows: ModelRows) -> LogicalTensor:
    """The value of one tensor of a model."""
    own, dtypes = _table(recipe, model, table_of(model, name) or name), []
    parts: list[Part] = []
    counts: list[tuple[str, float]] = []
    for table in rows.tables:
        owner = models[table.model]
        stored_name = table_of(owner, name)
        if stored_name is None or (table.rows.highest < 0 and owner is not model):
            continue  # rows of zeros: no tensor has them
        stored = _table(recipe, owner, stored_name)
        if stored.ref.shape[1:] != own.ref.shape[1:]:
            message = (
                f"tensor {name} has shape {list(own.ref.shape)} in {model.name}, and {stored_name} of {owner.name}, "
                f"which has rows for it, has {list(stored.ref.shape)}: only models of the same width can be merged"
            )
            raise TensorMismatch(message, model, owner)
        if table.count > 1:
            counts.append((f"count{len(parts)}", float(table.count)))
        base = None if owner is model else owner.reference.base  # which has the stored tensors
        parts.append(replace(stored, access=GatheredRows(table.rows), owner=stored.owner or base))
        dtypes.append(owner.tensors[stored_name].dtype)
    shape = (len(rows.tables[0].rows), *own.ref.shape[1:])
    dtype = promote(dtypes)
    decode = None if len(parts) == 1 and parts[0].ref.dtype == dtype else Decode(GATHERED, tuple(counts))
    return LogicalTensor(name, shape, dtype, tuple(parts), decode)


def _table(recipe: Recipe, model: Model, name: str) -> Part:
    """The stored tensor whose rows are those of a tensor: the model's, or the one that its adapter replaces it by.

    Raises CheckpointError for a tensor that is computed, or quantized.
    """
    with located(recipe, model.reference):
        return _stored_table(model, name)


def _stored_table(model: Model, name: str) -> Part:
    tensor = model.tensors[name]
    if isinstance(tensor, TensorRef) and tensor.dtype.is_wide_float and name not in model.quantized:
        return Part(name, tensor)
    if isinstance(tensor, LogicalTensor) and tensor.adapted and (tensor.picked or tensor.format == REPLACED.name):
        return tensor.parts[0]
    form = tensor.format if isinstance(tensor, LogicalTensor) else tensor.dtype.name
    if isinstance(tensor, LogicalTensor) and tensor.adapted:
        raise CheckpointError(
            f"tensor {name} of {model.name} is changed by an adapter ({form}): its rows can't be rearranged for "
            "another vocabulary yet. Write the model with its adapter first, with passthrough, and use the result"
        )
    raise CheckpointError(
        f"tensor {name} of {model.name} is stored as {form}: rows of quantized embeddings can't be rearranged for "
        "another vocabulary yet. Use models with the same vocabulary, or a model with this tensor in bfloat16"
    )
