"""Tests of mergeloom/cli."""
