"""Decoders of numbers that are stored as codes with scales.

Every value is a code times its scale, in float32. Codes and scales are converted exactly; each difference and each
product is rounded once.
"""

from __future__ import annotations

from ..kernel.array import Array
from ..kernel.decoder import Decoder


def _scaled(codes: Array, scales: Array) -> Array:
    return codes * scales


FP8_BLOCKS = Decoder("FP8 blocks", _scaled)
"""FP8 with a scale for each block of rows and columns: DeepSeek-V3 (README_WEIGHTS.md of the model)."""
FP8_CHANNELS = Decoder("FP8 channels", _scaled)
"""FP8 with a scale for each row: fbgemm, compressed-tensors with strategy ``channel``."""
FP8_TENSOR = Decoder("FP8 tensor", _scaled)
"""FP8 with one scale for the tensor: compressed-tensors with strategy ``tensor``, ModelOpt."""

INT8 = Decoder("INT8", _scaled)
"""Signed integers of 8 bits: compressed-tensors' ``int-quantized``."""
INT8_PACKED = Decoder("INT8 packed", lambda codes, scales: (codes - 128.0) * scales)
"""Integers of 8 bits plus 128: compressed-tensors' ``pack-quantized``."""
INT4_PACKED = Decoder("INT4", lambda codes, scales: (codes - 8.0) * scales)
"""Integers of 4 bits plus 8: compressed-tensors' ``pack-quantized``."""

MXFP4 = Decoder("MXFP4", _scaled)
"""E2M1 with a power of two for each 32 columns (OCP Microscaling Formats 1.0)."""
NVFP4_MULTIPLIED = Decoder("NVFP4", lambda codes, scales, total: codes * (scales * total))
"""E2M1 with a scale in FP8 for each 16 columns, and one for the tensor that multiplies it: ModelOpt."""
NVFP4_DIVIDED = Decoder("NVFP4", lambda codes, scales, total: codes * (scales / total))
"""The same with a number for the tensor that divides the scales: compressed-tensors."""
