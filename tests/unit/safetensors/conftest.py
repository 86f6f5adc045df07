"""Fixtures for the tests of checkpoints."""

from tests.unit.safetensors.checkpoints import sharded

__all__ = ["sharded"]
