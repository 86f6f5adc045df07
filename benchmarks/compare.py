"""Measure mergeloom, mergekit and the floor beside each other, as whole processes, in one run.

    python -m benchmarks.compare --models DIRECTORY [--methods linear ties ...] [--sides mergeloom mergekit floor]

The sides alternate. Before every timed run the inputs are read once (or dropped from the page cache: --cold) and memory
is touched, because a virtual machine may have given its free memory back to its host, which then makes the first
process to use it pay (6 s instead of 1.5 s for 2.5 GB, where this was found). A run counts from the start of the
process to its end; on a disk, to the end of an fsync of every file that it wrote. Peak RSS is the kernel's, of the
process itself (wait4).

This process stays small, and imports nothing but the standard library: the kernel counts what the parent holds at the
moment of spawning as the child's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
RESULTS = HERE / "results"
SIDES = ("mergeloom", "mergekit", "floor")


# ---------------------------------------------------------------------------------------------- what is merged


@dataclass(frozen=True, slots=True)
class Case:
    """A merge to measure: the models that it reads, and the rest of its recipe as a user would write it."""

    inputs: str
    recipe: str
    weight: str = ""

    def text(self, method: str, models: Path) -> str:
        """The recipe. Models come by absolute path; `base` is the base model wherever there is one."""
        lines = [f"merge_method: {method}", "dtype: bfloat16", "models:"]
        for name in self.inputs.split():
            if name != "base" or method in ("passthrough", "slerp"):
                lines.append(f"  - model: {models / name}")
                if self.weight:
                    lines.append(f"    parameters: {{{self.weight}}}")
        if "base" in self.inputs.split() and method != "passthrough":
            lines.append(f"base_model: {models / 'base'}")
        return "\n".join([*lines, *([self.recipe] if self.recipe else [])]) + "\n"


CASES = {
    "linear": Case("a b c", "", "weight: 0.33"),
    "slerp": Case("base a", "parameters: {t: 0.5}"),
    "task_arithmetic": Case("base a b c", "", "weight: 0.33"),
    "ties": Case("base a b c", "", "weight: 0.33, density: 0.5"),
    "dare_ties": Case("base a b c", "", "weight: 0.33, density: 0.5"),
    "della": Case("base a b c", "", "weight: 0.33, density: 0.5, epsilon: 0.1"),
    "breadcrumbs": Case("base a b c", "", "weight: 0.33, density: 0.9, gamma: 0.01"),
    "sce": Case("base a b c", "parameters: {select_topk: 0.5}"),
    "model_stock": Case("base a b c", ""),
    "karcher": Case("a b c", ""),
    "passthrough": Case("base", ""),
}


# ---------------------------------------------------------------------------------------------- one process


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process took.

    Args:
        seconds: from its start to its end.
        cpu_seconds: of all cores together.
        others_cpu_seconds: what all other processes, and the kernel's own threads, took meanwhile.
        peak_rss: the most bytes that it held resident.
    """

    seconds: float
    cpu_seconds: float
    others_cpu_seconds: float
    peak_rss: int


class ProcessError(Exception):
    """A measured process did not end with exit code 0; its log is in the text."""


def run(command: list[str], durable: Path | None = None) -> Measured:
    """Run a program from its start to its end; to the end of an fsync of all files below `durable`, if given."""
    with tempfile.TemporaryFile() as log:
        actions = [(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
        busy = busy_seconds()
        began = time.monotonic()
        child = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
        if durable is not None:
            sync(durable)
        seconds = time.monotonic() - began
        busy = busy_seconds() - busy
        if status:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-4000:]
            raise ProcessError(f"{' '.join(command)}\nended with {os.waitstatus_to_exitcode(status)}:\n{tail}")
    own = usage.ru_utime + usage.ru_stime
    return Measured(seconds, own, max(0.0, busy - own), usage.ru_maxrss * 1024)


def busy_seconds() -> float:
    """CPU seconds that the machine has spent on anything since it started."""
    user, nice, system, _idle, _waiting, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def sync(directory: Path) -> None:
    """Make every file below a directory, and the directories, durable."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------- before and after it


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a model."""
    return sorted(directory.glob("*.safetensors"))


def tensor_bytes(directory: Path) -> int:
    """The bytes of all tensors of a model, by its headers."""
    total = 0
    for path in shards(directory):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in header.items() if key[0] != "_"
        )
    return total


def warm(files: Iterable[Path]) -> None:
    """Read files once, so that they are in the page cache."""
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory(size: int) -> None:
    """Use `size` bytes of memory and free them, so that the next process finds its memory backed by the host."""
    path = Path(f"/dev/shm/mergeloom-bench-{os.getpid()}")
    piece = bytes(1 << 20)
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(size >> 20):
                file.write(piece)
    finally:
        path.unlink(missing_ok=True)


def wait_for_quiet(limit: float) -> None:
    """Wait until other processes leave the machine alone for two seconds; at most `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        busy = busy_seconds()
        time.sleep(2)
        if busy_seconds() - busy < 0.2:
            return


# ---------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything is, and how it is measured."""

    models: Path
    work: Path
    out: Path
    on_disk: bool
    cold: bool
    memory: int
    quiet: float
    mergekit: Path
    mergekit_flags: tuple[str, ...]
    mergeloom_flags: tuple[str, ...]
    cases: Mapping[str, Case] = field(default_factory=lambda: CASES)

    def command(self, side: str, method: str) -> list[str]:
        """The command of one side; OUT doesn't exist when it starts."""
        if side == "floor":
            size = str(tensor_bytes(self.models / self.cases[method].inputs.split()[0]))
            inputs = [str(path) for path in self.inputs(method)]
            return [sys.executable, "-S", "-E", str(HERE / "floor.py"), str(self.out), size, *inputs]
        recipe = self.work / f"{method}.yml"
        recipe.write_text(self.cases[method].text(method, self.models))
        if side == "mergekit":
            return [str(self.mergekit / "bin/mergekit-yaml"), str(recipe), str(self.out), *self.mergekit_flags]
        program = str(Path(sys.executable).with_name("mergeloom"))
        return [program, "merge", str(recipe), str(self.out), "--quiet", *self.mergeloom_flags]

    def inputs(self, method: str) -> list[Path]:
        """The files that a method's merge reads."""
        return [shard for name in self.cases[method].inputs.split() for shard in shards(self.models / name)]

    def measure(self, side: str, method: str) -> dict[str, Any]:
        """One timed run, with all that precedes and follows it."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.on_disk:
            os.sync()  # what others wrote before is not this run's
        wait_for_quiet(self.quiet)
        inputs = self.inputs(method)
        warm(inputs)
        if self.cold:
            cool(inputs)
        touch_memory(self.memory)  # after the inputs, which would take the touched memory for themselves
        command = self.command(side, method)
        if side != "floor":  # whose libraries are read from the disk as the inputs are: once before
            run([str(Path(command[0]).with_name("python")), "-c", "import safetensors, torch"])
        try:
            measured = run(command, durable=self.out if self.on_disk else None)
            if side != "floor" and (size := tensor_bytes(self.out)) != tensor_bytes(self.models / "a"):
                raise ProcessError(f"{side} {method}: the output holds {size:,} bytes of tensors")
        finally:
            shutil.rmtree(self.out, ignore_errors=True)
        result: dict[str, Any] = {
            "method": method,
            "side": side,
            "seconds": round(measured.seconds, 3),
            "cpu_seconds": round(measured.cpu_seconds, 3),
            "others_cpu_seconds": round(measured.others_cpu_seconds, 3),
            "peak_rss": measured.peak_rss,
        }
        return result


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else os.uname().machine,
        "cores": len(os.sched_getaffinity(0)),
        "ram": int(memory[1]) << 10 if memory else 0,
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Installed versions, as another interpreter sees them; what isn't there is left out."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({p: found[p] for p in sys.argv[1:] if p in found}))"
    )
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, write, 1)]
    child = os.posix_spawn(str(python), [str(python), "-c", code, *packages], os.environ, file_actions=actions)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    found: dict[str, str] = json.loads(text)
    return found


# ---------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Cell:
    """The runs of one side on one method."""

    seconds: list[float]
    peak_rss: float

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        spread = f" ({min(self.seconds):.2f} to {max(self.seconds):.2f})" if len(self.seconds) > 1 else ""
        return f"{self.median:.2f}{spread}"


def cell(runs: list[dict[str, Any]], method: str, side: str) -> Cell | None:
    """The runs of one side on one method, or None where there are none."""
    chosen = [run for run in runs if (run["method"], run["side"]) == (method, side)]
    if not chosen:
        return None
    return Cell([run["seconds"] for run in chosen], statistics.median(run["peak_rss"] for run in chosen))


def table(results: dict[str, Any]) -> str:
    """The markdown table of one results file: medians, with the smallest and largest of the runs."""
    runs: list[dict[str, Any]] = results["runs"]
    sides = [side for side in SIDES if any(run["side"] == side for run in runs)]
    heads = ["method", *(f"{side}, s" for side in sides)]
    heads += ["times faster"] if {"mergeloom", "mergekit"} <= set(sides) else []
    heads += ["of the floor"] if {"mergeloom", "floor"} <= set(sides) else []
    heads += [f"{side}, peak RSS, GiB" for side in sides if side != "floor"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method in dict.fromkeys(run["method"] for run in runs):
        cells = {side: cell(runs, method, side) for side in sides}
        ours, theirs, floor = (cells.get(side) for side in SIDES)
        row = [f"`{method}`", *(str(found or "") for found in cells.values())]
        if "times faster" in heads:
            row.append(f"{theirs.median / ours.median:.1f}" if ours and theirs else "")
        if "of the floor" in heads:
            row.append(f"{ours.median / floor.median:.2f}" if ours and floor else "")
        row += [f"{found.peak_rss / 2**30:.2f}" if found else "" for side, found in cells.items() if side != "floor"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", caption(results)])


def caption(results: dict[str, Any]) -> str:
    """What the table's figures are, what they were measured on, and how quiet the machine was."""
    runs, about = results["runs"], results["machine"]
    counts = sorted(Counter((run["method"], run["side"]) for run in runs).values())
    count = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else str(counts[0])
    stored = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    disturbed = sum(run["others_cpu_seconds"] > 0.1 * run["seconds"] for run in runs)
    flags = {
        side: f"with `{given}`" if (given := results[f"{side}_flags"]) else "with its default flags"
        for side in SIDES[:2]
    }
    sentences = [
        f"{results['title']}.",
        f"Medians of {count} (smallest to largest)." if counts[-1] > 1 else "One run each.",
        f"{about['cpu']}, {about['cores']} cores, {about['ram'] / 2**30:.0f} GiB, Linux {about['kernel']},",
        f"Python {about['python']}, {stored}; {about['date']}.",
        f"mergeloom ran {flags['mergeloom']}, mergekit {flags['mergekit']}."
        if "mergekit" in results["versions"]
        else "",
        f"In {disturbed} of {len(runs)} runs other processes took more than a tenth of a core." if disturbed else "",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def put_between_markers(document: Path, name: str, text: str) -> None:
    """Replace what a document holds between ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = document.read_text() if document.exists() else "# Benchmarks\n\nMade by `make bench`; see `benchmarks/`.\n"
    if begin not in old:
        old += f"\n{begin}\n{end}\n"
    head, _, rest = old.partition(begin)
    _, _, tail = rest.partition(end)
    document.parent.mkdir(exist_ok=True)
    document.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def size(text: str) -> int:
    """``6GB`` in bytes."""
    return int(float(text.removesuffix("GB")) * 1e9)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("~/.cache/mergeloom-bench/1b").expanduser())
    parser.add_argument("--size", default="1B", help="what the models are, for the table")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--disk", type=Path, help="put OUT below this directory, and count until it is durable")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each run")
    parser.add_argument("--memory", type=size, default=size("8GB"), help="memory to touch before each run")
    parser.add_argument("--mergekit", type=Path, default=Path(os.environ.get("MERGEKIT_ENV", ".venv-mergekit")))
    parser.add_argument("--mergekit-flags", default="", help="such as '--async-write'; none made it faster where tried")
    parser.add_argument("--mergeloom-flags", default="--max-ram 1GiB")
    parser.add_argument("--quiet", type=float, default=120, help="seconds to wait for other processes to be quiet")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/SIZE-tmpfs-warm.json and the like")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()

    where, state = "disk" if arguments.disk else "tmpfs", "cold" if arguments.cold else "warm"
    name = f"{arguments.size.lower()}-{where}-{state}"
    out = (arguments.disk or Path("/dev/shm")) / f"mergeloom-bench-out-{os.getpid()}"
    place = "OUT on disk, until durable" if arguments.disk else "OUT on tmpfs"
    pythons = {"mergeloom": (Path(sys.executable), ["mergeloom"])}
    pythons["mergekit"] = (arguments.mergekit.absolute() / "bin/python", ["mergekit", "torch", "transformers"])
    found: dict[str, str] = {}
    for side, (python, packages) in pythons.items():
        if side in arguments.sides:
            found |= versions(python, packages)
    results: dict[str, Any] = {
        "title": f"{arguments.size} shapes, bfloat16, {place}, {state} inputs",
        "machine": machine(),
        "versions": found,
        "mergekit_flags": arguments.mergekit_flags,
        "mergeloom_flags": arguments.mergeloom_flags,
        "runs": (runs := []),
    }
    target: Path = arguments.json or RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mergeloom-bench-") as work:
        bench = Bench(
            models=arguments.models.absolute(),
            work=Path(work),
            out=out,
            on_disk=arguments.disk is not None,
            cold=arguments.cold,
            memory=arguments.memory,
            mergekit=arguments.mergekit.absolute(),
            quiet=arguments.quiet,
            mergekit_flags=tuple(arguments.mergekit_flags.split()),
            mergeloom_flags=tuple(arguments.mergeloom_flags.split()),
        )
        failures = 0
        for method in arguments.methods:
            for _ in range(arguments.runs):
                for side in arguments.sides:
                    try:
                        result = bench.measure(side, method)
                    except ProcessError as failure:  # the other sides' figures are worth having
                        print(f"{method}: {failure}", file=sys.stderr)
                        failures += 1
                        continue
                    runs.append(result)
                    target.write_text(json.dumps(results, indent=1) + "\n")
                    rss = result["peak_rss"] / 2**30
                    print(
                        f"{method:16} {side:10} {result['seconds']:8} s {result['cpu_seconds']:8} s CPU {rss:7.2f} GiB",
                        flush=True,
                    )
    put_between_markers(arguments.document, f"compare {name}", table(results))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
