"""Measures mergeloom, mergekit, the first edition and the floor alternately, as separate processes, in one run.

    python -m benchmarks.compare --models DIRECTORY [--methods linear ties ...] [--sides mergeloom mergekit first floor]

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
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.process import (
    ProcessError,
    cool,
    machine,
    run,
    shards,
    tensor_bytes,
    touch_memory,
    versions,
    wait_for_quiet,
    warm,
)
from benchmarks.tables import SIDES, put_between_markers, table

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
RESULTS = HERE / "results"


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


# ---------------------------------------------------------------------------------------------- before and after it


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
    first: Path
    threads: int
    mergekit_flags: tuple[str, ...]
    mergeloom_flags: tuple[str, ...]
    cases: Mapping[str, Case] = field(default_factory=lambda: CASES)

    def command(self, side: str, method: str) -> list[str]:
        """The command of one side; OUT doesn't exist when it starts."""
        if side == "floor":
            size = str(tensor_bytes(self.models / self.cases[method].inputs.split()[0]))
            inputs = [str(path) for path in self.inputs(method)]
            return [sys.executable, "-S", "-E", str(HERE / "floor.py"), str(self.out), size, str(self.threads), *inputs]
        recipe = self.work / f"{method}.yml"
        recipe.write_text(self.cases[method].text(method, self.models))
        if side == "mergekit":
            return [str(self.mergekit / "bin/mergekit-yaml"), str(recipe), str(self.out), *self.mergekit_flags]
        python = self.first / "bin/python" if side == "first" else Path(sys.executable)
        program = str(python.with_name("mergeloom"))
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
            libraries = "llvmlite.binding, numpy, safetensors" if side == "mergeloom" else "safetensors, torch"
            run([str(Path(command[0]).with_name("python")), "-c", f"import {libraries}"])
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


# ---------------------------------------------------------------------------------------------- the table


def size(text: str) -> int:
    """``6GB`` in bytes."""
    return int(float(text.removesuffix("GB")) * 1e9)


def _arguments() -> argparse.Namespace:
    """The command line's arguments."""
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
    parser.add_argument("--first", type=Path, default=Path(".venv-first"), help="environment with commit d163d86")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of the floor")
    parser.add_argument("--mergekit-flags", default="", help="such as '--async-write'; none made it faster where tried")
    parser.add_argument("--mergeloom-flags", default="--max-ram 1GiB")
    parser.add_argument("--quiet", type=float, default=120, help="seconds to wait for other processes to be quiet")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/SIZE-tmpfs-warm.json and the like")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    return parser.parse_args()


def main() -> None:
    """The command line."""
    arguments = _arguments()
    where, state = "disk" if arguments.disk else "tmpfs", "cold" if arguments.cold else "warm"
    name = f"{arguments.size.lower()}-{where}-{state}"
    out = (arguments.disk or Path("/dev/shm")) / f"mergeloom-bench-out-{os.getpid()}"
    place = "OUT on disk, until durable" if arguments.disk else "OUT on tmpfs"
    pythons = {"mergeloom": (Path(sys.executable), ["mergeloom"])}
    pythons["first"] = (arguments.first.absolute() / "bin/python", ["torch"])
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
            first=arguments.first.absolute(),
            threads=arguments.threads,
            quiet=arguments.quiet,
            mergekit_flags=tuple(arguments.mergekit_flags.split()),
            mergeloom_flags=tuple(arguments.mergeloom_flags.split()),
        )
        failures = _measure_all(bench, arguments, runs, lambda: target.write_text(json.dumps(results, indent=1) + "\n"))
    put_between_markers(arguments.document, f"compare {name}", table(results))
    sys.exit(1 if failures else 0)


def _measure_all(
    bench: Bench, arguments: argparse.Namespace, runs: list[dict[str, Any]], save: Callable[[], object]
) -> int:
    """Measure every method on every side, in turn; the number of failures."""
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
                save()
                rss = result["peak_rss"] / 2**30
                print(
                    f"{method:16} {side:10} {result['seconds']:8} s {result['cpu_seconds']:8} s CPU {rss:7.2f} GiB",
                    flush=True,
                )
    return failures


if __name__ == "__main__":
    main()
