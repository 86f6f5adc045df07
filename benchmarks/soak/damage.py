"""Mutated inputs, and flipped bits in a finished output."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

from benchmarks.soak.harness import Family, child, ended, failures, say
from mergeloom.engine.run.verify import verify
from mergeloom.errors import MergeloomError
from tests.support.mutations import BYTES, KINDS, fuzz

FUZZ = {"headers": 200_000, "recipes": 6_000, "plans": 6_000, "indices": 6_000, "configs": 6_000}
FLIPS = 1000


def fuzzing(family: Family, times: int, chance: random.Random) -> None:
    """Mutated inputs."""
    seed = chance.randrange(1 << 30)
    for kind in KINDS:
        count = FUZZ[kind] * times // 100

        def run(kind: str = kind, count: int = count) -> int:
            with tempfile.TemporaryDirectory(dir=family.directory) as name:
                outcome = fuzz(kind, count, seed, Path(name))
            for failure in outcome.failures:
                os.write(1, f"  {failure[:1000]}\n".encode())
            good = not outcome.failures and outcome.grown < BYTES
            told = f"  {outcome.tried} {kind}, {outcome.refused} refused, at most {outcome.lines:,} lines executed, "
            os.write(1, f"{told}{outcome.grown >> 20} MiB more memory\n".encode())
            return 0 if good else 1

        failures.expect(ended(child(run)) == 0, f"fuzzing {kind}")
    say(f"Fuzzing: seed {seed}")


def flips(family: Family, times: int, chance: random.Random) -> None:
    """Flipped bits in what was merged."""
    out = family.directory / "whole"
    shards = sorted(out.glob("*.safetensors"))
    others = [path for path in out.rglob("*") if path.is_file() and path not in shards]
    counts = {"data": 0, "header": 0, "index": 0, "config": 0, "manifest": 0, "other": 0}
    found = 0
    for number in range(FLIPS * times // 100):
        if number % 10 < 7:
            file = chance.choice(shards)
            start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            header = number % 10 >= 5
            place = chance.randrange(start) if header else chance.randrange(start, file.stat().st_size)
            what = "header" if header else "data"
        else:
            file = chance.choice(others)
            place = chance.randrange(file.stat().st_size)
            kinds = {"model.safetensors.index.json": "index", "config.json": "config", "mergeloom.json": "manifest"}
            what = kinds.get(file.name, "other")
        flip(file, place, bit := 1 << chance.randrange(8))
        try:
            seen = not verify(out, sources=True).whole
        except MergeloomError:
            seen = True
        flip(file, place, bit)
        failures.expect(seen, f"bit {bit} of byte {place} of {file.name}")
        found += seen
        counts[what] += 1
    failures.expect(verify(out, sources=True).whole, "what was not changed")
    say(f"verify: {found} of {sum(counts.values())} flipped bits found: {counts}")


def flip(file: Path, place: int, bit: int) -> None:
    """Flip a bit of a file."""
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ bit]))
