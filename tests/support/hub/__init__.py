"""A local Hub server, and fixtures and helpers for tests that use it."""
