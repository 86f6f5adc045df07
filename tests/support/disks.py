"""File systems of their own, for tests that need a certain one: images on loop devices."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def file_system(directory: Path, kind: str, *options: str, nbytes: int = 400 << 20) -> Iterator[Path]:
    """A new file system of a kind such as ``xfs``, mounted below `directory`; the test is skipped where that can't be.

    Args:
        directory: directory of the image, a sparse file.
        kind: type of the file system, as in ``mkfs.KIND``.
        options: options for mkfs.
        nbytes: size of the image in bytes.
    """
    made, mounted = shutil.which(f"mkfs.{kind}"), shutil.which("mount")
    if os.geteuid() != 0 or made is None or mounted is None:
        pytest.skip(f"needs root, mount and mkfs.{kind}")
    image, point = directory / f"{kind}.img", directory / kind
    directory.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as stream:
        stream.truncate(nbytes)
    point.mkdir()
    for command in ([made, "-q", *options, str(image)], [mounted, "-t", kind, "-o", "loop", str(image), str(point)]):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            pytest.skip(f"{Path(command[0]).name}: {ended.stderr.strip()[-300:]}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)
        image.unlink()


def used(path: Path) -> int:
    """Bytes that are taken on the file system that holds `path`."""
    subprocess.run(["sync", "-f", str(path)], check=True)
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize
