"""The number of examples that a property test draws: all of them in `make test-all`, a fifth in `make test`."""

from __future__ import annotations

SHARE = 5
"""`make test` draws one of this many."""
_few = False


def draw_few() -> None:
    """Draw a share of the examples in the tests that are imported from now on."""
    global _few
    _few = True


def examples(count: int) -> int:
    """Return how many of `count` examples to draw."""
    return -(-count // SHARE) if _few else count
