"""FP8 blocks of a reference in torch, which pads, reshapes and casts complete tensors, and values hard to encode."""

from __future__ import annotations

import torch
from torch import Tensor

POWERS = torch.float8_e8m0fnu
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": POWERS, "U8": POWERS}
"""The dtypes of the numbers of scales, by their dtypes in a header."""


def in_blocks(values: Tensor, rows: int, columns: int) -> Tensor:
    """Matrices padded with zeros, of shape (stack, rows of blocks, rows, blocks, columns)."""
    stack = values.reshape(-1, *((1, 1, *values.shape)[-2:]))
    _, height, width = stack.shape
    padded = torch.nn.functional.pad(stack, (0, -width % columns, 0, -height % rows))
    return padded.view(len(stack), -(-height // rows), rows, -(-width // columns), columns)


def reference(values: Tensor, kind: str, rows: int = 128, columns: int = 128) -> tuple[bytes, bytes]:
    """The bytes of the codes and of the scales."""
    blocks = in_blocks(values.to(torch.float32), rows, columns)
    largest = blocks.abs().amax((2, 4), keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest.clamp(min=1e-12) / 448)
    name, _, power = kind.partition(" ")
    if power or DTYPES[name] is POWERS:
        fractions, exponents = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponents - (fractions == 0.5).int())
    stored = scales.to(DTYPES[name])
    codes = (blocks / stored.to(torch.float32)).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)
    stack, height, width = len(blocks), *((1, 1, *values.shape)[-2:])
    whole = codes.reshape(stack, blocks.shape[1] * rows, -1)[:, :height, :width].reshape(-1)
    as_bytes = [x.contiguous().view(torch.uint8).numpy().tobytes() for x in (whole.to(torch.float8_e4m3fn), stored)]
    return as_bytes[0], as_bytes[1]


def hard_values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values with many magnitudes: ties between codes, subnormal codes, blocks of zeros and of tiny values.

    BF16 rounds the scales of some blocks down, so their largest values are beyond the largest code.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).nan_to_num(nan=0.0)
    numbers = codes.sort().values
    ties = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    drawn = ties[torch.randint(len(ties), shape, generator=generator)]
    octaves = torch.randint(-24, 1, shape, generator=generator)
    chosen = torch.rand(shape, generator=generator)
    values = torch.where(chosen < 0.4, drawn, torch.where(chosen < 0.6, torch.ldexp(values, octaves), values))
    if len(shape) > 1:
        lines = values.view(-1, shape[-1])
        lines[: max(1, len(lines) // 4), : shape[-1] // 2] *= 2.0**-30
        lines[len(lines) // 2 :, shape[-1] // 2 :] = -0.0
        lines[: len(lines) // 3, shape[-1] // 2 :] *= 2.0**-60
        lines[3 * len(lines) // 4 :, : shape[-1] // 2] *= 1.37
    return values
