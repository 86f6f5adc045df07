"""The process: runs the command line, and turns what it raises into a message and an exit code."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from .errors import MergeloomError

BUG = 1
WRONG_USAGE = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default the process's own, and return its exit code (see `mergeloom.errors`)."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy multiplies no matrices here, and its threads would spin

    import click

    from .cli.app import PIPE_CLOSED, cli

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="replace")
    try:
        code = cli.main(arguments, prog_name="mergeloom", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except MergeloomError as error:
        _say(str(error))
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return WRONG_USAGE
    except (click.Abort, KeyboardInterrupt):
        _say("stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # what is still in the buffer would fail again when the interpreter flushes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        _say("this is a bug of ours: please report it, with what stands above and the recipe")
        return BUG


def command() -> NoReturn:
    """The process's own command: ends the process.

    Taking torch down, module by module, takes a third of a second, and nothing is left in it that would be missed.
    """
    from .io import platform

    platform.OWN_PROCESS = True
    code = main()
    if "torch" in sys.modules:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def _say(message: str) -> None:
    """A message on stderr."""
    from .io.units import clean

    print(f"mergeloom: {clean(message)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    command()
