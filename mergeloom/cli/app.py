"""The command group. Only click is imported at the top, so `--help` is fast."""

from __future__ import annotations

import shutil
from typing import Any

import click

from ..version import __version__
from .diff import diff
from .extract_lora import extract_lora
from .inspect import inspect
from .merge import merge
from .methods import methods
from .plan import plan
from .stack import stack
from .verify import verify

PIPE_CLOSED = 141
"""The exit code that a shell reports for a process killed by SIGPIPE."""

_CLICK_COLUMNS = 52
"""The narrowest terminal that click fits the help to."""
_MIN_COLUMNS = 30

EXIT_CODES = """\
Exit codes: 0 success; 1 internal error; 2 invalid recipe or command line; 3 the merge exceeds the memory budget or \
the disk space; 4 an input is damaged, missing or inconsistent; 5 device, disk or concurrency failure, try again; \
130 and 143 interrupted by Ctrl-C or SIGTERM, the same command resumes."""


class Commands(click.Group):
    """The commands. When the reader of a pipe is gone, click would exit with 1; this exits with PIPE_CLOSED."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Create the context; on a narrow terminal click would make the help wider than it."""
        columns = shutil.get_terminal_size().columns
        if columns < _CLICK_COLUMNS:
            extra.setdefault("terminal_width", max(columns, _MIN_COLUMNS))
        return super().make_context(info_name, args, parent, **extra)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name, or name the closest one."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise click.UsageError(f"unknown command {name!r}; {self._advice(ctx, args)}", ctx)
        return super().resolve_command(ctx, args)

    def _advice(self, ctx: click.Context, args: list[str]) -> str:
        from difflib import get_close_matches

        if args[0].lower().endswith((".yml", ".yaml", ".json")):
            return f"to merge, use `mergeloom merge {' '.join(args)}`"
        aliases = {"help": "mergeloom --help", "version": "mergeloom --version"}
        if args[0] in aliases:
            return f"use `{aliases[args[0]]}`"
        close = get_close_matches(args[0].lower(), self.commands, n=1)
        return f"did you mean `{close[0]}`?" if close else f"the commands are {', '.join(sorted(self.commands))}"

    def _unknown_option(self, error: click.NoSuchOption) -> click.UsageError:
        """The error for an unknown option, with the closest one, or the command that has it."""
        from difflib import get_close_matches

        name = error.option_name
        owners = [
            command for command, found in self.commands.items() if any(name in each.opts for each in found.params)
        ]
        if owners and error.ctx is not None:
            command = error.ctx.info_name
            return click.UsageError(f"{name} is not an option of {command}, only of {' and '.join(owners)}", error.ctx)
        options = {other.lstrip("-"): other for other in error.possibilities or ()}
        close = get_close_matches(name.lstrip("-"), options, n=1, cutoff=0.7)
        return click.NoSuchOption(name, possibilities=[options[each] for each in close], ctx=error.ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the context names."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            raise self._unknown_option(error) from None
        except BrokenPipeError:
            raise click.exceptions.Exit(PIPE_CLOSED) from None


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EXIT_CODES
)
@click.version_option(__version__, "-V", "--version", prog_name="mergeloom")
def cli() -> None:
    """Merge model checkpoints within a memory budget.

    RECIPE is a mergekit YAML configuration; `-` is standard input. Sizes take the units B, KB, MB, GB, TB and KiB, MiB,
    GiB, TiB; 8G is 8GiB. mergekit-yaml's options are accepted where they have a meaning.
    """


for _command in (diff, extract_lora, inspect, merge, methods, plan, stack, verify):
    cli.add_command(_command)
