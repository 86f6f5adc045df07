"""A format of 8-bit blocks that a recipe can ask for, as a value of `out_dtype`."""

from __future__ import annotations

from dataclasses import dataclass

from ....io.tensors.dtypes import DTYPES, F32, DType

BLOCKS = "fp8_blocks"
"""Name of the format in a recipe."""
SCALES = {"float32": "F32", "bfloat16": "BF16", "ue8m0": "F8_E8M0"}
"""The dtypes of scales in a header, by their names in a recipe. The last one holds powers of 2, in one byte."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """FP8 blocks: F8_E4M3 codes, with a scale for each block of rows and columns.

    The defaults are those of DeepSeek-V3.

    Args:
        rows: rows of a block.
        columns: columns of a block.
        scales: dtype of the scales.
    """

    rows: int = 128
    columns: int = 128
    scales: DType = F32

    @property
    def label(self) -> str:
        """The format for display: ``FP8 blocks``, with what differs from the defaults."""
        size = "" if (self.rows, self.columns) == (128, 128) else f" of {self.rows}x{self.columns}"
        return f"FP8 blocks{size}" + ("" if self.scales == F32 else f" with scales in {self.scales.name}")

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether matrices of this shape consist of complete blocks."""
        return shape[-2] % self.rows == 0 and shape[-1] % self.columns == 0

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the codes and the scales of a matrix."""
        rows, columns = shape
        return rows * columns + self.scales.nbytes(-(-rows // self.rows) * -(-columns // self.columns))


def scales_named(name: str) -> DType:
    """Return the dtype of scales by its name in a recipe."""
    return DTYPES[SCALES[name]]
