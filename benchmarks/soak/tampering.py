"""Merges that are killed, half of them with something tampered with before they are resumed.

A resumed merge either writes what a fresh merge of the files as they are now writes, or it is refused with exit code 2
or 4. It never reports success over other bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.soak.harness import GROUP, OPTIONS, Family, child, ended, failures, say
from mergeloom.engine.run.merge import merge
from mergeloom.errors import MergeloomError
from mergeloom.io import platform
from mergeloom.io.output.lock import WORK
from tests.support.outputs import digests

KINDS = ("shard", "journal", "input", "config")
REFUSED = (2, 4)


@dataclass(frozen=True)
class Tampered:
    """A change to a file.

    Args:
        what: what was done, for a failure's message.
        undo: restores the file.
    """

    what: str
    undo: Callable[[], None]


class KillAt:
    """Kills the process just before the n-th system call that changes files; counts them where n is negative."""

    def __init__(self, point: int, counted: Path | None = None) -> None:
        self._left = point
        self._counted = counted
        self._calls = 0

    def __call__(self, call: str, *arguments: Any) -> None:
        self._calls += 1
        if self._counted is not None:
            self._counted.write_text(str(self._calls))
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1


def run_merge(recipe: Path, out: Path, watch: Callable[..., None] | None) -> int:
    """Merge in a child process; its exit code, as the command line gives it."""

    def run() -> int:
        platform.WATCH = watch
        try:
            merge(recipe, out, OPTIONS, group_bytes=GROUP)
        except MergeloomError as error:
            return error.exit_code
        return 0

    return ended(child(run))


# ------------------------------------------------------------------------------------------------ tampering


def tamper(kind: str, inputs: list[Path], out: Path, chance: random.Random) -> Tampered | None:
    """Change a file of this kind; None where the killed merge left none."""
    if kind == "shard":
        shards = sorted((out / WORK / "out").rglob("*.safetensors"))
        return replace(_flipped(chance.choice(shards), chance), undo=_leave) if shards else None
    if kind == "journal":
        journal = out / WORK / "journal"
        return _changed_journal(journal, chance) if journal.is_file() else None
    if kind == "input":
        return _flipped(chance.choice(inputs) / "model.safetensors", chance, keep_mtime=chance.random() < 0.7)
    return _changed_json(chance.choice(inputs) / chance.choice(("config.json", "tokenizer_config.json")))


def _flipped(file: Path, chance: random.Random, *, keep_mtime: bool = False) -> Tampered:
    """Flip one bit of a file's data; its old modification time can be restored."""
    before = file.stat()
    place, bit = chance.randrange(file.stat().st_size * 3 // 4, file.stat().st_size), 1 << chance.randrange(8)

    def flip() -> None:
        with file.open("r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ bit]))
        if keep_mtime:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    flip()
    return Tampered(f"bit {bit} of byte {place} of {file.name}, mtime {'restored' if keep_mtime else 'new'}", flip)


def _changed_journal(journal: Path, chance: random.Random) -> Tampered:
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    how = chance.choice(("cut", "flip", "drop", "repeat"))
    place = chance.randrange(1, len(lines)) if len(lines) > 1 else 0
    if how == "cut":
        changed = data[: chance.randrange(len(data))]
    elif how == "flip":
        byte = chance.randrange(len(data))
        changed = data[:byte] + bytes([data[byte] ^ 1 << chance.randrange(8)]) + data[byte + 1 :]
    elif how == "drop":
        changed = b"".join(lines[:place] + lines[place + 1 :])
    else:
        changed = b"".join([*lines[: place + 1], *lines[place:]])
    journal.write_bytes(changed)
    return Tampered(f"journal: {how} at line {place}", _leave)


def _leave() -> None:
    """Restore nothing: the merge has replaced or removed the file."""


def _changed_json(file: Path) -> Tampered:
    data = file.read_bytes()
    file.write_text(json.dumps({**json.loads(data), "tampered_with": True}))
    return Tampered(f"{file.name} of {file.parent.name}", lambda: file.write_bytes(data) and None)


# ------------------------------------------------------------------------------------------------ the part


def recipes(family: Family) -> tuple[dict[str, Path], list[Path]]:
    """A merge that computes and one that only copies, and the models that both read, which may be changed."""
    models = [family.directory / f"fine-tune-{seed}" for seed in (1, 2)]
    stack = family.directory / "stack.yml"
    ranges = ((0, [0, 4]), (1, [2, 6]))
    sources = [{"sources": [{"model": str(models[model]), "layer_range": layers}]} for model, layers in ranges]
    stack.write_text(json.dumps({"merge_method": "passthrough", "slices": sources}))
    return {"computed": family.recipe, "copied": stack}, models


def tampering(family: Family, times: int, chance: random.Random) -> None:
    """Kill each merge once at a random system call; tamper with every second one; resume."""
    named, models = recipes(family)
    out, fresh, counted = (family.directory / name for name in ("out", "fresh", "calls"))
    calls, expected = {}, {}
    for name, recipe in named.items():
        failures.expect(run_merge(recipe, fresh, KillAt(-1, counted)) == 0, f"the first {name} merge")
        calls[name], expected[name] = int(counted.read_text()), digests(fresh)
        shutil.rmtree(fresh)
    outcomes: Counter[str] = Counter()
    for number in range(times):
        name = ("computed", "copied")[number // 2 % 2]
        code = run_merge(named[name], out, KillAt(chance.randrange(calls[name] // 10, calls[name])))
        failures.expect(code in (-signal.SIGKILL, 0), f"{name} merge {number}: ended with {code}")
        kind = KINDS[number // 4 % 4] if number % 2 else ""
        finished = code == 0  # before the call at which it was to be killed: threads make the number of calls vary
        changed = tamper(kind, models, out, chance) if kind and not finished else None
        code = run_merge(named[name], out, None)
        wanted = expected[name]
        if changed is not None and kind in ("input", "config") and code == 0:
            failures.expect(run_merge(named[name], fresh, None) == 0, f"a fresh merge after {changed.what}")
            wanted = digests(fresh)
            shutil.rmtree(fresh)
        what = f"{name} merge {number}, {changed.what if changed else 'not tampered with'}"
        if code == 0:
            found = digests(out)
            differ = sorted(file for file in found.keys() | wanted.keys() if found.get(file) != wanted.get(file))
            failures.expect(not differ, f"{what}: success with other bytes in {differ}")
        else:
            failures.expect(changed is not None and code in REFUSED, f"{what}: ended with {code}")
        outcomes[f"{kind if changed else 'nothing'}: {'same bytes' if code == 0 else 'refused'}"] += 1
        if changed is not None:
            changed.undo()
        shutil.rmtree(out, ignore_errors=True)
    say(f"Tampering: {times} merges killed, {sum(outcomes.values())} resumed: {dict(sorted(outcomes.items()))}")
