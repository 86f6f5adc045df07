"""SIGKILL and SIGTERM at random instants."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

from benchmarks.soak.harness import (
    GROUP,
    OPTIONS,
    RATE,
    Counter,
    Family,
    Throttle,
    by_command,
    child,
    ended,
    failures,
    merging,
    say,
)
from mergeloom.engine.run.plan import Options
from tests.support.outputs import digests


def kills(family: Family, times: int, chance: random.Random) -> None:
    """SIGKILL at random instants."""
    inside = again = most = 0
    headers = sum(len(shard.header) for shard in family.planned.layout.shards)
    for number in range(times):
        out = family.directory / "out"
        counter = Counter()
        written, killed = 0, False
        # most are killed once, and every tenth one five times
        for _ in range(5 if number % 10 == 9 else 1):
            begun = time.monotonic()
            options = Options(device="cpu", threads=chance.choice((1, 2, 3)), max_ram=2 << 30, shard_size=30_000_000)
            pid = child(merging(family.recipe, out, options, Throttle(counter, RATE)))
            time.sleep(max(0.0, begun + chance.uniform(*family.window) - time.monotonic()))
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            failures.expect(code in (-signal.SIGKILL, 0), f"kill {number}: it ended with {code}")
            written += counter.get(0)
            if code == 0:
                break
            durable = family.durable(out)
            killed = killed or (durable is not None and 0 < durable < family.nbytes)
            again += 1
        inside += killed
        code = ended(child(merging(family.recipe, out, OPTIONS, Throttle(counter, None))))
        written += counter.get(0)
        failures.expect(code == 0, f"kill {number}: going on ended with {code}")
        failures.expect(digests(out) == family.expected, f"kill {number}: other bytes")
        if number % 10 != 9:
            repeated = written - family.nbytes - headers
            most = max(most, repeated)
            failures.expect(repeated <= GROUP, f"kill {number}: {repeated} bytes were written twice")
        shutil.rmtree(out)
    failures.expect(inside >= 0.9 * times, f"only {inside} kills came between the first commit and the last")
    say(
        f"SIGKILL: {times} merges, {again} kills; {inside} merges killed between the first commit and the last; all "
        f"byte-identical; at most {most / 2**20:.2f} MiB written twice, of {GROUP / 2**20:.0f} MiB allowed"
    )


def terms(family: Family, times: int, chance: random.Random) -> None:
    """SIGTERM, with another budget and other threads at each restart."""
    slowest, signals, inside = 0.0, 0, 0
    for number in range(times):
        out = family.directory / "out"
        counter = Counter()
        stops = 0
        for start in range(20):
            threads, ram = chance.choice((1, 2, 4)), chance.choice(("700MiB", "900MiB", "1500MiB", "3GiB"))
            begun = time.monotonic()
            pid = child(by_command(family.recipe, out, counter, threads, ram))
            if start < 2:
                time.sleep(max(0.0, begun + chance.uniform(0.3, 1) * family.window[1] - time.monotonic()))
                sent = time.monotonic()
                os.kill(pid, signal.SIGTERM)
                code = ended(pid)
                slowest = max(slowest, time.monotonic() - sent)
                failures.expect(code in (130, 0), f"SIGTERM {number}: it ended with {code}")
                signals += code == 130
                durable = family.durable(out)
                stops += code == 130 and durable is not None and 0 < durable < family.nbytes
            else:
                code = ended(pid)
                failures.expect(code == 0, f"SIGTERM {number}: going on ended with {code}")
            if code == 0:
                break
        inside += stops > 0
        failures.expect(digests(out) == family.expected, f"SIGTERM {number}: other bytes")
        shutil.rmtree(out)
    failures.expect(slowest < 2, f"SIGTERM: {slowest:.2f} s")
    say(
        f"SIGTERM: {times} merges, {signals} signals, {inside} merges stopped between the first commit and the last; "
        f"other threads and budgets at each restart; all byte-identical; at most {slowest:.2f} s from signal to end"
    )
