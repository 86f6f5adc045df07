"""What commands print: results on stdout, messages on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

import click


def print_json(content: Any) -> None:
    """Print a result as JSON on stdout."""
    click.echo(json.dumps(content, indent=2))


def print_message(text: str) -> None:
    """Print a message on stderr, with control characters escaped."""
    from ..io.units import clean

    print(clean(text), file=sys.stderr, flush=True)


def print_warning(text: str) -> None:
    """Print a warning on stderr."""
    print_message(f"warning: {text}")
