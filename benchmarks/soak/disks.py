"""Disks that are full in the middle of a merge."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.soak.harness import GROUP, OPTIONS, Counter, Family, Throttle, child, ended, failures, say
from mergeloom.engine.run.merge import merge
from mergeloom.errors import MergeloomError
from mergeloom.io import platform
from tests.support.outputs import digests


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
