"""Kills between any two system calls that change files, and power failures."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.soak.harness import Family, child, ended, failures, say
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Plan
from mergeloom.io import platform
from tests.support.faults import Disk, Kill, Stopped, watching
from tests.support.outputs import digests


@contextlib.contextmanager
def small(family: Family) -> Iterator[tuple[Plan, dict[str, str], Path]]:
    """A small merge with many commits, in small blocks; its digests, and a directory."""
    import pytest

    from tests.support.merges.small import GROUP, make_blocks_small, make_plan

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=family.directory) as name:
        make_blocks_small(patch)
        planned = make_plan(Path(name))
        merge(planned, Path(name) / "whole", group_bytes=GROUP)
        yield planned, digests(Path(name) / "whole"), Path(name)


def between_calls(family: Family, times: int, chance: random.Random) -> None:
    """A kill between any two system calls that change files: SIGKILL, and torn writes."""
    from tests.support.merges.small import GROUP as SMALL_GROUP

    tried = 0
    with small(family) as (planned, expected, directory):
        calls = Kill()
        with watching(calls):
            merge(planned, directory / "counted", group_bytes=SMALL_GROUP)
        for point in range(len(calls.calls)):
            for how in ("SIGKILL", "torn"):
                out = directory / "out"
                if how == "SIGKILL":

                    def run(point: int = point, out: Path = out) -> int:
                        kill = Kill(point)

                        def watch(call: str, *arguments: Any) -> None:
                            try:
                                kill(call, *arguments)
                            except Stopped:
                                os.kill(os.getpid(), signal.SIGKILL)

                        platform.WATCH = watch
                        merge(planned, out, group_bytes=SMALL_GROUP)
                        return 0

                    failures.expect(ended(child(run)) in (-signal.SIGKILL, 0), f"call {point}")
                else:
                    with watching(Kill(point, torn=True)), contextlib.suppress(Stopped):
                        merge(planned, out, group_bytes=SMALL_GROUP)
                merge(planned, out, group_bytes=SMALL_GROUP)
                failures.expect(digests(out) == expected, f"{how} after {point} calls: other bytes")
                shutil.rmtree(out)
                tried += 1
    say(f"Between system calls: {tried} kills, two after each of {len(calls.calls)} calls; all byte-identical")


def power(family: Family, times: int, chance: random.Random) -> None:
    """Simulate power failures: lose some or all of the data that was not synced, once or several times in a row."""
    from tests.support.merges.small import GROUP as SMALL_GROUP

    tried = lost = 0
    with small(family) as (planned, expected, directory):
        calls = Kill()
        with watching(calls):
            merge(planned, directory / "counted", group_bytes=SMALL_GROUP)
        points = [[point] for point in range(len(calls.calls))]
        points += [[chance.randrange(10, len(calls.calls)) for _ in range(4)] for _ in range(times)]
        for share in (0.0, 0.1, 0.5, 0.9):
            for several in points:
                root = directory / "root"
                root.mkdir()
                for point in several:
                    disk = Disk(root, point)
                    with watching(disk), contextlib.suppress(Stopped):
                        merge(planned, root / "deep" / "out", group_bytes=SMALL_GROUP)
                    if not disk.failed:
                        break
                    disk.lose(chance, share)
                    lost += 1
                merge(planned, root / "deep" / "out", group_bytes=SMALL_GROUP)
                failures.expect(digests(root / "deep" / "out") == expected, f"power, {several}, {share}: other bytes")
                shutil.rmtree(root)
                tried += 1
    say(f"Power: {tried} merges, {lost} failures, after each call and four on end; all byte-identical")
