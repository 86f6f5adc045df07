"""Measurements at the true shapes of giant models."""
