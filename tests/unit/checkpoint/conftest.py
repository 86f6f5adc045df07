"""Fixtures for the tests of checkpoints."""

from tests.unit.checkpoint.checkpoints import sharded

__all__ = ["sharded"]
