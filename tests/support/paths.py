"""Where the checkout's folders and files are, for tests that read or run them."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

CODE = ("mergeloom", "engine", "methods", "io", "tests", "benchmarks", "recipes")
"""The folders with Python files."""


def python_files() -> list[Path]:
    """Every Python file that git knows or would add, below the code folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *CODE]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in sorted(set(listed)) if name.endswith(".py") and (ROOT / name).is_file()]
