"""Measures what it costs to decode: ns per element of a linear merge of two models, in the CPU time of one thread.

    python -m benchmarks.compute.decoding [--runs 5]

Each chunk is combined by the compiled loop that a merge calls. The buffers are larger than the processor's caches. The
bars are multiples of the merge of two bfloat16 models, which is measured in every round, alternately.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mergeloom.methods import merge_methods
from mergeloom.methods.formats import scaled
from mergeloom.methods.formats.adapters import Term, adapted, scale_name
from mergeloom.methods.formats.fp8_encoder import FP8_BLOCKS
from mergeloom.methods.kernel.access import ALIGNED, Access, BlockRows, Nibbles, SameRows, Whole
from mergeloom.methods.kernel.composition import Composition, Part
from mergeloom.methods.kernel.decoder import Decoder
from mergeloom.methods.kernel.fused.compiled import Compiled
from mergeloom.methods.kernel.fused.passes import FusedPass
from mergeloom.methods.kernel.fused.run import Chunk
from mergeloom.methods.kernel.kernel import Traceable
from mergeloom.methods.kernel.reduction.survival import Compared
from mergeloom.methods.kernel.spec import InputSpec

ROWS, COLUMNS, CHUNKS = 128, 8192, 24
BARS = {"FP8 blocks": 3.0, "FP8 blocks, to FP8 blocks": 6.0, "INT4": 4.0}
"""At most this many times the time of two models in bfloat16."""

Stored = tuple[Access, str, tuple[int, int]]
"""Access, dtype and shape of a part of one chunk."""

SCALE = {scale_name(0): 0.5}


def lora(rank: int) -> list[Stored]:
    """A matrix in bfloat16 and the factors of an adapter."""
    return [
        (ALIGNED, "BF16", (ROWS, COLUMNS)),
        (SameRows(), "BF16", (ROWS, rank)),
        (Whole(), "BF16", (rank, COLUMNS)),
    ]


FORMATS: dict[str, tuple[Decoder | None, Sequence[Stored]] | tuple[Decoder, Sequence[Stored], Mapping[str, float]]] = {
    "bfloat16": (None, [(ALIGNED, "BF16", (ROWS, COLUMNS))]),
    "FP8 blocks": (
        scaled.FP8_BLOCKS,
        [(ALIGNED, "F8_E4M3", (ROWS, COLUMNS)), (BlockRows(128, 128), "F32", (1, COLUMNS // 128))],
    ),
    "FP8 channels": (
        scaled.FP8_CHANNELS,
        [(ALIGNED, "F8_E4M3", (ROWS, COLUMNS)), (BlockRows(1, COLUMNS), "F32", (ROWS, 1))],
    ),
    "INT4": (
        scaled.INT4_PACKED,
        [(Nibbles("U4"), "U8", (ROWS, COLUMNS // 2)), (BlockRows(1, 32), "BF16", (ROWS, COLUMNS // 32))],
    ),
    "MXFP4": (
        scaled.MXFP4,
        [(Nibbles("F4"), "U8", (ROWS, COLUMNS // 2)), (BlockRows(1, 32), "F8_E8M0", (ROWS, COLUMNS // 32))],
    ),
    "bfloat16 + LoRA of rank 16": (adapted(None, 1, (Term.LORA,)), lora(16), SCALE),
    "bfloat16 + LoRA of rank 64": (adapted(None, 1, (Term.LORA,)), lora(64), SCALE),
    "bfloat16 + DoRA of rank 16": (
        adapted(None, 1, (Term.DORA_ROWS,)),
        [*lora(16), (BlockRows(1, COLUMNS), "F32", (ROWS, 1))],
        SCALE,
    ),
}


def loop(
    decoder: Decoder | None,
    parts: Sequence[Stored],
    parameters: Mapping[str, float] | None = None,
    *,
    encoded: bool = False,
    compared: bool = False,
) -> Callable[[], float]:
    """A function that merges all chunks of two models, and returns the seconds of CPU time.

    Args:
        decoder: decoder of both models; None for values.
        parts: parts of one model.
        parameters: parameters of the decoder.
        encoded: whether the output is stored as FP8 blocks of 128 x 128 with scales in F32, and not as bfloat16.
        compared: whether what rounding does to the difference from the first model is summed; see `survival`.
    """
    shape = (ROWS, COLUMNS)
    accesses, dtypes, shapes = zip(*parts, strict=True)
    stages, sources = _values(decoder, InputSpec(len(parts), None, shape, accesses, shapes), parameters or {})
    method: Traceable = merge_methods()["linear"]
    if compared and not encoded:
        method = Compared(method, 0, "bfloat16")
    linear = method.kernel(InputSpec(2, None, shape), {"weight": (0.4, 0.6)})
    stages.append(Part(linear, tuple(sources)))
    dtypes_out = ["BF16"]
    if encoded:
        given = {"rows": 128, "columns": 128, "scale_dtype": "F32", "power_of_two": False}
        merged = (~(len(stages) - 1), sources[0])[: 1 + compared]
        stages.append(Part(FP8_BLOCKS.kernel(InputSpec(len(merged), None, shape), given), merged))
        dtypes_out = ["F8_E4M3", "F32"]
    kernel = Composition(InputSpec(2 * len(parts), None, shape, accesses * 2, shapes * 2), stages)
    compiled = Compiled(kernel, dtypes * 2, *dtypes_out)
    random = np.random.default_rng(1)
    buffers = [[_numbers(random, dtype, size) for dtype, size in zip(dtypes, shapes, strict=True) for _ in range(2)]
               for _ in range(CHUNKS)]  # fmt: skip
    order = [2 * part + model for model in range(2) for part in range(len(parts))]
    memory = np.zeros(compiled.scratch + 64, np.uint8)
    scratch = memory[-memory.ctypes.data % 64 :][: compiled.scratch]
    outs = [[np.zeros(2 * ROWS * COLUMNS, np.uint8) for _ in dtypes_out] for _ in range(CHUNKS)]
    combine = FusedPass(compiled, None, None, scratch).combine

    def run() -> float:
        start = time.thread_time()
        for chunk, out in zip(buffers, outs, strict=True):
            inputs = [memoryview(chunk[place]) for place in order]
            combine(Chunk(inputs, 0, ROWS * COLUMNS, 0, (0,) * len(inputs)), *map(memoryview, out))
        return time.thread_time() - start

    run()  # compiles
    return run


def _values(
    decoder: Decoder | None, inputs: InputSpec, parameters: Mapping[str, float]
) -> tuple[list[Part], list[int]]:
    """The stages that decode two models, and where the method finds their values."""
    count = len(inputs.accesses or ())
    places = [tuple(range(model * count, (model + 1) * count)) for model in range(2)]
    if decoder is None:
        return [], [place for own in places for place in own]
    kernel = decoder.kernel(inputs, parameters)
    return [Part(kernel, own) for own in places], [~0, ~1]


def _numbers(random: np.random.Generator, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """Finite numbers of a dtype as bytes."""
    count = shape[0] * shape[1]
    if dtype == "F32":
        return random.random(count, np.float32).view(np.uint8)
    if dtype == "BF16":
        return (random.integers(0x3C00, 0x3F80, count, dtype=np.uint16)).view(np.uint8)
    low, high = {"F8_E8M0": (118, 132), "F8_E4M3": (0, 0x7E), "U8": (0, 256)}[dtype]
    return random.integers(low, high, count, dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    loops = {name: loop(*found) for name, found in FORMATS.items()}
    loops["FP8 blocks, to FP8 blocks"] = loop(*FORMATS["FP8 blocks"], encoded=True)
    loops["FP8 blocks, to FP8 blocks, compared"] = loop(*FORMATS["FP8 blocks"], encoded=True, compared=True)
    loops["bfloat16, compared"] = loop(*FORMATS["bfloat16"], compared=True)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(arguments.runs):
        for name, run in loops.items():
            seconds[name].append(run())
    elements = ROWS * COLUMNS * CHUNKS
    ns = {name: 1e9 * statistics.median(each) / elements for name, each in seconds.items()}
    least = {name: 1e9 * min(each) / elements for name, each in seconds.items()}
    print("| two models in | ns per element | least | times bfloat16 | bar |\n|---|---|---|---|---|")
    for name, each in ns.items():
        print(f"| {name} | {each:.2f} | {least[name]:.2f} | {each / ns['bfloat16']:.1f} | {BARS.get(name, '')} |")


if __name__ == "__main__":
    main()
