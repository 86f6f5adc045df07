"""Runs the command line, and turns exceptions into messages and exit codes."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from .errors import MergeloomError

INTERNAL_ERROR = 1
USAGE_ERROR = 2
INTERRUPTED = 130

_NEW_OBJECTS = 50_000
"""Objects to create before the garbage collector looks for cycles. Plans create millions that have none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of `sys.argv`, and return its exit code (see `mergeloom.errors`)."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # unused here, and idle threads would spin

    from .cli.streams import guarded_streams

    with guarded_streams():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    import click

    from .cli.app import PIPE_CLOSED, cli

    try:
        words = tuple(sys.argv[1:] if arguments is None else arguments)
        code = cli.main(words, prog_name="mergeloom", standalone_mode=False, obj=words)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except MergeloomError as error:
        from .cli.output import print_warning

        for warning in error.warnings:
            print_warning(warning)
        _print_error(str(error))
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return USAGE_ERROR
    except (click.Abort, KeyboardInterrupt):
        _print_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return PIPE_CLOSED
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        _print_error("internal error: please report this with the traceback above and the recipe")
        return INTERNAL_ERROR


def command() -> NoReturn:
    """Run the command of `sys.argv` and exit.

    If numpy or torch is loaded, skip the interpreter's teardown of all modules, which takes up to a third of a second.
    """
    from .io import platform

    platform.OWN_PROCESS = True
    gc.set_threshold(_NEW_OBJECTS)
    code = main()
    if "numpy" in sys.modules:  # which torch and the compiled loops import, too
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def _print_error(message: str) -> None:
    """Print an error message on stderr."""
    from .io.units import clean

    print(f"mergeloom: {clean(message)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    command()
