"""Mutation testing: `make mutants` runs the tests against the scheduler, the states of tasks, the cache, the
ledger and the selection, each time with one small mistake in the code.

    python -m tests.support.scripts.mutate [--each 150] [--seed 0] [--modules engine/schedule/schedule.py ...]

cosmic-ray makes the mistakes, in a copy of the repository. A sample is drawn for each module; the mistakes in `BY_HAND`
are always made. A mutant that no test notices is printed as a diff: either a test is missing, or the code is redundant.
"""

from __future__ import annotations

import argparse
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from cosmic_ray.ast import ast_nodes, get_ast  # type: ignore[import-not-found]
from cosmic_ray.mutating import mutate_code  # type: ignore[import-not-found]
from cosmic_ray.plugins import get_operator, operator_names  # type: ignore[import-not-found]

from tests.support.paths import ROOT

_SCHEDULE = tuple(f"tests/unit/schedule/test_{name}.py" for name in ("eviction", "schedule", "steps", "traffic"))
_EXECUTE = tuple(f"tests/unit/execute/test_{name}.py" for name in ("ledger", "cache", "executor"))
_STATES = tuple(f"tests/unit/execute/test_{name}.py" for name in ("task_flow", "task_states", "executor"))
TESTS = {
    "engine/schedule/schedule.py": (*_EXECUTE, *_SCHEDULE, "tests/unit/run/test_alternatives.py"),
    "engine/schedule/requirements.py": (*_SCHEDULE, *_EXECUTE),
    "engine/schedule/simulate.py": (*_SCHEDULE, *_EXECUTE),
    "engine/execute/cache.py": _EXECUTE,
    "engine/execute/ledger.py": _EXECUTE,
    "engine/execute/slot_allocator.py": _EXECUTE,
    "engine/execute/node_state.py": _STATES,
    "engine/execute/task_flow.py": _STATES,
    "engine/execute/tasks.py": _STATES,
    "engine/run/buffers.py": ("tests/unit/run/test_buffers.py",),
    "engine/run/recovery/records.py": ("tests/unit/run/test_records.py", "tests/unit/run/test_shard_writer.py"),
    "methods/kernel/reduction/selection.py": ("tests/unit/methods/test_selection.py",),
}
"""The test files that run against each module's mutants, the quickest first."""
SECONDS = 240
"""Time limit of a mutant's tests; a mutant that exceeds it is counted as ``timeout``, and as noticed."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake: the n-th that one of cosmic-ray's operators can make in a module."""

    module: str
    operator: str
    number: int

    def change(self, code: str) -> str | None:
        """Return the module's code with the mistake in it; None if there is nothing to change."""
        changed: str | None = mutate_code(code, get_operator(self.operator)(), self.number)
        return changed


@dataclass(frozen=True, slots=True)
class ByHand:
    """A mistake that cosmic-ray does not make, as replacements in a module."""

    module: str
    operator: str
    replacements: tuple[tuple[str, str], ...]
    number: int = 0

    def change(self, code: str) -> str:
        """Return the module's code with the mistake in it."""
        for before, after in self.replacements:
            if code.count(before) != 1:
                raise ValueError(f"{self.module} does not contain once: {before}")
            code = code.replace(before, after)
        return code


BY_HAND = (
    ByHand(
        "engine/schedule/simulate.py",
        "the source needed soonest is dropped",
        (
            ("(-next_use, -source.read, -source.chunk_length))", "(next_use, -source.read, -source.chunk_length))"),
            ("if held.ram and current == next_use:", "if held.ram and current == -next_use:"),
            ("return next_use, source", "return current, source"),
        ),
    ),
    ByHand(
        "engine/execute/cache.py",
        "chunks are dropped by read alone",
        (
            (
                "list(self._chunks.get(source, {}).values())",
                "[c for s, chunks in self._chunks.items() if s.read == source.read for c in chunks.values()]",
            ),
        ),
    ),
    ByHand(
        "engine/execute/ledger.py",
        "the limit is ignored",
        (("if account.total + nbytes > account.limit:", "if False:"),),
    ),
    ByHand(
        "engine/execute/ledger.py",
        "the limit is one byte too low",
        (("if account.total + nbytes > account.limit:", "if account.total + nbytes >= account.limit:"),),
    ),
    ByHand(
        "engine/execute/ledger.py",
        "released bytes stay reserved",
        (("held.pop(reservation.name, 0) - reservation.nbytes", "held.pop(reservation.name, 0)"),),
    ),
    ByHand(
        "engine/schedule/schedule.py",
        "the RAM figure lacks one slot",
        (
            (
                "return self.ram_slots * self.slot_bytes + workspaces",
                "return (self.ram_slots - 1) * self.slot_bytes + workspaces",
            ),
        ),
    ),
    ByHand(
        "engine/schedule/schedule.py",
        "the RAM figure has one slot too many",
        (
            (
                "return self.ram_slots * self.slot_bytes + workspaces",
                "return (self.ram_slots + 1) * self.slot_bytes + workspaces",
            ),
        ),
    ),
    ByHand(
        "engine/run/buffers.py",
        "checks take the buffers of all threads, whatever the plan leaves",
        (("min(threads, memory // (each * BUFFER_BYTES))", "threads"),),
    ),
    ByHand(
        "engine/run/recovery/records.py",
        "records of copies are not known",
        (('    "copied": RangeCopied.from_json,\n', ""),),
    ),
    ByHand(
        "engine/run/recovery/records.py",
        "a copied range has other names for its numbers",
        (
            (
                'return {"copied": [self.shard, self.start, self.end]}',
                'return {"copied": [self.start, self.shard, self.end]}',
            ),
        ),
    ),
    ByHand(
        "engine/run/recovery/records.py",
        "the tail is not stored",
        (("return record if self.tail is None else record |", "return record if True else record |"),),
    ),
    ByHand(
        "engine/run/recovery/records.py",
        "blocks beyond the tensor are accepted",
        (("and record.end <= block_count(graph, node)", ""),),
    ),
    ByHand(
        "engine/run/recovery/records.py",
        "source ranges beyond the tensor are accepted",
        (("r.start < r.end <= nbytes and", "r.start < r.end and"),),
    ),
    ByHand(
        "engine/run/recovery/records.py",
        "a bool counts as a number",
        (("return type(value) is int", "return isinstance(value, int)"),),
    ),
)


def mutants(module: str) -> list[Mutant]:
    """Return every mistake that cosmic-ray can make in a module."""
    tree = get_ast((ROOT / module).read_text())
    found = []
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if "no_op" in name or operator.arguments():
            continue
        count = sum(len(list(operator().mutation_positions(node))) for node in ast_nodes(tree))
        found += [Mutant(module, name, number) for number in range(count)]
    return found


def run(mutant: Mutant | ByHand, copy: Path) -> tuple[str, str]:
    """Return ``killed``, ``timeout``, ``survived`` or ``same`` (nothing changed), and the diff."""
    file = copy / mutant.module
    before = file.read_text()
    after = mutant.change(before)
    if after is None or after == before:
        return "same", ""
    diff = "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), mutant.module, n=1))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += TESTS[mutant.module]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    file.write_text(after)
    try:
        ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "timeout", diff
    finally:
        file.write_text(before)
    return "survived" if ended.returncode == 0 else "killed", diff


def make_copy(copy: Path) -> Path:
    """Copy the repository. The tests import the package from the copy, and not the installed one."""
    for folder in ("mergeloom", "engine", "io", "methods", "tests", "benchmarks", "docs", "recipes"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def main() -> None:
    """Run the command line; exit with 1 if a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--each", type=int, default=150, help="number of mutants drawn for each module")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    chosen: list[Mutant | ByHand] = [mistake for mistake in BY_HAND if mistake.module in arguments.modules]
    for module in arguments.modules:
        every = mutants(module)
        chosen += random.Random(arguments.seed).sample(every, min(arguments.each, len(every)))
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="mergeloom-mutants-") as folder:
        copies: Queue[Path] = Queue()
        for number in range(arguments.threads):
            copies.put(make_copy(Path(folder) / str(number)))

        def one(mutant: Mutant | ByHand) -> None:
            copy = copies.get()
            try:
                verdict, diff = run(mutant, copy)
            finally:
                copies.put(copy)
            counts[mutant.module, verdict] += 1
            if verdict == "survived":
                print(f"{mutant.operator} {mutant.number}\n{diff}", flush=True)

        with ThreadPoolExecutor(arguments.threads) as pool:
            list(pool.map(one, chosen))
    for (module, verdict), count in sorted(counts.items()):
        print(f"{module:24} {verdict:9} {count}")
    sys.exit(any(verdict == "survived" for _, verdict in counts))


if __name__ == "__main__":
    main()
