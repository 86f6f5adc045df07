"""Merges that are killed, starved and lied to, many times over: the same bytes come out, or the input is refused.

    python -m benchmarks.soak [--only PART] [--times 100] [--directory DIR]

It merges a small real family, a sentence encoder and two models made from it, by ties. A tenth of an hour to an hour;
root lets it mount small disks. Ends with 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from mergeloom.__main__ import main as command
from mergeloom.errors import MergeloomError
from mergeloom.io import platform
from mergeloom.io.journal import read_journal
from mergeloom.io.output import WORK
from mergeloom.merging import merge
from mergeloom.planning import Options, Plan, plan
from mergeloom.resuming import durable_of
from mergeloom.verifying import verify
from tests.faults import Disk, Kill, Stopped, watching
from tests.models import encoder_dir, perturbed_encoder
from tests.mutations import BYTES, KINDS, fuzz
from tests.outputs import digests

GROUP = 4 << 20
RATE = 60e6
"""Bytes that a throttled merge writes in a second."""
OPTIONS = Options(device="cpu", threads=2, max_ram=2 << 30, shard_size=30_000_000)
FUZZ = {"headers": 200_000, "recipes": 6_000, "plans": 6_000, "indices": 6_000, "configs": 6_000}
FLIPS = 1000


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


# ------------------------------------------------------------------------------------------------ children


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


# ------------------------------------------------------------------------------------------------ the family


@dataclass(frozen=True)
class Family:
    """What is merged.

    Args:
        directory: for all files.
        recipe: of the merge.
        planned: the merge.
        expected: the digests of its files when nothing goes wrong.
        window: when the first and the last commit of a throttled merge end, in seconds from its start.
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
        durable = durable_of(found, graph, layout, lambda shard: out / WORK / "out" / layout.shards[shard].name)
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


# ------------------------------------------------------------------------------------------------ the parts


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


@contextlib.contextmanager
def small(family: Family) -> Iterator[tuple[Plan, dict[str, str], Path]]:
    """A small merge with many commits, in small blocks; its digests, and a directory."""
    import pytest

    from tests import test_faults

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=family.directory) as name:
        test_faults.make_blocks_small(patch)
        planned = test_faults.make_plan(Path(name))
        merge(planned, Path(name) / "whole", group_bytes=test_faults.GROUP)
        yield planned, digests(Path(name) / "whole"), Path(name)


def between_calls(family: Family, times: int, chance: random.Random) -> None:
    """A kill between any two system calls that change files: SIGKILL, and torn writes."""
    from tests.test_faults import GROUP as SMALL_GROUP

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
    """Power failures: what was not synced is lost, in part or all of it, once or several times on end."""
    from tests.test_faults import GROUP as SMALL_GROUP

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


def full_disks(family: Family, times: int, chance: random.Random) -> None:
    """No space left, on small disks of their own."""
    tried = 0
    for kind in ("tmpfs", "ext4"):
        for _ in range(max(1, times // 20)):
            with disk_of(family.directory, kind) as disk:
                if disk is None:
                    say(f"No space left: {kind} was left out, since it can't be mounted here")
                    break
                tried += 1
                ballast, left = disk / "ballast", family.nbytes * chance.uniform(0.2, 0.9)
                counter, out = Counter(), disk / "out"

                class Fill(Throttle):
                    """Fills the disk in the midst of the merge."""

                    def __call__(self, call: str, *arguments: Any) -> None:
                        super().__call__(call, *arguments)
                        if self._sent > left and not ballast.exists():  # noqa: B023
                            with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):  # noqa: B023
                                while stream.write(bytes(1 << 16)):
                                    pass

                def run(out: Path = out, fill: Fill | None = None) -> int:
                    platform.DISABLED.add("fallocate")  # with it, there would be room: it was reserved
                    platform.WATCH = fill
                    try:
                        merge(family.recipe, out, OPTIONS, group_bytes=GROUP)
                    except MergeloomError as error:
                        return error.exit_code if "make room" in str(error) else 99
                    return 0

                code = ended(child(lambda: run(fill=Fill(counter, None))))  # noqa: B023
                failures.expect(code == 3, f"{kind}: a full disk ended with {code}")
                ballast.unlink()
                failures.expect(ended(child(run)) == 0, f"{kind}: going on")
                found = digests(out)
                same = {name for name in family.expected if found[name] != family.expected[name]} <= {"mergeloom.json"}
                failures.expect(same, f"{kind}: other bytes")
    say(f"No space left: {tried} merges in the midst of which the disk was full; each ended with 3 and was finished")


@contextlib.contextmanager
def disk_of(directory: Path, kind: str) -> Iterator[Path | None]:
    """A small disk with a file system of its own; None where it can't be mounted."""
    point, image = directory / "disk", directory / "image"
    point.mkdir(exist_ok=True)
    if kind == "tmpfs":
        command_line = ["mount", "-t", "tmpfs", "-o", "size=130m", "tmpfs", str(point)]
    else:
        with image.open("wb") as stream:
            stream.truncate(180 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=False, capture_output=True)
        command_line = ["mount", "-o", "loop", str(image), str(point)]
    if subprocess.run(command_line, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)
        image.unlink(missing_ok=True)


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
            seen = not verify(out).whole
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


PARTS = {
    "kills": kills,
    "terms": terms,
    "calls": between_calls,
    "power": power,
    "full": full_disks,
    "fuzz": fuzzing,
    "flips": flips,
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
