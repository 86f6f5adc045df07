"""What every part of the soak uses: the family of models, merges in child processes, and the record of failures."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from mergeloom.__main__ import main as command
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.engine.run.recovery.recover import recover
from mergeloom.io import platform
from mergeloom.io.output.journal import read_journal
from mergeloom.io.output.lock import WORK
from tests.support.models import encoder_dir, perturbed_encoder
from tests.support.outputs import digests

GROUP = 4 << 20
RATE = 60e6
"""Bytes that a throttled merge writes in a second."""
OPTIONS = Options(device="cpu", threads=2, max_ram=2 << 30, shard_size=30_000_000)


@dataclass
class Failures:
    """What was not as it should be."""

    seen: int = 0

    def expect(self, right: bool, what: object) -> None:
        """Note it where something isn't right."""
        if not right:
            self.seen += 1
            print(f"  FAILED: {what}", flush=True)


failures = Failures()


class Counter:
    """Numbers that a child process leaves behind, however it ends: bytes written to shards, seconds of two calls."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 24)

    def get(self, index: int) -> int:
        """One of the three."""
        return int.from_bytes(self._memory[8 * index : 8 * index + 8], "little")

    def put(self, index: int, value: int) -> None:
        """Change it."""
        self._memory[8 * index : 8 * index + 8] = value.to_bytes(8, "little")


class Throttle:
    """Lets a merge write no faster than a rate, and notes how much it wrote and when it committed."""

    def __init__(self, counter: Counter, rate: float | None) -> None:
        self._counter = counter
        self._rate = rate
        self._begun = time.monotonic()
        self._sent = 0
        self._journals: set[int] = set()
        for index in range(3):
            counter.put(index, 0)

    def __call__(self, call: str, *arguments: Any) -> None:
        if call == "write":
            name = os.readlink(f"/proc/self/fd/{arguments[0]}")  # noqa: PTH115
            if name.endswith(".safetensors"):
                self._sent += len(arguments[1])
                self._counter.put(0, self._sent)
                if self._rate:
                    time.sleep(max(0.0, self._begun + self._sent / self._rate - time.monotonic()))
            elif name.endswith("journal"):
                now = int((time.monotonic() - self._begun) * 1e6)
                self._counter.put(1, self._counter.get(1) or now)
                self._counter.put(2, now)


def child(run: Callable[[], int]) -> int:
    """Run something in a process of its own, which has all libraries already; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = run()
    except BaseException as error:  # noqa: BLE001  it is printed, and the process ends
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def merging(recipe: Path, out: Path, options: Options, watch: Callable[..., None] | None) -> Callable[[], int]:
    """A merge, for `child`."""

    def run() -> int:
        platform.WATCH = watch
        merge(recipe, out, options, group_bytes=GROUP)
        return 0

    return run


def by_command(recipe: Path, out: Path, counter: Counter, threads: int, ram: str) -> Callable[[], int]:
    """A merge by the command line, for `child`."""

    def run() -> int:
        platform.WATCH = Throttle(counter, RATE)
        assert merge.__kwdefaults__ is not None
        merge.__kwdefaults__["group_bytes"] = GROUP
        given = [
            "merge",
            str(recipe),
            str(out),
            "--device",
            "cpu",
            "--threads",
            str(threads),
            "--max-ram",
            ram,
            "--quiet",
        ]
        return command([*given, "--shard-size", str(OPTIONS.shard_size)])

    return run


@dataclass(frozen=True)
class Family:
    """A merge to disturb, and its expected output.

    Args:
        directory: directory for all files.
        recipe: recipe of the merge.
        planned: plan of the merge.
        expected: digests of the output files of an undisturbed merge.
        window: seconds from the start of a throttled merge to the end of its first and of its last commit.
    """

    directory: Path
    recipe: Path
    planned: Plan
    expected: dict[str, str]
    window: tuple[float, float]

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        graph = self.planned.built.graph
        return sum(graph.nbytes(output.node) for output in graph.outputs)

    def durable(self, out: Path) -> int | None:
        """How many bytes of tensors a journal says are durable; None where there is none."""
        found = read_journal(out / WORK / "journal")
        if found is None:
            return None
        graph, layout = self.planned.built.graph, self.planned.layout
        durable = recover(found, graph, layout, lambda shard: out / WORK / "out" / layout.shards[shard].name)
        failures.expect(durable.damaged == 0, f"{out}: the journal says more than there is")
        done = durable.done(graph, layout)
        return sum(done.get(output.node, 0) for output in graph.outputs)


def make_family(directory: Path) -> Family:
    """A sentence encoder, two models made from it, and their merge."""
    models = [perturbed_encoder(directory / f"fine-tune-{seed}", seed) for seed in (1, 2)]
    recipe = directory / "recipe.yml"
    named = [{"model": str(model), "parameters": {"weight": 0.5, "density": 0.5}} for model in models]
    recipe.write_text(json.dumps({"merge_method": "ties", "base_model": str(encoder_dir()), "models": named}))
    planned = plan(recipe, OPTIONS)
    for _ in range(2):  # the second time, everything is in the page cache, as it will be
        shutil.rmtree(directory / "whole", ignore_errors=True)
        counter = Counter()
        failures.expect(
            ended(child(merging(recipe, directory / "whole", OPTIONS, Throttle(counter, RATE)))) == 0, "the first merge"
        )
    window = (counter.get(1) / 1e6, counter.get(2) / 1e6)
    return Family(directory, recipe, planned, digests(directory / "whole"), window)


def say(text: str) -> None:
    """A line of the report."""
    print(text, flush=True)
