"""The command group. Only click is imported at the top, so `--help` is fast."""

from __future__ import annotations

from typing import Any

import click

from ..version import __version__
from .diff import diff
from .inspect import inspect
from .merge import merge
from .methods import methods
from .plan import plan
from .stack import stack
from .verify import verify

PIPE_CLOSED = 141
"""The exit code that a shell reports for a process killed by SIGPIPE."""

EXIT_CODES = """\
Exit codes: 0 success; 1 internal error; 2 invalid recipe or command line; 3 the merge exceeds the memory budget or \
the disk space; 4 an input is damaged, missing or inconsistent; 5 device, disk or concurrency failure, try again; \
130 and 143 interrupted by Ctrl-C or SIGTERM, the same command resumes."""


class Commands(click.Group):
    """The commands. When the reader of a pipe is gone, click would exit with 1; this exits with PIPE_CLOSED."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the context names."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise click.exceptions.Exit(PIPE_CLOSED) from None


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EXIT_CODES
)
@click.version_option(__version__, prog_name="mergeloom")
def cli() -> None:
    """Merge model checkpoints within a memory budget.

    RECIPE is a mergekit YAML configuration. Sizes take the units B, KB, MB, GB, TB and KiB, MiB, GiB, TiB.
    """


for _command in (diff, inspect, merge, methods, plan, stack, verify):
    cli.add_command(_command)
