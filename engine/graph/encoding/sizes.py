"""The sizes that quantized tensors have as they are stored, in bfloat16, and as FP8 blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from ....io.tensors.dtypes import BF16
from ....io.units import data_size
from ...model.inputs import Model
from ...model.logical import LogicalTensor, LogicalTensors, kind_of
from ...recipe.entries.block_format import BlockFormat
from ...recipe.entries.dtype_lookup import Refuse


@dataclass(frozen=True, slots=True)
class FormatSizes:
    """Bytes of some tensors in three forms.

    Args:
        tensors: number of tensors.
        stored: as they are stored.
        plain: in bfloat16.
        blocks: as FP8 blocks; those that can't be stored so are in bfloat16.
        encoded: number of tensors that can be stored as FP8 blocks.
    """

    tensors: int
    stored: int
    plain: int
    blocks: int
    encoded: int

    @property
    def alternatives(self) -> str:
        """The forms that a recipe can ask for, with their sizes: ``bfloat16 (1.3TB) or fp8_blocks (660GB)``."""
        blocks = f" or out_dtype: fp8_blocks ({data_size(self.blocks)})" if self.encoded else ""
        return f"out_dtype: bfloat16 ({data_size(self.plain)}){blocks}"


def sizes_of(
    tensors: Iterable[tuple[str, tuple[int, ...], int, int]], refuse: Refuse, form: BlockFormat | None = None
) -> FormatSizes:
    """Return the sizes of tensors.

    Args:
        tensors: name, shape and stored bytes of each, and the number of tensors like it.
        refuse: says which tensors can't be stored as blocks.
        form: the format of blocks; that of DeepSeek-V3 if None.
    """
    form = form or BlockFormat()
    count = stored = plain = blocks = encoded = 0
    for name, shape, nbytes, number in tensors:
        unquantized, fits = BF16.nbytes(prod(shape)), not refuse(name, shape, form)
        count, encoded = count + number, encoded + number * fits
        stored, plain = stored + number * nbytes, plain + number * unquantized
        blocks += number * (form.nbytes(shape) if fits else unquantized)
    return FormatSizes(count, stored, plain, blocks, encoded)


def quantized_sizes(model: Model, refuse: Refuse, *, writable: bool) -> FormatSizes:
    """Return the sizes of a model's quantized tensors.

    Args:
        model: the model.
        refuse: says which tensors can't be stored as FP8 blocks.
        writable: whether those in formats that mergeloom writes count, too.
    """
    tensors, found = model.tensors, []
    for name in tensors.quantized if isinstance(tensors, LogicalTensors) else ():
        like = kind_of(tensors, name)
        if isinstance(like, LogicalTensor) and (writable or like.encoding is None):
            found.append((name, like.shape, like.own_bytes, 1))
    return sizes_of(found, refuse)
