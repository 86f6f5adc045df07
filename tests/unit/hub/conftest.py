"""Fixtures for the tests of the Hub client."""

from tests.support.hub.fixtures import contents, hub, local, model

__all__ = ["contents", "hub", "local", "model"]
