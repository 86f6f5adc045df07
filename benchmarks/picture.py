"""Draw what a terminal shows of a real merge, as docs/merge.svg.

    python -m benchmarks.picture [--models DIRECTORY]

The merge is that of the README, of two models with the shapes of Llama-3.2-1B, in a terminal of its own. Of the line
that is redrawn while it runs, the picture has the one from half-way.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import sys
import tempfile
import termios
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks.compare import DOCUMENT
from benchmarks.process import touch_memory, warm

COLUMNS = 110
RECIPE = """\
merge_method: linear
models:
  - model: llama-1b-instruct
    parameters:
      weight: 0.6
  - model: llama-1b-code
    parameters:
      weight:
        - filter: mlp
          value: [0.2, 0.6]
        - value: 0.4
dtype: bfloat16
"""
_DRAWN_OVER = re.compile(r"(?:\r|\x1b\[2?K|\x1b\[1A)+")
_CURSOR = re.compile(r"\x1b\[\?25[lh]")


def on_terminal(command: Sequence[str], directory: Path) -> str:
    """Run a command in a terminal of its own; everything that it writes there, control sequences included."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
        os.chdir(directory)
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"})
    written = bytearray()
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # Linux says so when the other end has closed
            break
        if not piece:
            break
        written += piece
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}:\n{written.decode()}")
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines of a terminal's screen; of those that were drawn over, what they were half-way, and at the end."""
    lines = []
    for line in _CURSOR.sub("", written).split("\n"):
        drawn = [text for text in _DRAWN_OVER.split(line) if text.strip()]
        lines += [drawn[len(drawn) // 2], drawn[-1]] if len(drawn) > 1 else drawn or [""]
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("~/.cache/mergeloom-bench/1b").expanduser())
    arguments = parser.parse_args()
    typed = "mergeloom merge soup.yml merged --max-ram 1GiB"
    with tempfile.TemporaryDirectory(prefix="mergeloom-bench-", dir="/dev/shm") as folder:
        here = Path(folder)
        (here / "soup.yml").write_text(RECIPE)
        for name, model in (("llama-1b-instruct", "a"), ("llama-1b-code", "b")):
            (here / name).symlink_to((arguments.models / model).absolute())
            warm((arguments.models / model).glob("*.safetensors"))
        touch_memory(int(4e9))
        program, *rest = typed.split()
        lines = screen(on_terminal([str(Path(sys.executable).with_name(program)), *rest], here))
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {typed}", style="bold"))
    for line in lines:
        console.print(Text.from_ansi(line))
    file = DOCUMENT.with_name("merge.svg")
    print(console.export_text(clear=False), end="")
    file.write_text(console.export_svg(title=f"two models of 2.5 GB each, on {len(os.sched_getaffinity(0))} cores"))


if __name__ == "__main__":
    main()
