"""Make the models that the benchmarks merge: a base and three fine-tunes of a true Llama's shapes, in bfloat16.

    python -m benchmarks.make_models [DIRECTORY] [--size 1b|3b|8b|tiny]

Weights are normal (0, 0.02), task vectors normal (0, 0.002). Models that are there already are kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path

from tests.support import models

SIZES = {
    "tiny": models.tiny_llama,
    "1b": models.llama_3_2_1b,
    "3b": models.llama_3_2_3b,
    "8b": models.llama_3_8b,
}
NAMES = ("base", "a", "b", "c")
CACHE = Path("~/.cache/mergeloom-bench").expanduser()


def make_models(directory: Path, size: str, names: Collection[str] = NAMES) -> list[Path]:
    """Write what is missing of the named ones of base, a, b and c below `directory`; returns their directories."""
    model = SIZES[size]()
    total = 2 * model.parameters
    shard = total * 6 // 10 if total < 5 * 10**9 else 5 * 10**9
    base = models.Random(0)
    for seed, name in enumerate(NAMES):
        final, partial = directory / name, directory / f"{name}.partial"
        if name not in names or final.exists():
            continue
        began = time.monotonic()
        shutil.rmtree(partial, ignore_errors=True)
        fill = models.FineTune(base, seed) if seed else base
        models.write_checkpoint(partial, model, shard_bytes=shard, fill=fill)
        models.write_tokenizer(partial)
        partial.rename(final)
        seconds = time.monotonic() - began
        print(f"{final}: {total / 1e9:.2f} GB in {seconds:.1f} s ({total / 1e9 / seconds:.2f} GB/s)", file=sys.stderr)
    return [directory / name for name in NAMES if name in names]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, help=f"default: {CACHE}/SIZE")
    parser.add_argument("--size", choices=SIZES, default="1b")
    arguments = parser.parse_args()
    make_models(arguments.directory or CACHE / arguments.size, arguments.size)


if __name__ == "__main__":
    main()
