"""Runs the command line, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from typing import Any

from mergeloom import __main__

COMMAND = [sys.executable, "-m", "mergeloom"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run mergeloom in this process, which is faster."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = __main__.main([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def spawn(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run mergeloom in a separate process."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, **options)
