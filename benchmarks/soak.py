"""Kill merges at random instants, go on with each until it is whole, and compare every byte with an uninterrupted one.

    python -m benchmarks.soak [--kills 100] [--signal KILL]

A merge is a ties of the real sentence encoder and two perturbed copies. Commits are small (4 MiB) and writes are slowed
down, so that most kills fall between the first commit and the last. Budgets and threads change at each restart.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mergeloom.io.journal import read_journal
from tests.models import encoder_dir, perturbed_encoder

GROUP = 4 << 20
WORKER = (
    """
import sys, time
from mergeloom.io import output
from mergeloom.merging import merge
from mergeloom.planning import Options
write = output.OutputDirectory.write
def slow(self, shard, offset, data):
    time.sleep(len(data) / 60e6)
    write(self, shard, offset, data)
output.OutputDirectory.write = slow
recipe, out, ram, threads = sys.argv[1:]
merge(recipe, out, Options(max_ram=int(ram), threads=int(threads), device="cpu"), group_bytes=%d)
"""
    % GROUP
)


def digests(out: Path) -> dict[str, str]:
    """A digest of each file."""
    files = sorted(file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): hashlib.blake2b(file.read_bytes()).hexdigest() for file in files}


def committed(out: Path) -> bool:
    """Whether anything is durable, and the merge is not whole."""
    found = read_journal(out / ".mergeloom" / "journal")
    return found is not None and bool(found.records)


def start(recipe: Path, out: Path, chance: random.Random) -> subprocess.Popen[bytes]:
    """A merge in a process of its own, with a budget and threads of its own."""
    ram = chance.choice([400, 600, 1024, 4096]) << 20
    command = [sys.executable, "-c", WORKER, str(recipe), str(out), str(ram), str(chance.choice([1, 2, 3]))]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> int:
    """Run the soak; 0 where every result is identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="mergeloom-soak-") as name:
        work = Path(name)
        models = [encoder_dir(), *(perturbed_encoder(work / f"m{seed}", seed) for seed in (1, 2))]
        listed = "".join(f"  - {{model: {model}, parameters: {{weight: 0.5, density: 0.4}}}}\n" for model in models[1:])
        recipe = work / "ties.yml"
        recipe.write_text(f"merge_method: ties\nbase_model: {models[0]}\nmodels:\n{listed}")
        begun = time.monotonic()
        if start(recipe, work / "whole", random.Random(1)).wait() != 0:
            raise SystemExit("the uninterrupted merge failed")
        lasts = time.monotonic() - begun
        expected = digests(work / "whole")
        kills = within = merges = wrong = 0
        while kills < given.kills:
            out = work / "out"
            while True:
                process = start(recipe, out, chance)
                while process.poll() is None and not committed(out):
                    time.sleep(0.01)
                try:
                    process.wait(chance.uniform(0, lasts / 3) if kills < given.kills else None)
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(getattr(signal, f"SIG{given.signal}"))
                    process.wait()
                    kills += 1
                    within += committed(out)
            merges += 1
            if process.returncode != 0 or digests(out) != expected:
                wrong += 1
            shutil.rmtree(out)
        print(
            f"{kills} kills by SIG{given.signal} in {merges} merges, {within} of them after the first commit; "
            f"{wrong} results differ from the uninterrupted one"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
