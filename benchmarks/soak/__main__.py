"""Runs the parts of the soak.

    python -m benchmarks.soak [--only PART] [--times 100] [--directory DIR]

It merges a small real family, a sentence encoder and two models made from it, by ties; the part ``causal`` merges two
tiny models of each causal language model class of transformers. A quarter of an hour to two hours; root lets it mount
small disks. Ends with 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.soak.calls import between_calls, power
from benchmarks.soak.causal import causal
from benchmarks.soak.damage import flips, fuzzing
from benchmarks.soak.disks import full_disks
from benchmarks.soak.harness import GROUP, RATE, failures, make_family, say
from benchmarks.soak.kills import kills, terms
from benchmarks.soak.tampering import tampering

PARTS = {
    "kills": kills,
    "terms": terms,
    "tampering": tampering,
    "calls": between_calls,
    "power": power,
    "full": full_disks,
    "fuzz": fuzzing,
    "flips": flips,
    "causal": causal,
}


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--times", type=int, default=100, help="merges to kill; all else goes along with it")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the instants and mutations")
    parser.add_argument("--directory", type=Path, help="for all files; some 700 MB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    say(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        family = make_family(Path(name))
        say(
            f"ties of 3 models, {family.nbytes / 1e6:.0f} MB, groups of {GROUP >> 20} MiB, {RATE / 1e6:.0f} MB/s: "
            f"commits "
            f"from {family.window[0]:.2f} to {family.window[1]:.2f} s"
        )
        for part in arguments.only or PARTS:
            begun = time.monotonic()
            PARTS[part](family, arguments.times, random.Random(f"{part} {arguments.seed}"))
            say(f"  ({time.monotonic() - begun:.0f} s)")
    say(f"{failures.seen} failures" if failures.seen else "no failures")
    return 1 if failures.seen else 0


if __name__ == "__main__":
    sys.exit(main())
